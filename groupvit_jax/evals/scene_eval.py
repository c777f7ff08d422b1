"""Held-out embedded scenes of a run: scores and pictures, during training and after it."""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

from etils import epath
import jax
import ml_collections
import numpy as np

from groupvit_jax import trained_run
from groupvit_jax.data.sources import build_scenes
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.evals import semantic_seg
from groupvit_jax.evals.benchmarks import Benchmark, make_benchmark
from groupvit_jax.evals.evaluator import Evaluator
from groupvit_jax.evals.protocols import native_protocol
from groupvit_jax.evals.result import Result, SCORES
from groupvit_jax.evals.visualize import draw_panel, spread_palette
from groupvit_jax.models.image_text import ImageTextModel
from groupvit_jax.trained_run import TrainedRun

VALIDATION, TEST = 'validation', 'test'  # of TEST nobody has seen a score while choosing anything
_SHOWN = 6


def open_scenes(config: ml_collections.ConfigDict, split: str) -> tuple[Benchmark, semantic_seg.LabelledSource]:
  """Scenes as a benchmark, of which every pixel is one of the classes, and the scenes.

  Args:
    config: of the run.
    split: `VALIDATION` or `TEST`.

  Raises:
    ValueError: the config's scenes have a mistake.
  """
  size = tuple(config.model.vision.image_size)
  source = build_scenes(config.data.scenes, size, split).labelled()
  benchmark = make_benchmark('scenes', source.classes)
  return dataclasses.replace(benchmark, palette=spread_palette(benchmark.num_classes)), source


class Comparison(NamedTuple):
  """What a score of scenes stands beside."""

  lines: tuple[str, ...]  # of the table
  facts: dict[str, Any]  # of the report
  panel: np.ndarray | None  # some scenes, uint8 [H, W, 3]


def compare(run: TrainedRun, evaluator: Evaluator, result: Result) -> Comparison:
  """A run's result on its test scenes beside what it has to beat: one class for everything, and the untrained model.

  The latter is left out where the weights that a run started from are gone.
  """
  scores = result.scalars()
  baselines = {'constant': {'class': result.constant[0]} | {name: scores[f'constant_{name}'] for name in SCORES}}
  try:
    variables = trained_run.untrained_variables(run)
  except ValueError as error:
    line = f'the untrained model is left out: {error}'
  else:
    untrained = evaluator.evaluate(variables).scalars()
    baselines['untrained'] = {name: untrained[name] for name in (*SCORES, *(f'oracle_{name}' for name in SCORES))}
    line = f'the untrained model: mIoU {untrained["miou"]:.1%}, pixel accuracy {untrained["pixel_accuracy"]:.1%}'
  rows = evaluator.rows(run.variables, range(min(_SHOWN, len(evaluator.source))))
  panel = draw_panel(rows, evaluator.benchmark.palette, evaluator.benchmark.classes)
  return Comparison((line,), {'split': TEST, 'baselines': baselines}, panel)


def check_has_scenes(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
  """Raises ValueError for a run that was not trained on scenes, such as one of imported weights."""
  if 'source' not in config.data or config.data.source != 'scenes':
    raise ValueError(
      f'the run in {workdir} has no held-out scenes; name pictures with --images, or labelled ones with '
      '--benchmark and --data_dir'
    )


class SceneEvaluator:
  """Scores a run's model on scenes it has not seen. Compiles at the first call only."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    model: ImageTextModel,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    split: str = VALIDATION,
  ):
    """Chooses the scenes; nothing is computed yet.

    Args:
      config: of the run.
      model: of the run.
      tokenizer: of the run.
      mesh: where the variables live.
      split: `VALIDATION` or `TEST`.

    Raises:
      ValueError: the config's scenes have a mistake.
    """
    self.split = split
    self.benchmark, self.source = open_scenes(config, split)
    self.protocol = native_protocol(tuple(config.model.vision.image_size))
    # A scene is composed faster than a thread is woken.
    self.evaluator = Evaluator(model, tokenizer, mesh, self.source, self.benchmark, self.protocol, num_threads=0)

  def evaluate(self, variables: dict, *, provenance: Mapping[str, str] | None = None) -> Result:
    """Labels and scores all scenes; the same result on every host.

    Args:
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      provenance: what else to name in the result.

    Returns:
      The result; `.scalars()` for logs, `.table()` and `.to_json()` for people.
    """
    return self.evaluator.evaluate(variables, provenance=provenance)

  def pictures(self, variables: dict, count: int = 4) -> np.ndarray:
    """A panel of the first scenes: input, truth, prediction, final and first groups.

    Args:
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      count: scenes, the same ones at every call.

    Returns:
      uint8 [H, W, 3], on every host.
    """
    rows = self.evaluator.rows(variables, range(min(count, len(self.source))))
    return draw_panel(rows, self.benchmark.palette, self.benchmark.classes)
