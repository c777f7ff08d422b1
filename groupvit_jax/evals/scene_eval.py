"""Held-out embedded scenes of a run: scores and pictures, during training and after it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import numpy as np

from groupvit_jax import sharding
from groupvit_jax.data.scenes import LabelledScenes
from groupvit_jax.data.sources import build_scenes
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.evals import groups, semantic_seg, visualize
from groupvit_jax.evals.benchmarks import Benchmark, make_benchmark
from groupvit_jax.evals.protocols import native_protocol, Protocol
from groupvit_jax.models.image_text import ImageTextModel

_WINDOWS_PER_BATCH = 32


def windows_per_batch(mesh: jax.sharding.Mesh) -> int:
  """Windows that all devices of a mesh encode together."""
  ways = sharding.batch_ways(mesh)
  return -(-_WINDOWS_PER_BATCH // ways) * ways


def scene_benchmark(classes: tuple[str, ...]) -> Benchmark:
  """Scenes as a benchmark: every pixel is one of the classes, there is no background."""
  benchmark = make_benchmark('scenes', classes)
  return dataclasses.replace(benchmark, palette=visualize.spread_palette(len(classes)))


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
    self._model, self._tokenizer, self._mesh = model, tokenizer, mesh

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
    return self._evaluate(variables, self.source, oracle=True, provenance=provenance)

  def pictures(self, variables: dict, count: int = 4) -> np.ndarray:
    """A panel of the first scenes: input, truth, prediction, final and first groups.

    Args:
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      count: scenes, the same ones at every call.

    Returns:
      uint8 [H, W, 3], on every host.
    """
    first = _First(self.source, min(count, len(self.source)))
    labels: dict[str, np.ndarray] = {}
    # Every host labels all of them: with several, each would otherwise hold some rows of the panel.
    note = lambda encoded, found: labels.setdefault(encoded.picture.key, found.labels)
    self._evaluate(variables, _ForEveryHost(first), oracle=False, on_picture=note)
    records = [first[index] for index in range(len(first))]
    images = [record['image'] for record in records]
    grouped = groups.group_maps(
      self._model, variables, images, self.protocol.window, self._mesh
    )
    rows = [
      visualize.Row(record['image'], record['label'], labels[record['key']], maps)
      for record, maps in zip(records, grouped)
    ]
    return visualize.draw_panel(rows, self.benchmark.palette, self.benchmark.classes)

  def _evaluate(
    self, variables: dict, source: semantic_seg.LabelledSource, **options: Any
  ) -> semantic_seg.Result:
    names = self.benchmark.prompt_names(self.protocol.class_names)
    embeds = semantic_seg.embed_classes(
      self._model, variables, self._tokenizer, names, self.protocol.templates
    )
    return semantic_seg.evaluate(
      self._model,
      variables,
      source,
      embeds,
      self.benchmark,
      self.protocol,
      batch_size=windows_per_batch(self._mesh),
      mesh=self._mesh,
      num_threads=0,  # a scene is composed faster than a thread is woken
      **options,
    )


@dataclasses.dataclass(frozen=True)
class _First:
  """The first records of a source."""

  source: LabelledScenes
  count: int

  @property
  def classes(self) -> tuple[str, ...]:
    return self.source.classes

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source[index]


@dataclasses.dataclass(frozen=True)
class _ForEveryHost:
  """A source of which every host's share is all of it."""

  source: _First

  @property
  def classes(self) -> tuple[str, ...]:
    return self.source.classes

  def __len__(self) -> int:
    return len(self.source) * jax.process_count()

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.source[index // jax.process_count()]
