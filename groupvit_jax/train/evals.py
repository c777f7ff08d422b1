"""Evaluations and panels of images during training, and the benchmarks of a config."""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from groupvit_jax.data import pipeline
from groupvit_jax.data.mixture import Mixture
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval import draw as visualize
from groupvit_jax.eval import labelled, protocols, zero_shot
from groupvit_jax.eval.class_names import find_names
from groupvit_jax.eval.evaluator import build_scene_evaluator, Evaluator
from groupvit_jax.eval.labelled import BadImage, decode_threads
from groupvit_jax.eval.result import METRICS, Result
from groupvit_jax.eval.window_encoder import group_maps
from groupvit_jax.eval.zero_shot import ZeroShotEvaluator
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.running import processes
from groupvit_jax.running.interrupts import Interrupts, Preempted
from groupvit_jax.train.checkpoint import BestCheckpoint
from groupvit_jax.train.log import RunLog
from groupvit_jax.train.state import TrainState

SCENES = 'validation'  # the held-out scenes, as an evaluation
_TITLES = {'miou': 'mIoU', 'oracle_miou': 'oracle mIoU', 'top1': 'top-1 accuracy'}  # in the log, in percent
_TRAINING = 'train/pictures'
_SHOWN = 4  # images on a panel


class Scheduled(NamedTuple):
  """An evaluation or panel every so many steps, and after the last one."""

  name: str
  every_steps: int  # 0 for never
  evaluate: Callable[..., Result | zero_shot.Result] | None  # (variables, provenance=...); None for panels alone
  draw: Callable[[dict], np.ndarray] | None  # variables -> panel uint8 [H, W, 3]; None where there is nothing to see
  panel_steps: tuple[int, ...] = ()  # further steps after which the panel alone is drawn; 0 is before the first one

  def due(self, step: int, total_steps: int) -> 'Scheduled | None':
    """What of it is due after a step."""
    if self.every_steps > 0 and step > 0 and (step % self.every_steps == 0 or step == total_steps):
      return self
    return self._replace(evaluate=None) if step in self.panel_steps and self.draw is not None else None


class OpenedBenchmark(NamedTuple):
  """A benchmark whose images have been found."""

  name: str  # in the config, and in the metrics' names
  every_steps: int
  metrics: tuple[str, ...]
  build: Callable[[ImageTextModel, Tokenizer, jax.sharding.Mesh], Evaluator | ZeroShotEvaluator]  # it compiles later


def schedule_evaluations(
  config: ml_collections.ConfigDict,
  source: Mixture,
  opened: Sequence[OpenedBenchmark],
  model: ImageTextModel,
  tokenizer: Tokenizer,
  mesh: jax.sharding.Mesh,
) -> list[Scheduled]:
  """The evaluations and panels that a config asks for, on a mesh of devices that have images of their own each."""
  panel_steps = tuple(config.eval.panel_steps)
  if config.data.source == 'scenes':
    scenes = build_scene_evaluator(config, model, tokenizer, mesh)
    scheduled = [Scheduled(SCENES, config.eval.every_steps, scenes.evaluate, scenes.panel, panel_steps)]
  else:
    examples = pipeline.build_examples(config, source, tokenizer, first_batch=0)
    draw = functools.partial(_draw_training_images, examples, model, mesh)
    scheduled = [Scheduled(_TRAINING, config.eval.every_steps, None, draw, panel_steps)]
  for each in opened:
    built = each.build(model, tokenizer, mesh)
    draw = built.panel if isinstance(built, Evaluator) else None
    scheduled.append(Scheduled(each.name, each.every_steps, built.evaluate, draw))
  return scheduled


class RunEvals:
  """Runs what is scheduled, logs it, and keeps the best checkpoint."""

  def __init__(
    self,
    scheduled: Sequence[Scheduled],
    config: ml_collections.ConfigDict,
    log: RunLog,
    best: BestCheckpoint,
    interrupts: Interrupts,
    provenance: Callable[..., Mapping[str, str]],
  ):
    """Keeps its arguments; `provenance` is (step=...) -> what metrics depend on besides their protocol."""
    self._scheduled, self._config, self._log, self._best = scheduled, config, log, best
    self._interrupts, self._provenance = interrupts, provenance

  def due(self, step: int) -> list[Scheduled]:
    """What to run after a step."""
    return list(filter(None, (each.due(step, self._config.total_steps) for each in self._scheduled)))

  def missing(self, step: int) -> list[Scheduled]:
    """Evaluations due after the step that a run resumes from, and absent from its log; panels before the first step."""
    logged = processes.all_gather_objects(sorted(self._log.resumed_metrics))[0]
    done = lambda name: any(figure.startswith(prefix(name)) for figure in logged)
    return [each for each in self.due(step) if step == 0 or each.evaluate is not None and not done(each.name)]

  def run(self, due: Sequence[Scheduled], state: TrainState) -> bool:
    """Runs all that is due; returns whether all evaluations were run.

    A signal ends the one that it comes in, and skips those after it. One with a bad image is skipped; the others, and
    the run, continue.
    """
    step = int(state.step)
    for place, each in enumerate(due):
      result = panel = None
      try:
        with self._interrupts.immediately():
          if each.evaluate is not None:
            result = each.evaluate(state.best_variables, provenance=self._provenance(step=step))
          if each.draw is not None:
            panel = each.draw(state.best_variables)
      except Preempted:
        self._log.message(f'{each.name} after step {step} left for a signal')
        return not any(other.evaluate for other in due[place:])
      except BadImage as error:
        self._log.message(f'{each.name} after step {step} left out: {error}')
      if panel is not None:
        self._log.image(step, each.name if each.name == _TRAINING else f'eval/{each.name}', panel)
      if result is not None:
        self._record(each.name, result, state)
    return True

  def _record(self, name: str, result: Result | zero_shot.Result, state: TrainState) -> None:
    """Saves the state if it is the best so far, then logs the metrics and their settings.

    In this order: an evaluation that is in the log is not run again.
    """
    step, scalars = int(state.step), result.scalars()
    metrics = {prefix(name) + key: value for key, value in scalars.items()}
    if self._best.offer(metrics, state, self._config, result.settings()):
      self._log.message(f'step {step}  {self._config.checkpoint.best} {self._best.value:.1%} is the best so far; kept')
    self._log.metrics(step, metrics, {f'eval/{name}/settings': result.settings()})
    self._log.text(step, f'eval/{name}/settings', json.dumps(result.to_json(), indent=2))
    shown = [f'{title} {scalars[key]:.1%}' for key, title in _TITLES.items() if key in scalars]
    self._log.message(f'step {step}  {name}  ' + '  '.join(shown))


def open_benchmarks(
  config: ml_collections.ConfigDict, image_size: tuple[int, int], patch_size: int
) -> tuple[OpenedBenchmark, ...]:
  """Finds the images of every benchmark that a config's `benchmarks` part lists and that is turned on.

  Args:
    config: name -> `benchmark` and `data_dir` as eval.py takes them, `every_steps` (0 for never), `num_pictures` (so
      many, spread evenly; 0 for all), `protocol` ('' for that of the published figure) and `changes` to it.
    image_size: (H, W) of the training images.
    patch_size: the model's, in pixels.
  """
  scheduled = [name for name in sorted(config) if config[name].every_steps > 0]
  return tuple(_open(name, config[name], image_size, patch_size) for name in scheduled)


def check_best(metric: str, benchmarks: Sequence[OpenedBenchmark], others: Sequence[str]) -> None:
  """Raises UserError unless a metric is '' or one of a run's benchmarks, or of `others`, which have label maps."""
  measured = {each.name: each.metrics for each in benchmarks} | {name: METRICS for name in others}
  if metric and not any(metric == prefix(name) + figure for name, found in measured.items() for figure in found):
    known = ', '.join(f'{prefix(name)}{{{",".join(found)}}}' for name, found in measured.items())
    raise UserError(
      f'checkpoint.best={metric!r} is a figure of no evaluation; there are '
      + (known or 'none, for nothing is evaluated')
    )


def prefix(name: str) -> str:
  """The prefix of an evaluation's metrics in the log."""
  return f'eval/{name}/'


def _open(name: str, entry: ml_collections.ConfigDict, image_size: tuple[int, int], patch_size: int) -> OpenedBenchmark:
  changes = dict(entry.changes)
  try:
    if entry.benchmark == labelled.IMAGENET:
      if entry.protocol or set(changes) - {'templates'}:
        raise UserError(zero_shot.NO_PROTOCOL)
      source = labelled.take(labelled.open_imagenet(entry.data_dir), entry.num_pictures)
      build = functools.partial(
        zero_shot.build_evaluator, source=source, templates=changes.get('templates', zero_shot.TEMPLATES)
      )
      return OpenedBenchmark(name, entry.every_steps, zero_shot.METRICS, build)
    benchmark, source = labelled.open_benchmark(entry.benchmark, entry.data_dir, entry.num_pictures)
    chosen = entry.protocol or labelled.default_protocol(benchmark)
    protocol = protocols.find_protocol(chosen, image_size, patch_size)
    protocol = benchmark.fix_threshold(protocols.override(protocol, changes))
    find_names(benchmark, protocol.class_names)
  except ValueError as error:
    raise UserError(f'benchmarks.{name}: {error}') from error
  build = functools.partial(
    Evaluator, source=source, benchmark=benchmark, protocol=protocol, num_threads=decode_threads()
  )
  return OpenedBenchmark(name, entry.every_steps, METRICS, build)


def _draw_training_images(
  examples: pipeline.Examples, model: ImageTextModel, mesh: jax.sharding.Mesh, variables: dict
) -> np.ndarray:
  """A panel of images and their groups, cropped as in the run's first batch; the same at every call, on every host."""
  images = [examples.load(i).image for i in range(min(_SHOWN, len(examples)))]
  window = protocols.native_protocol(tuple(model.vision.image_size)).window
  maps = group_maps(model, variables, images, window, mesh)
  rows = [visualize.Row(image, None, None, stages) for image, stages in zip(images, maps, strict=True)]
  return visualize.draw_panel(rows, (), ())
