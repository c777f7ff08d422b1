"""A model's label maps of one set of labelled pictures: scores, and what the pictures look like."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import jax
import numpy as np

from groupvit_jax.data.images import read_image
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.eval import draw, groups, semantic_seg
from groupvit_jax.eval.benchmarks import Benchmark
from groupvit_jax.eval.labelled import Subset
from groupvit_jax.eval.labeller import LabelMap
from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.eval.window_encoder import EncodedPicture
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.running import sharding

_WINDOWS_PER_DEVICE = 32
_PIXELS_ON_A_CPU = 4 * 448**2  # of a device's windows: of more of them a picture takes no less time


def windows_per_batch(mesh: jax.sharding.Mesh, window: int) -> int:
  """Windows of a side that all devices of a mesh encode together."""
  each = _WINDOWS_PER_DEVICE
  if mesh.devices.flat[0].platform == 'cpu':
    each = min(each, max(1, _PIXELS_ON_A_CPU // window**2))
  return each * sharding.data_parallel_size(mesh)


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Scores a model on labelled pictures, as often as asked for. Compiles at the first call only.

  Attributes:
    model: the model.
    tokenizer: of the model.
    mesh: where the variables live.
    source: the pictures.
    benchmark: their classes.
    protocol: how they are labelled.
    num_threads: threads that decode and resize ahead of the devices; 0 for pictures that need neither.
    thresholds: further background thresholds, counted along.
  """

  model: ImageTextModel
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  source: semantic_seg.LabelledSource
  benchmark: Benchmark
  protocol: Protocol
  num_threads: int
  thresholds: tuple[float, ...] = ()

  def evaluate(
    self,
    variables: dict,
    *,
    on_picture: Callable[[EncodedPicture, LabelMap], None] | None = None,
    provenance: Mapping[str, str] | None = None,
  ) -> semantic_seg.Result:
    """Labels and scores all pictures; the same result on every host.

    Args:
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      on_picture: called with every picture of this host and its label map.
      provenance: what else to name in the result.

    Returns:
      The result; `.scalars()` for logs, `.table()` and `.to_json()` for people.
    """
    return self._evaluate(
      variables, self.source, oracle=True, thresholds=self.thresholds, on_picture=on_picture, provenance=provenance
    )

  def rows(self, variables: dict, indices: Sequence[int]) -> list[draw.Row]:
    """What there is to see of some pictures: input, truth, prediction, groups; the same on every host.

    Args:
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      indices: which pictures.
    """
    labels: dict[str, np.ndarray] = {}
    # Every host labels all of them: with several, each would otherwise hold some rows.
    everywhere = Subset(self.source, tuple(np.repeat(indices, jax.process_count()).tolist()))
    note = lambda encoded, found: labels.setdefault(encoded.picture.key, found.labels)
    self._evaluate(variables, everywhere, oracle=False, on_picture=note)
    records = [self.source[index] for index in indices]
    images = [read_image(record['image'], record['key']) for record in records]
    grouped = groups.group_maps(self.model, variables, images, self.protocol.window, self.mesh)
    return [
      draw.Row(image, record['label'], labels[record['key']], maps)
      for record, image, maps in zip(records, images, grouped)
    ]

  def panel(self, variables: dict, count: int = 4) -> np.ndarray:
    """A panel of pictures, spread evenly: input, truth, prediction, final and first groups.

    Args:
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      count: of pictures, the same ones at every call.

    Returns:
      uint8 [H, W, 3], on every host.
    """
    chosen = np.linspace(0, len(self.source) - 1, min(count, len(self.source))).round().astype(int).tolist()
    return draw.draw_panel(self.rows(variables, chosen), self.benchmark.palette, self.benchmark.classes)

  def _evaluate(self, variables: dict, source: semantic_seg.LabelledSource, **options: object) -> semantic_seg.Result:
    names = self.benchmark.prompt_names(self.protocol.class_names)
    embeds = semantic_seg.embed_classes(self.model, variables, self.tokenizer, names, self.protocol.templates)
    return semantic_seg.evaluate(
      self.model,
      variables,
      source,
      embeds,
      self.benchmark,
      self.protocol,
      batch_size=windows_per_batch(self.mesh, self.protocol.window),
      mesh=self.mesh,
      num_threads=self.num_threads,
      **options,
    )
