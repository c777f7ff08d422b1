"""Cuts images of any size into windows and encodes these in batches, each once; and the groups of whole images.

Shape letters: B windows or images, H W pixels, N tokens, S segments or groups of a stage, E joint embedding, K windows
of an image.
"""

import collections
from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
from typing import NamedTuple

import cv2
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from groupvit_jax.errors import UserError
from groupvit_jax.eval import pamr
from groupvit_jax.eval.protocols import Pamr, Protocol
from groupvit_jax.model import segmentation
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.metrics import GroupingHealth
from groupvit_jax.running import sharding

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class CutImage:
  """An image cut into windows.

  Attributes:
    key: its name.
    index: its number in its source.
    original: rows and columns before resizing.
    resized: rows and columns after resizing.
    tops: first row of each of the K windows in the resized image.
    lefts: first column of each.
    windows: uint8 [K, H, W, 3].
    label: label map [rows, columns] of the original size, uint8 or uint16; None where there is none.
  """

  key: str
  index: int
  original: tuple[int, int]
  resized: tuple[int, int]
  tops: tuple[int, ...]
  lefts: tuple[int, ...]
  windows: np.ndarray
  label: np.ndarray | None = None

  @property
  def window_size(self) -> tuple[int, int]:
    """Rows and columns of a window."""
    return self.windows.shape[1:3]


def resized_size(height: int, width: int, protocol: Protocol, patch_size: int) -> tuple[int, int]:
  """Rows and columns of an image after resizing.

  The short side becomes `protocol.short_side` unless the long side would pass its bound; the aspect
  ratio is kept, rounded half up as mmcv does. A side never shrinks below one patch. With resize='square' both sides are
  `short_side`.
  """
  if protocol.resize == 'square':
    return protocol.short_side, protocol.short_side
  short, long = sorted((height, width))
  scale = min(protocol.max_long_side / long, protocol.short_side / short)
  rows, columns = (max(int(side * scale + 0.5), patch_size) for side in (height, width))
  return rows, columns


def window_starts(length: int, protocol: Protocol) -> list[int]:
  """First pixel of each window along an axis; the last window is moved back inside."""
  count = protocol.windows_along(length)
  return [min(i * protocol.stride, max(length - protocol.window, 0)) for i in range(count)]


def cut_image(
  image: np.ndarray, protocol: Protocol, patch_size: int, *, key: str, index: int = 0, label: np.ndarray | None = None
) -> CutImage:
  """Resizes an image, uint8 [rows, columns, 3], and cuts it into windows.

  Raises:
    ValueError: the image is not 8-bit RGB, or its label map is of another size.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    raise UserError(f'image {key!r} is {image.dtype} {image.shape}; make it uint8 [H, W, 3]')
  height, width = image.shape[:2]
  if label is not None and label.shape != (height, width):
    raise UserError(f'image {key!r} is {height} x {width} px, its label map {label.shape}; make them one size')
  rows, columns = resized_size(height, width, protocol, patch_size)
  # Published results use OpenCV's bilinear resize; Pillow's bilinear antialiases.
  shrinks = protocol.antialias and rows < height
  resized = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
  starts = [(y, x) for y in window_starts(rows, protocol) for x in window_starts(columns, protocol)]
  side = protocol.window
  windows = np.stack([resized[y : y + side, x : x + side] for y, x in starts])
  tops, lefts = zip(*starts)
  return CutImage(key, index, (height, width), (rows, columns), tops, lefts, windows, label)


class WindowBatch(NamedTuple):
  """What is kept of a batch of windows."""

  segments: tuple[jax.Array, ...]  # per refinement segment of each pixel [B, H, W], uint8; refined: shares [B, H, W, S]
  segment_embeds: jax.Array  # [B, S, E], not normalised
  image_embeds: jax.Array  # [B, E], not normalised
  health: GroupingHealth  # over the windows that are no padding
  num_windows: jax.Array  # [], those windows, of all processes


@functools.partial(jax.jit, static_argnames=('model', 'mesh', 'refinements'))
def encode_windows(
  variables: dict,
  windows: jax.Array,
  mask: jax.Array,
  *,
  model: ImageTextModel,
  mesh: Mesh,
  refinements: tuple[Pamr | None, ...] = (None,),
) -> WindowBatch:
  """Encodes windows uint8 [B, H, W, 3], of which the int32 mask [B] marks padding with 0; sharded like the batch.

  The segments are returned once per refinement, of which None leaves them.
  What is refined are the segments: a class's mask is a weighting of them, and refinement is linear in masks.
  """
  out = model.apply(variables, windows, method='encode_pixels')
  size, patch = windows.shape[1:3], model.vision.patch_size
  affinity = segmentation.token_affinity(out.assignments)
  hard = segmentation.segment_map(affinity, (size[0] // patch, size[1] // patch), size).astype(jnp.uint8)
  masks = lambda: jax.nn.one_hot(hard, affinity.shape[-1])
  segments = tuple(hard if each is None else pamr.refine(masks(), windows, **each._asdict()) for each in refinements)
  health = GroupingHealth.from_assignments(out.assignments, mask)
  constrain = jax.lax.with_sharding_constraint
  by_row = (segments, out.segment_embeds, out.image_embeds)
  return WindowBatch(
    *constrain(by_row, sharding.batch_sharding(mesh)), *constrain((health, mask.sum()), sharding.replicated(mesh))
  )


@dataclasses.dataclass
class EncodedWindows:
  """The encoded windows of an image; it knows no classes yet."""

  image: CutImage
  segments: dict[Pamr | None, list[np.ndarray]]  # per refinement K of [H, W], uint8; refined, K of [H, W, S]
  segment_embeds: list[np.ndarray]  # K of [S, E]
  image_embeds: list[np.ndarray]  # K of [E]
  missing: int  # windows still to come


@dataclasses.dataclass(frozen=True)
class WindowEncoder:
  """Encodes the windows of many images in batches of one size.

  Windows of several images share a batch, and the next batch is dispatched before the last one is fetched. All
  processes run the same batches, each with windows of its own images, until none has any left. An image lower or
  narrower than a window has windows of its own size, which cost a compilation; with several processes they wait until
  the rest is done.

  Attributes:
    model: the model.
    protocol: how images are cut.
    mesh: the devices of all processes.
    batch_size: windows per batch, of all processes.
    refinements: of the segments; None leaves them.
  """

  model: ImageTextModel
  protocol: Protocol
  mesh: Mesh
  batch_size: int
  refinements: tuple[Pamr | None, ...] = (None,)

  def __post_init__(self):
    sharding.check_batch_size('eval batch_size', self.batch_size, self.mesh)

  def encode(self, variables: dict, images: Iterable[CutImage]) -> Iterator[EncodedWindows | GroupingHealth]:
    """Encodes this process's images.

    Yields:
      Encoded images, in about the order in which they came; and the grouping health of each batch.
    """
    batches = _Batches(self, variables)
    square = (self.protocol.window,) * 2
    alone = jax.process_count() == 1
    for image in images:
      batches.add(image)
      size = image.window_size
      while (size == square or alone) and batches.full(size):
        yield from batches.run(size)
    yield from batches.drain(square)
    for size in batches.odd_sizes():
      yield from batches.drain(size)


class _Batches:
  """Windows that wait for a batch, by size, and batches that wait to be fetched."""

  def __init__(self, encoder: WindowEncoder, variables: dict):
    self._refinements = encoder.refinements
    self._encode = functools.partial(
      encode_windows, variables, model=encoder.model, mesh=encoder.mesh, refinements=encoder.refinements
    )
    self._mesh = encoder.mesh
    self._rows = len(sharding.process_local_rows(encoder.batch_size, encoder.mesh))
    self._waiting: dict[Size, list[tuple[EncodedWindows, int]]] = collections.defaultdict(list)
    self._running: collections.deque[tuple[list, WindowBatch]] = collections.deque()

  def add(self, image: CutImage) -> None:
    """Queues the windows of an image."""
    count = len(image.windows)
    segments = {each: [None] * count for each in self._refinements}
    encoded = EncodedWindows(image, segments, [None] * count, [None] * count, count)
    self._waiting[image.window_size] += [(encoded, k) for k in range(count)]

  def full(self, size: Size) -> bool:
    """Whether a batch of windows of that size could run without padding."""
    return len(self._waiting[size]) >= self._rows

  def odd_sizes(self) -> list[Size]:
    """Sizes of the windows that still wait on any process, in an order that all processes share."""
    sizes = sorted(size for size, queue in self._waiting.items() if queue)
    if jax.process_count() == 1:
      return sizes
    most = int(multihost_utils.process_allgather(np.array(len(sizes))).max())
    none = (0, 0)
    padded = np.array([none, *sizes, *[none] * (most - len(sizes))], np.int32)
    everywhere = multihost_utils.process_allgather(padded).reshape(-1, 2)
    return sorted({tuple(size) for size in everywhere.tolist()} - {none})

  def run(self, size: Size) -> Iterator[EncodedWindows | GroupingHealth]:
    """Starts a batch, padded if need be, and fetches the one before."""
    queue = self._waiting[size]
    batch, self._waiting[size] = queue[: self._rows], queue[self._rows :]
    windows = np.zeros((self._rows, *size, 3), np.uint8)
    for row, (encoded, k) in zip(windows, batch):
      row[:] = encoded.image.windows[k]
    mask = (np.arange(self._rows) < len(batch)).astype(np.int32)
    windows, mask = (sharding.make_global_array(rows, self._mesh) for rows in (windows, mask))
    out = self._encode(windows, mask)
    sharding.synchronize(out, self._mesh)
    self._running.append((batch, out))
    if len(self._running) > 1:
      yield from self._fetch()

  def drain(self, size: Size) -> Iterator[EncodedWindows | GroupingHealth]:
    """Runs what waits, padded, until no process has windows of that size; fetches everything."""
    if jax.process_count() == 1:
      while self._waiting[size]:
        yield from self.run(size)
    else:
      # Every process sees the same counts, so all of them stop after the same batch.
      before = None
      while True:
        yield from self.run(size)
        if before is not None and not int(before.num_windows):
          break
        before = self._running[-1][1]
    while self._running:
      yield from self._fetch()

  def _fetch(self) -> Iterator[EncodedWindows | GroupingHealth]:
    """Hands the oldest running batch back to its images."""
    batch, out = self._running.popleft()
    yield jax.tree.map(np.asarray, out.health)
    rows = zip(*map(_local_rows, (*out.segments, out.segment_embeds, out.image_embeds)))
    for (encoded, k), (*segments, segment_embeds, image_embeds) in zip(batch, rows):
      for refinement, segment in zip(self._refinements, segments, strict=True):
        encoded.segments[refinement][k] = segment
      encoded.segment_embeds[k], encoded.image_embeds[k] = segment_embeds, image_embeds
      encoded.missing -= 1
      if not encoded.missing:
        yield encoded


def _local_rows(array: jax.Array) -> np.ndarray:
  """This process's rows of an array sharded over its first axis; copies on other devices are left out."""
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


@functools.partial(jax.jit, static_argnames=('model', 'mesh'))
def encode_groups(variables: dict, images: jax.Array, *, model: ImageTextModel, mesh: Mesh) -> tuple[jax.Array, ...]:
  """Per grouping stage the affinity of tokens to groups [B, N, S], of images uint8 [B, H, W, 3]."""
  out = model.apply(variables, images, method='encode_pixels')
  stages = range(1, len(out.assignments) + 1)
  affinities = tuple(segmentation.token_affinity(out.assignments[:i]) for i in stages)
  return jax.lax.with_sharding_constraint(affinities, sharding.replicated(mesh))


def group_maps(
  model: ImageTextModel, variables: dict, images: Sequence[np.ndarray], window: int, mesh: Mesh
) -> list[tuple[np.ndarray, ...]]:
  """The group of each pixel, per grouping stage, as the paper's figures show them.

  A label map averages overlapping windows, whose groups do not correspond. Here the model sees the whole image at once,
  resized to one window; an image of a window's size has the groups of its label map.

  Args:
    model: the model.
    variables: of the model, on the mesh.
    images: B of uint8 [H, W, 3], of any sizes; the same on every process.
    window: side of the square that images are resized to. Compiled once per B and window.
    mesh: the devices.

  Returns:
    For each image, per grouping stage, uint8 [H, W]; the final segments come last.
  """
  # Area averaging where an image shrinks: bilinear would skip pixels.
  method = lambda image: cv2.INTER_AREA if min(image.shape[:2]) > window else cv2.INTER_LINEAR
  squares = np.stack([cv2.resize(image, (window, window), interpolation=method(image)) for image in images])
  stages = [np.asarray(stage) for stage in encode_groups(variables, squares, model=model, mesh=mesh)]
  side = window // model.vision.patch_size
  return [
    tuple(_upsample(stage[index].reshape(side, side, -1), image.shape[:2]) for stage in stages)
    for index, image in enumerate(images)
  ]


def _upsample(affinity: np.ndarray, size: Size) -> np.ndarray:
  """Argmax of [rows, columns, S], bilinear at `size`, one group at a time: images may be large."""
  best = np.full(size, -np.inf, np.float32)
  groups = np.zeros(size, np.uint8)
  for index in range(affinity.shape[-1]):
    plane = np.ascontiguousarray(affinity[:, :, index])
    plane = cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR)
    groups[plane > best] = index
    np.maximum(best, plane, out=best)
  return groups
