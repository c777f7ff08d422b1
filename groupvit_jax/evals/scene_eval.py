"""Held-out embedded scenes of a run: scores and pictures, during training and after it."""

import dataclasses
from collections.abc import Mapping

from etils import epath
import jax
import ml_collections
import numpy as np

from groupvit_jax.data.sources import build_scenes
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.evals import semantic_seg, visualize
from groupvit_jax.evals.benchmarks import Benchmark, make_benchmark
from groupvit_jax.evals.evaluator import Evaluator
from groupvit_jax.evals.protocols import native_protocol, Protocol
from groupvit_jax.models.image_text import ImageTextModel


def scene_benchmark(classes: tuple[str, ...]) -> Benchmark:
  """Scenes as a benchmark: every pixel is one of the classes, there is no background."""
  benchmark = make_benchmark('scenes', classes)
  return dataclasses.replace(benchmark, palette=visualize.spread_palette(len(classes)))


def check_has_scenes(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
  """Raises ValueError for a run that was not trained on scenes, such as one of imported weights."""
  if 'source' not in config.data or config.data.source != 'scenes':
    raise ValueError(f'the run in {workdir} has no held-out scenes; name pictures with --images, or labelled ones with '
                     '--benchmark and --data_dir')


class SceneEvaluator:
  """Scores a run's model on scenes it has not seen. Compiles at the first call only."""

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    model: ImageTextModel,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    split: str = 'validation',
    protocol: Protocol | None = None,
  ):
    """Chooses the scenes; nothing is computed yet.

    Args:
      config: of the run.
      model: of the run.
      tokenizer: of the run.
      mesh: where the variables live.
      split: 'validation', or 'test' for what no choice has been based on.
      protocol: how pictures are labelled; None for the native one.

    Raises:
      ValueError: the config's scenes or the protocol have a mistake.
    """
    size = tuple(config.model.vision.image_size)
    scenes = build_scenes(config.data.scenes, size, split)
    self.split = split
    self.source = scenes.labelled()
    self.benchmark = scene_benchmark(self.source.classes)
    self.protocol = protocol or native_protocol(size)
    # A scene is composed faster than a thread is woken.
    self.evaluator = Evaluator(
      model, tokenizer, mesh, self.source, self.benchmark, self.protocol, num_threads=0
    )

  def evaluate(
    self, variables: dict, *, provenance: Mapping[str, str] | None = None
  ) -> semantic_seg.Result:
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
    return visualize.draw_panel(rows, self.benchmark.palette, self.benchmark.classes)
