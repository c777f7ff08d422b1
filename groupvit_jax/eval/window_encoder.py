"""Pictures of any size through the encoder in batches of windows, each window once."""

import collections
from collections.abc import Iterable, Iterator
import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
import numpy as np

from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.eval.windows import Picture
from groupvit_jax.model import segmentation
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.metrics import GroupingHealth
from groupvit_jax.model.pixels import normalize_images
from groupvit_jax.running import sharding

Size = tuple[int, int]


class WindowBatch(NamedTuple):
  """What is kept of a batch of windows."""

  segments: jax.Array  # [B, H, W], uint8: segment of each pixel
  segment_embeds: jax.Array  # [B, S, E], not normalised
  image_embeds: jax.Array  # [B, E], not normalised
  health: GroupingHealth  # over the windows that are no padding
  num_windows: jax.Array  # [], those windows, of all hosts


@functools.partial(jax.jit, static_argnames=('model', 'mesh'))
def encode_windows(
  variables: dict, windows: jax.Array, mask: jax.Array, *, model: ImageTextModel, mesh: Mesh
) -> WindowBatch:
  """Segments of a batch of windows.

  Args:
    variables: of the model.
    windows: uint8 [B, H, W, 3].
    mask: int32 [B], 1 for a window, 0 for padding.
    model: the model.
    mesh: over which the batch is divided.

  Returns:
    What is kept, divided like the batch.
  """
  out = model.apply(variables, normalize_images(windows), method='encode_segments')
  size, patch = windows.shape[1:3], model.vision.patch_size
  affinity = segmentation.token_affinity(out.assignments)
  segments = segmentation.segment_map(affinity, (size[0] // patch, size[1] // patch), size)
  health = GroupingHealth.from_assignments(out.assignments, mask)
  return WindowBatch(
    *_constrain((segments.astype(jnp.uint8), out.segment_embeds, out.image_embeds), sharding.batch_sharding(mesh)),
    *_constrain((health, mask.sum()), sharding.replicated(mesh)),
  )


def _constrain(tree: tuple, place: NamedSharding) -> tuple:
  return jax.lax.with_sharding_constraint(tree, place)


@dataclasses.dataclass
class EncodedPicture:
  """A picture of which all windows have been through the encoder; it knows no classes yet."""

  picture: Picture
  segments: list[np.ndarray]  # K of [H, W], uint8
  segment_embeds: list[np.ndarray]  # K of [S, E]
  image_embeds: list[np.ndarray]  # K of [E]
  missing: int  # windows still to come


@dataclasses.dataclass(frozen=True)
class WindowEncoder:
  """Encodes the windows of many pictures in batches of one size.

  Windows of several pictures share a batch, and the next batch is dispatched before the last one is
  fetched. All hosts run the same batches, each with windows of its own pictures, until none has
  any left. A picture lower or narrower than a window has windows of its own size, which cost a
  compilation; with several hosts they wait until the rest is done.

  Attributes:
    model: the model.
    protocol: how pictures are cut.
    mesh: the devices of all hosts.
    batch_size: windows per batch, of all hosts.
  """

  model: ImageTextModel
  protocol: Protocol
  mesh: Mesh
  batch_size: int

  def __post_init__(self):
    sharding.check_batch_size('eval batch_size', self.batch_size, self.mesh)

  def encode(self, variables: dict, pictures: Iterable[Picture]) -> Iterator[EncodedPicture | GroupingHealth]:
    """Encodes this host's pictures.

    Args:
      variables: of the model.
      pictures: cut into windows.

    Yields:
      Pictures, in about the order in which they came; and for each batch its grouping health.
    """
    batches = _Batches(self, variables)
    square = (self.protocol.window,) * 2
    alone = jax.process_count() == 1
    for picture in pictures:
      batches.add(picture)
      size = picture.window_size
      while (size == square or alone) and batches.full(size):
        yield from batches.run(size)
    yield from batches.drain(square)
    for size in batches.odd_sizes():
      yield from batches.drain(size)


class _Batches:
  """Windows that wait for a batch, by size, and batches that wait to be fetched."""

  def __init__(self, encoder: WindowEncoder, variables: dict):
    self._encode = functools.partial(encode_windows, variables, model=encoder.model, mesh=encoder.mesh)
    self._mesh = encoder.mesh
    self._rows = len(sharding.process_local_rows(encoder.batch_size, encoder.mesh))
    self._waiting: dict[Size, list[tuple[EncodedPicture, int]]] = collections.defaultdict(list)
    self._running: collections.deque[tuple[list, WindowBatch]] = collections.deque()

  def add(self, picture: Picture) -> None:
    """Queues the windows of a picture."""
    count = len(picture.windows)
    encoded = EncodedPicture(picture, [None] * count, [None] * count, [None] * count, count)
    self._waiting[picture.window_size] += [(encoded, k) for k in range(count)]

  def full(self, size: Size) -> bool:
    """Whether a batch of windows of that size could run without padding."""
    return len(self._waiting[size]) >= self._rows

  def odd_sizes(self) -> list[Size]:
    """Sizes of the windows that still wait on any host, in an order that all hosts share."""
    sizes = sorted(size for size, queue in self._waiting.items() if queue)
    if jax.process_count() == 1:
      return sizes
    most = int(multihost_utils.process_allgather(np.array(len(sizes))).max())
    none = (0, 0)
    padded = np.array([none, *sizes, *[none] * (most - len(sizes))], np.int32)
    everywhere = multihost_utils.process_allgather(padded).reshape(-1, 2)
    return sorted({tuple(size) for size in everywhere.tolist()} - {none})

  def run(self, size: Size) -> Iterator[EncodedPicture | GroupingHealth]:
    """Starts a batch, padded if need be, and fetches the one before."""
    queue = self._waiting[size]
    jobs, self._waiting[size] = queue[: self._rows], queue[self._rows :]
    windows = np.zeros((self._rows, *size, 3), np.uint8)
    for row, (encoded, k) in zip(windows, jobs):
      row[:] = encoded.picture.windows[k]
    mask = (np.arange(self._rows) < len(jobs)).astype(np.int32)
    windows, mask = (sharding.make_global_array(rows, self._mesh) for rows in (windows, mask))
    batch = self._encode(windows, mask)
    sharding.synchronize(batch, self._mesh)
    self._running.append((jobs, batch))
    if len(self._running) > 1:
      yield from self._fetch()

  def drain(self, size: Size) -> Iterator[EncodedPicture | GroupingHealth]:
    """Runs what waits, padded, until no host has windows of that size; fetches everything."""
    if jax.process_count() == 1:
      while self._waiting[size]:
        yield from self.run(size)
    else:
      # Every host sees the same counts, so all of them stop after the same batch.
      before = None
      while True:
        yield from self.run(size)
        if before is not None and not int(before.num_windows):
          break
        before = self._running[-1][1]
    while self._running:
      yield from self._fetch()

  def _fetch(self) -> Iterator[EncodedPicture | GroupingHealth]:
    """Hands the oldest running batch back to its pictures."""
    jobs, batch = self._running.popleft()
    yield jax.tree.map(np.asarray, batch.health)
    rows = zip(*map(_local_rows, (batch.segments, batch.segment_embeds, batch.image_embeds)))
    for (encoded, k), row in zip(jobs, rows):
      encoded.segments[k], encoded.segment_embeds[k], encoded.image_embeds[k] = row
      encoded.missing -= 1
      if not encoded.missing:
        yield encoded


def _local_rows(array: jax.Array) -> np.ndarray:
  """This host's rows of an array divided over its first axis; copies on other devices are left."""
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
