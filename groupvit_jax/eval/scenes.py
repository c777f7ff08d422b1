"""Held-out embedded scenes of a run: scores and pictures, during training and after it."""

from collections.abc import Mapping
import dataclasses

import jax
import ml_collections
import numpy as np

from groupvit_jax.data.sources import build_scenes
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.eval import semantic_seg
from groupvit_jax.eval.benchmarks import Benchmark, make_benchmark
from groupvit_jax.eval.draw import draw_panel, spread_palette
from groupvit_jax.eval.evaluator import Evaluator
from groupvit_jax.eval.protocols import native_protocol
from groupvit_jax.eval.result import Result
from groupvit_jax.model.image_text import ImageTextModel

VALIDATION, TEST = 'validation', 'test'  # of TEST nobody has seen a score while choosing anything


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
