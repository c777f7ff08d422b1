"""Label maps of encoded images, and their confusion matrices, made on the device.

An image is labelled a fixed number of pixels at a time, so one compilation serves images of all sizes, and no map of
pixels x classes exists. Shape letters: K windows of an image, P pixels, H W pixels of a window, S segments, C classes,
E joint embedding, T thresholds.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import enum
import functools
from typing import NamedTuple

import flax
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.eval.window_encoder import EncodedWindows
from groupvit_jax.model import segmentation
from groupvit_jax.model.metrics import ConfusionMatrix, ignore_label, label_dtype
from groupvit_jax.running import sharding

# Labelled at a time: more of them leave a CPU's caches; elsewhere most images take one call.
_MAX_PIXELS = {'cpu': 2**15}
_MAX_PIXELS_ELSEWHERE = 2**19
_MAX_PENDING = 128  # calls in flight, lest a backlog of images fill the memory


class Windows(NamedTuple):
  """An encoded image in arrays of fixed shape; `placement` says how many of the K windows exist."""

  segments: jax.Array  # [K, H, W], uint8; refined [K, H, W, S]
  segment_embeds: jax.Array  # [K, S, E]
  image_embeds: jax.Array  # [K, E]
  placement: segmentation.Placement


class Classes(NamedTuple):
  """The classes to choose from."""

  text_embeds: jax.Array  # [C, E], without the background
  exists: jax.Array  # [C], False for padding
  labels: jax.Array  # [C], int32, label of each; several may be background
  logit_scale: jax.Array  # [], log temperature
  thresholds: jax.Array  # [T], of the background, which is label 0; the first one labels. None without a background


class PixelLabels(NamedTuple):
  """Labels of P pixels of an image."""

  labels: jax.Array  # [P], int32
  scores: jax.Array  # [P], of those labels
  class_scores: jax.Array  # [K, S, C] of the windows' segments, without the background


class LabelMap(NamedTuple):
  """Labels of an image, on the host."""

  labels: np.ndarray  # [H, W], of the benchmark's `label_dtype`
  scores: np.ndarray  # float32 [H, W], of those labels
  class_scores: np.ndarray  # float32 [K, S, C], of the windows' segments, without the background


def _score_pixels(
  windows: Windows, classes: Classes, shares: jax.Array, protocol: Protocol
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Labels and scores [max(T, 1), P], one row per threshold, and class scores [K, S, C]."""
  num_windows = windows.placement.num_windows
  scores = _exists(windows) * segmentation.class_scores(
    windows.image_embeds,
    windows.segment_embeds,
    classes.text_embeds,
    classes.logit_scale,
    class_filter=protocol.class_filter,
    double_softmax=protocol.double_softmax,
    exists=classes.exists,
  )
  background = bool(classes.thresholds.size)
  exists = classes.exists if protocol.final_softmax and not background else None
  labels, best = segmentation.best_classes(shares, scores, num_windows, exists=exists)
  labels, best = classes.labels[labels][None], best[None]
  if background:
    per_window = protocol.threshold_mode == 'window'
    below = segmentation.background_scores(scores, classes.thresholds, per_window=per_window)
    below = segmentation.stitch(shares, below, num_windows)
    labels, best = jnp.where(below >= best, 0, labels), jnp.maximum(below, best)
  return labels, best, scores


def _exists(windows: Windows) -> jax.Array:
  return (jnp.arange(len(windows.segments)) < windows.placement.num_windows)[:, None, None]


def _pixel_shares(windows: Windows, pixels: jax.Array) -> jax.Array:
  """[K, S, P]: the weight of each segment of each window in a pixel."""
  return segmentation.pixel_shares(windows.segments, windows.segment_embeds.shape[1], windows.placement, pixels)


def _shard_labels(labels: PixelLabels, by_pixel: NamedSharding) -> PixelLabels:
  return jax.lax.with_sharding_constraint(labels, PixelLabels(by_pixel, by_pixel, _replicated(by_pixel)))


def _replicated(by_pixel: NamedSharding) -> NamedSharding:
  return NamedSharding(by_pixel.mesh, PartitionSpec())


@functools.partial(jax.jit, static_argnames=('protocol', 'by_pixel'))
def label_pixels(
  windows: Windows,
  classes: Classes,
  pixels: jax.Array,
  offset: jax.Array,
  *,
  protocol: Protocol,
  by_pixel: NamedSharding,
) -> PixelLabels:
  """Labels P pixels of an image.

  Args:
    windows: of the image.
    classes: to choose from.
    pixels: 0..P-1.
    offset: [], the row-major position of the first of these pixels in the image.
    protocol: how labels are chosen; its own threshold is not looked at.
    by_pixel: sharding of pixels.
  """
  labels, scores, class_scores = _score_pixels(windows, classes, _pixel_shares(windows, pixels + offset), protocol)
  return _shard_labels(PixelLabels(labels[0], scores[0], class_scores), by_pixel)


@flax.struct.dataclass
class Counts:
  """Confusion matrices of what this process has labelled."""

  predicted: ConfusionMatrix  # [max(T, 1), C, C], one per threshold
  oracle: ConfusionMatrix  # [C, C], with each segment named by its majority label


class Pass(enum.IntEnum):
  """What `count_pixels` does; an oracle takes two passes over an image, MEASURE and NAME."""

  PREDICT = 0
  MEASURE = 1  # predict, and measure how much of the truth each segment covers
  NAME = 2  # name segments by that measure


class PixelCounts(NamedTuple):
  """What `count_pixels` returns."""

  labels: PixelLabels
  counts: Counts
  overlap: jax.Array  # [K, S, C], pixels of each label in each segment, so far


@functools.partial(jax.jit, static_argnames=('protocol', 'by_pixel'), donate_argnames=('counts', 'overlap'))
def count_pixels(
  counts: Counts,
  overlap: jax.Array,
  windows: Windows,
  classes: Classes,
  pixels: jax.Array,
  offset: jax.Array,
  truth: jax.Array,
  job: jax.Array,
  *,
  protocol: Protocol,
  by_pixel: NamedSharding,
) -> PixelCounts:
  """Labels P pixels of an image as `label_pixels` does, and counts them against the truth.

  Args:
    counts: so far (donated).
    overlap: [K, S, C] so far (donated); zeros at first.
    windows: as for `label_pixels`, like what is not named here.
    classes: likewise.
    pixels: likewise.
    offset: likewise.
    truth: labels [P]; `ignore_label` where there is none.
    job: [], a `Pass`.
    protocol: likewise.
    by_pixel: likewise.
  """
  num_windows, num_labels = windows.placement.num_windows, overlap.shape[2]
  shares = _pixel_shares(windows, pixels + offset)
  count = lambda labels: ConfusionMatrix.from_labels(truth, labels, num_labels)

  def predict() -> PixelCounts:
    labels, scores, class_scores = _score_pixels(windows, classes, shares, protocol)
    measured = jnp.where(job == Pass.MEASURE, num_windows, 0)  # without an oracle no work
    seen = segmentation.segment_overlap(shares, truth, measured, num_labels)
    predicted = counts.predicted.merge(jax.vmap(count)(labels))
    return PixelCounts(
      PixelLabels(labels[0], scores[0], class_scores), counts.replace(predicted=predicted), overlap + seen
    )

  def name_by_majority() -> PixelCounts:
    names = _exists(windows) * jax.nn.one_hot(overlap.argmax(axis=-1), num_labels)
    labels, scores = segmentation.best_classes(shares, names, num_windows)
    oracle = counts.oracle.merge(count(labels))
    class_scores = names[:, :, classes.labels]
    return PixelCounts(PixelLabels(labels, scores, class_scores), counts.replace(oracle=oracle), overlap)

  out = jax.lax.cond(job == Pass.NAME, name_by_majority, predict)
  whole = jax.lax.with_sharding_constraint(out[1:], _replicated(by_pixel))
  return PixelCounts(_shard_labels(out.labels, by_pixel), *whole)


class Labeller:
  """Labels encoded images with classes, on this process's devices."""

  def __init__(
    self,
    protocol: Protocol,
    text_embeds: np.ndarray,
    logit_scale: float,
    mesh: Mesh,
    *,
    thresholds: Sequence[float] = (),
    num_phrases: int = 0,
    capacity: int | None = None,
  ):
    """Puts what every image needs on the devices.

    Args:
      protocol: how labels are chosen.
      text_embeds: [C, E], of the classes but the background, and of phrases that are background.
      logit_scale: log temperature of the model.
      mesh: of all processes.
      thresholds: of the background, which is label 0 and shifts the classes up by one; the first one labels. Without
        any there is no background.
      num_phrases: how many of the last of `text_embeds` are background.
      capacity: classes to compile for, at least C; others of equal capacity need no compilation. None for C.
    """
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    self._by_pixel = NamedSharding(Mesh(np.array(local), ('pixels',)), PartitionSpec('pixels'))
    # Thresholds are data: others need no compilation.
    # Names decide nothing.
    anonymous = dataclasses.replace(protocol, name='', threshold=None, class_names='-')
    self._options = dict(protocol=anonymous, by_pixel=self._by_pixel)
    self._protocol, self._num_classes = protocol, len(text_embeds)
    self._num_labels = len(text_embeds) - num_phrases + bool(thresholds)
    enough = 1 << (protocol.window**2 - 1).bit_length()
    most = _MAX_PIXELS.get(local[0].platform, _MAX_PIXELS_ELSEWHERE)
    self._num_pixels = -(-min(enough, most) // len(local)) * len(local)
    self._pixels = jax.device_put(np.arange(self._num_pixels, dtype=np.int32), self._by_pixel)
    padding = 0 if capacity is None else capacity - len(text_embeds)
    padded = np.pad(text_embeds, ((0, padding), (0, 0)))
    exists = np.arange(len(padded)) < len(text_embeds)
    labels = np.arange(len(padded), dtype=np.int32) + bool(thresholds)
    labels[len(text_embeds) - num_phrases : len(text_embeds)] = 0
    embeds, scale, cuts = (np.asarray(x, np.float32) for x in (padded, logit_scale, thresholds))
    self._classes = self._put(Classes(embeds, exists, labels, scale, cuts))

  def label(self, encoded: EncodedWindows) -> LabelMap:
    """The label map of an image."""
    windows, parts = self._put(self._windows(encoded)), []
    for start in self._starts(encoded):
      parts.append(label_pixels(windows, self._classes, self._pixels, self._put(np.int32(start)), **self._options))
      sharding.synchronize(parts[-1], self._by_pixel.mesh)
    return self._fetch(encoded, parts)

  def _put(self, tree):
    """Replicates arrays on every device of this process."""
    return jax.device_put(tree, _replicated(self._by_pixel))

  def _starts(self, encoded: EncodedWindows) -> range:
    """The positions at which the calls for an image start."""
    return range(0, encoded.image.original[0] * encoded.image.original[1], self._num_pixels)

  def _fetch(self, encoded: EncodedWindows, parts: Sequence[PixelLabels]) -> LabelMap:
    """Labels of consecutive pixels as arrays of the image's size."""
    height, width = encoded.image.original
    whole = lambda arrays: np.concatenate(jax.device_get(arrays))[: height * width].reshape(height, width)
    labels, scores = (whole([getattr(part, name) for part in parts]) for name in ('labels', 'scores'))
    class_scores = np.asarray(parts[0].class_scores)[: len(encoded.segment_embeds), :, : self._num_classes]
    return LabelMap(labels.astype(label_dtype(self._num_labels)), scores, class_scores)

  def _windows(self, encoded: EncodedWindows) -> Windows:
    """Everything of fixed shape: unused windows stay zero, small ones fill the upper left."""
    image, count = encoded.image, len(encoded.segment_embeds)
    slots, side = self._protocol.max_windows, self._protocol.window
    height, width = image.window_size
    found = encoded.segments[self._protocol.refinement]
    segments = np.zeros((slots, side, side, *found[0].shape[2:]), found[0].dtype)
    segments[:count, :height, :width] = found
    pad = lambda rows: np.concatenate([rows, np.zeros((slots - count, *rows[0].shape), np.float32)])
    corners = np.zeros((2, slots), np.int32)
    corners[:, :count] = image.tops, image.lefts
    sizes = (np.array(size, np.int32) for size in (image.window_size, image.resized, image.original))
    placement = segmentation.Placement(*corners, np.int32(count), *sizes)
    return Windows(segments, pad(encoded.segment_embeds), pad(encoded.image_embeds), placement)


class CountingLabeller(Labeller):
  """Labels encoded images, and counts their labels against the truth, for all thresholds at once."""

  def __init__(self, *args, **kwargs):
    """Arguments as for `Labeller`."""
    super().__init__(*args, **kwargs)
    num_thresholds = self._classes.thresholds.size
    zeros = np.zeros((max(num_thresholds, 1), self._num_labels, self._num_labels), np.int32)
    self._counts = self._put(Counts(*(ConfusionMatrix(z, z) for z in (zeros, zeros[0]))))
    self._passes = {job: self._put(np.int32(job)) for job in Pass}
    self._pending: collections.deque[jax.Array] = collections.deque()

  def count(self, encoded: EncodedWindows, truth: np.ndarray, *, oracle: bool, fetch: bool) -> LabelMap | None:
    """Labels an image and counts it.

    Args:
      encoded: the image.
      truth: its labels, uint8 or uint16 [H, W]; `ignore_label` where there is none.
      oracle: whether to count the oracle as well.
      fetch: whether to return the label map; otherwise it stays on the devices.
    """
    windows = self._put(self._windows(encoded))
    overlap = self._put(np.zeros((*windows.segment_embeds.shape[:2], self._num_labels), np.float32))
    parts: list[PixelLabels] = []
    for job in (Pass.MEASURE, Pass.NAME) if oracle else (Pass.PREDICT,):
      for start, part in self._parts(encoded, truth):
        positions = self._pixels, self._put(np.int32(start))
        out = count_pixels(
          self._counts, overlap, windows, self._classes, *positions, part, self._passes[job], **self._options
        )
        sharding.synchronize(out, self._by_pixel.mesh)
        self._counts, overlap = out.counts, out.overlap
        parts.append(out.labels)
        self._wait(out.labels.labels)
    return self._fetch(encoded, parts[: len(self._starts(encoded))]) if fetch else None

  def counts(self) -> tuple[np.ndarray, np.ndarray]:
    """Predicted [max(T, 1), C, C] and oracle [C, C] confusion matrices of all processes, int64; padding included."""
    counts = jax.tree.map(np.asarray, self._counts)
    if jax.process_count() > 1:
      processes = multihost_utils.process_allgather(counts)
      return processes.predicted.counts().sum(axis=0), processes.oracle.counts().sum(axis=0)
    return counts.predicted.counts(), counts.oracle.counts()

  def _parts(self, encoded: EncodedWindows, truth: np.ndarray) -> Iterator[tuple[int, jax.Array]]:
    """The start of each call for an image, and the true labels of its pixels."""
    starts = self._starts(encoded)
    padded = np.full(len(starts) * self._num_pixels, ignore_label(truth.dtype), truth.dtype)
    padded[: truth.size] = truth.ravel()
    for start in starts:
      yield start, jax.device_put(padded[start : start + self._num_pixels], self._by_pixel)

  def _wait(self, labels: jax.Array) -> None:
    """Waits until at most `_MAX_PENDING` calls are in flight."""
    self._pending.append(labels)
    if len(self._pending) > _MAX_PENDING:
      jax.block_until_ready(self._pending.popleft())
