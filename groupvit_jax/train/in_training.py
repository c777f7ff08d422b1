"""Benchmarks that a run is scored on while it trains, as `config.evals` lists them."""

from collections.abc import Mapping, Sequence
import dataclasses

import jax
import ml_collections

from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval import labelled, protocols, zero_shot
from groupvit_jax.eval.evaluator import Evaluator
from groupvit_jax.eval.prefetch import decode_threads
from groupvit_jax.eval.result import METRICS
from groupvit_jax.eval.zero_shot import ZeroShotEvaluator
from groupvit_jax.model.image_text import ImageTextModel

_FIELDS = ('benchmark', 'data_dir', 'every_steps', 'num_pictures', 'protocol', 'changes')


@dataclasses.dataclass(frozen=True)
class OpenedEval:
  """A benchmark whose pictures have been found; `build` makes it ready for a model.

  Attributes:
    name: in the config, and in the figures' names.
    every_steps: how often.
    benchmark: its classes; None for ImageNet.
    source: its pictures.
    protocol: how they are labelled; None for ImageNet.
    templates: of ImageNet's names.
  """

  name: str
  every_steps: int
  benchmark: labelled.Benchmark | None
  source: object
  protocol: protocols.Protocol | None
  templates: str = zero_shot.TEMPLATES

  @property
  def figures(self) -> tuple[str, ...]:
    """Names of what is measured."""
    return zero_shot.METRICS if self.benchmark is None else METRICS

  def build(
    self, model: ImageTextModel, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
  ) -> Evaluator | ZeroShotEvaluator:
    """An evaluator, whose `evaluate(variables).scalars()` are the figures; it compiles at the first call only."""
    if self.benchmark is None:
      return zero_shot.build_evaluator(model, tokenizer, mesh, self.source, self.templates)
    return Evaluator(model, tokenizer, mesh, self.source, self.benchmark, self.protocol, decode_threads())


def open_evals(config: ml_collections.ConfigDict, image_size: tuple[int, int]) -> tuple[OpenedEval, ...]:
  """Finds the pictures of every benchmark that a config's `evals` part lists.

  Args:
    config: name -> `benchmark` and `data_dir` as eval.py takes them, `every_steps` (0 for never), `num_pictures` (so
      many, spread evenly; 0 for all), `protocol` ('' for that of the published figure) and `changes` to it.
    image_size: (H, W) of the training pictures.

  Raises:
    ValueError: an entry has a mistake, or its pictures are not there.
  """
  return tuple(_open(name, config[name], image_size) for name in sorted(config) if _check(name, config[name]))


def check_best(metric: str, evals: Sequence[OpenedEval], others: Sequence[str]) -> None:
  """Raises ValueError unless a metric is '' or a figure of one of some evaluations.

  Args:
    metric: 'eval/NAME/FIGURE'.
    evals: that a run has.
    others: names of further ones, of label maps.
  """
  measured = {each.name: each.figures for each in evals} | {name: METRICS for name in others}
  if metric and not any(metric == prefix(name) + figure for name, found in measured.items() for figure in found):
    known = ', '.join(f'{prefix(name)}{{{",".join(found)}}}' for name, found in measured.items())
    raise UserError(
      f'checkpoint.best={metric!r} is a figure of no evaluation; there are '
      + (known or 'none, for nothing is evaluated')
    )


def figures(name: str, scalars: Mapping[str, float]) -> dict[str, float]:
  """An evaluation's figures as they are logged."""
  return {prefix(name) + key: value for key, value in scalars.items()}


def prefix(name: str) -> str:
  """What the names of an evaluation's figures begin with."""
  return f'eval/{name}/'


def _check(name: str, entry: Mapping[str, object]) -> bool:
  """Whether an entry is wanted at all."""
  if odd := sorted(set(_FIELDS) ^ set(entry)):
    verb = 'is missing' if odd[0] in _FIELDS else 'is unknown'
    raise UserError(f'evals.{name}.{odd[0]} {verb}; an evaluation has {", ".join(_FIELDS)}')
  if entry['every_steps'] < 0:
    raise UserError(f'evals.{name}.every_steps={entry["every_steps"]}: use 0 for never, or more')
  return entry['every_steps'] > 0


def _open(name: str, entry: Mapping[str, object], image_size: tuple[int, int]) -> OpenedEval:
  try:
    if entry['benchmark'] == labelled.IMAGENET:
      if entry['protocol'] or set(entry['changes']) - {'templates'}:
        raise UserError(zero_shot.NO_PROTOCOL)
      source = labelled.take(labelled.open_imagenet(entry['data_dir']), entry['num_pictures'])
      templates = dict(entry['changes']).get('templates', zero_shot.TEMPLATES)
      return OpenedEval(name, entry['every_steps'], None, source, None, templates)
    benchmark, source = labelled.open_benchmark(entry['benchmark'], entry['data_dir'], entry['num_pictures'])
    protocol = protocols.find_protocol(entry['protocol'] or labelled.default_protocol(benchmark), image_size)
    protocol = benchmark.fix_threshold(protocols.override(protocol, dict(entry['changes'])))
  except ValueError as error:
    raise UserError(f'evals.{name}: {error}') from error
  return OpenedEval(name, entry['every_steps'], benchmark, source, protocol)
