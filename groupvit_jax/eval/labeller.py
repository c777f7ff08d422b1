"""Label maps of pictures of any size, made and counted on the device.

What has been encoded (window_encoder.py) is turned into labels a fixed number of pixels at a time,
so this is one compilation whatever the pictures' sizes, and no map of picture x classes exists.
"""

import collections
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
from groupvit_jax.eval.window_encoder import EncodedPicture
from groupvit_jax.eval.windows import Picture
from groupvit_jax.model import segmentation
from groupvit_jax.model.metrics import ConfusionMatrix, IGNORE_LABEL
from groupvit_jax.running import sharding

# Labelled at a time: what is made of more of them leaves a CPU's caches; elsewhere a picture is one call.
_MOST_PIXELS = {'cpu': 2**15}
_MOST_PIXELS_ELSEWHERE = 2**19
_MOST_PENDING = 128  # parts that wait for the devices, lest a backlog of pictures fill the memory


@flax.struct.dataclass
class Tally:
  """Confusion matrices of what this host has labelled."""

  predicted: ConfusionMatrix  # [T, C, C], one per threshold
  oracle: ConfusionMatrix  # [C, C], with each segment named by its majority label


class Tables(NamedTuple):
  """What is known of a picture: K windows, of which the placement says how many there are."""

  segments: jax.Array  # [K, H, W], uint8
  segment_embeds: jax.Array  # [K, S, E]
  image_embeds: jax.Array  # [K, E]
  placement: segmentation.Placement


class Classes(NamedTuple):
  """What pictures are labelled with."""

  text_embeds: jax.Array  # [C, E], without the background
  exists: jax.Array  # [C], False for padding
  logit_scale: jax.Array  # [], log temperature
  thresholds: jax.Array  # [T], of the background; the first one labels


class Job(enum.IntEnum):
  """What is done about pixels."""

  PREDICT = 0
  MEASURE = 1  # predict, and measure how much of the truth each segment covers
  NAME = 2  # name segments by that measure


class PixelLabels(NamedTuple):
  """Labels of P pixels of a picture."""

  labels: jax.Array  # [P], int32
  scores: jax.Array  # [P], of those labels
  class_scores: jax.Array  # [K, S, C] of the windows' segments, without the background
  overlap: jax.Array  # [K, S, C], pixels of each label in each segment, so far
  tally: Tally


class Labelled(NamedTuple):
  """Labels of a picture, on the devices."""

  picture: Picture
  labels: list[jax.Array]  # of [P], row-major
  scores: list[jax.Array]  # likewise
  class_scores: jax.Array  # [K, S, C], without the background, with padding


class LabelMap(NamedTuple):
  """Labels of a picture, on the host."""

  labels: np.ndarray  # uint8 [H, W]
  scores: np.ndarray  # float32 [H, W], of those labels
  class_scores: np.ndarray  # float32 [K, S, C], of the windows' segments, without the background


@functools.partial(jax.jit, static_argnames=('protocol', 'background', 'place'), donate_argnames=('tally', 'overlap'))
def label_pixels(
  tally: Tally,
  overlap: jax.Array,
  tables: Tables,
  classes: Classes,
  pixels: jax.Array,
  offset: jax.Array,
  truth: jax.Array,
  job: jax.Array,
  *,
  protocol: Protocol,
  background: bool,
  place: NamedSharding,
) -> PixelLabels:
  """Labels some pixels of a picture and counts them.

  For the oracle there are two passes over a picture, `Job.MEASURE` and `Job.NAME`, both of which count.

  Args:
    tally: counts so far (donated).
    overlap: [K, S, C] so far (donated); zeros at first.
    tables: of the picture.
    classes: to choose from.
    pixels: 0..P-1.
    offset: [], where the first of these pixels lies in the picture, row-major.
    truth: labels [P], 255 where there is none.
    job: [], a `Job`.
    protocol: how labels are chosen; its own threshold is not looked at.
    background: whether class 0 is the background.
    place: sharding of pixels.

  Returns:
    Labels, and both counts.
  """
  num_slots, num_segments, num_classes = overlap.shape
  num_windows = tables.placement.num_windows
  exists = (jnp.arange(num_slots) < num_windows)[:, None, None]
  shares = segmentation.pixel_shares(tables.segments, num_segments, tables.placement, pixels + offset)
  count = lambda labels: ConfusionMatrix.from_labels(truth, labels, num_classes)

  def predict() -> PixelLabels:
    scores = exists * segmentation.class_scores(
      tables.image_embeds,
      tables.segment_embeds,
      classes.text_embeds,
      classes.logit_scale,
      class_filter=protocol.class_filter,
      double_softmax=protocol.double_softmax,
      exists=classes.exists,
    )
    labels, best = segmentation.best_classes(shares, scores, num_windows)
    labels, best = labels[None], best[None]
    if background:
      per_window = protocol.threshold_mode == 'window'
      below = segmentation.background_scores(scores, classes.thresholds, per_window=per_window)
      below = segmentation.stitch(shares, below, num_windows)
      labels, best = jnp.where(below >= best, 0, labels + 1), jnp.maximum(below, best)
    measured = jnp.where(job == Job.MEASURE, num_windows, 0)  # without an oracle no work
    seen = segmentation.segment_overlap(shares, truth, measured, num_classes)
    predicted = tally.predicted.merge(jax.vmap(count)(labels))
    counted = tally.replace(predicted=predicted)
    return PixelLabels(labels[0], best[0], scores, overlap + seen, counted)

  def name_by_majority() -> PixelLabels:
    names = exists * jax.nn.one_hot(overlap.argmax(axis=-1), num_classes)
    labels, best = segmentation.best_classes(shares, names, num_windows)
    counted = tally.replace(oracle=tally.oracle.merge(count(labels)))
    return PixelLabels(labels, best, names[:, :, background:], overlap, counted)

  out = jax.lax.cond(job == Job.NAME, name_by_majority, predict)
  whole = NamedSharding(place.mesh, PartitionSpec())
  places = PixelLabels(place, place, whole, whole, whole)
  return jax.lax.with_sharding_constraint(out, _spread(places, out))


def _spread(places: PixelLabels, out: PixelLabels) -> PixelLabels:
  """One sharding per array."""
  return PixelLabels(*(jax.tree.map(lambda _, place=place: place, part) for place, part in zip(places, out)))


class Segmenter:
  """Labels encoded pictures and counts, on this host's devices."""

  def __init__(
    self,
    protocol: Protocol,
    text_embeds: np.ndarray,
    logit_scale: float,
    *,
    background: bool,
    thresholds: tuple[float, ...],
    mesh: Mesh,
    capacity: int | None = None,
  ):
    """Places what every picture needs.

    Args:
      protocol: how labels are chosen.
      text_embeds: [C, E], of the classes but the background.
      logit_scale: log temperature of the model.
      background: whether class 0 is the background, and the others shift up by one.
      thresholds: of the background; the first one labels, the others are only counted.
      mesh: of all hosts.
      capacity: classes to compile for, at least C; others of equal capacity need no compilation.
        None for C.
    """
    local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    mesh = Mesh(np.array(local), ('pixels',))
    self._by_pixel = NamedSharding(mesh, PartitionSpec('pixels'))
    self._whole = NamedSharding(mesh, PartitionSpec())
    padding = 0 if capacity is None else capacity - len(text_embeds)
    self._protocol, self._num_words = protocol, len(text_embeds)
    self._num_labels = len(text_embeds) + padding + background
    enough = 1 << (protocol.window**2 - 1).bit_length()
    most = _MOST_PIXELS.get(local[0].platform, _MOST_PIXELS_ELSEWHERE)
    self._num_pixels = -(-min(enough, most) // len(local)) * len(local)
    self._pixels = jax.device_put(np.arange(self._num_pixels, dtype=np.int32), self._by_pixel)
    padded = np.pad(text_embeds, ((0, padding), (0, 0)))
    exists = np.arange(len(padded)) < len(text_embeds)
    embeds, scale, cuts = (np.asarray(x, np.float32) for x in (padded, logit_scale, thresholds))
    self._classes = self._put(Classes(embeds, exists, scale, cuts))
    self._pending: collections.deque[jax.Array] = collections.deque()
    self._jobs = {job: self._put(np.int32(job)) for job in Job}
    self._label = functools.partial(
      label_pixels,
      # Thresholds are data: others need no compilation.
      protocol=dataclasses.replace(protocol, threshold=None),
      background=background,
      place=self._by_pixel,
    )
    zeros = np.zeros((len(thresholds), self._num_labels, self._num_labels), np.int32)
    self._tally = self._put(Tally(*(ConfusionMatrix(z, z) for z in (zeros, zeros[0]))))

  def _put(self, tree):
    """Places arrays whole on every device of this host."""
    return jax.device_put(tree, self._whole)

  def label(self, encoded: EncodedPicture, *, oracle: bool) -> Labelled:
    """Labels a picture, part by part, and counts it.

    Args:
      encoded: the picture.
      oracle: whether to count the oracle as well; needs a label map.

    Returns:
      What `fetch` brings home.
    """
    picture = encoded.picture
    size = picture.original[0] * picture.original[1]
    starts = range(0, size, self._num_pixels)
    truth = np.full(len(starts) * self._num_pixels, IGNORE_LABEL, np.uint8)
    if picture.label is not None:
      truth[:size] = picture.label.ravel()
    tables = self._put(self._tables(encoded))
    slots = tables.segment_embeds.shape[:2]
    overlap = self._put(np.zeros((*slots, self._num_labels), np.float32))
    parts: list[PixelLabels] = []
    for job in (Job.MEASURE, Job.NAME) if oracle else (Job.PREDICT,):
      for start in starts:
        part = jax.device_put(truth[start : start + self._num_pixels], self._by_pixel)
        out = self._label(
          self._tally, overlap, tables, self._classes, self._pixels, self._put(np.int32(start)), part, self._jobs[job]
        )
        sharding.synchronize(out, self._whole.mesh)
        self._tally, overlap = out.tally, out.overlap
        parts.append(out)
        self._pending.append(out.labels)
        if len(self._pending) > _MOST_PENDING:
          jax.block_until_ready(self._pending.popleft())
    first = parts[: len(starts)]
    return Labelled(picture, [p.labels for p in first], [p.scores for p in first], first[0].class_scores)

  def fetch(self, labelled: Labelled) -> LabelMap:
    """What `label` returned, as arrays of the picture's size on the host."""
    height, width = labelled.picture.original
    whole = lambda parts: np.concatenate(jax.device_get(parts))[: height * width]
    return LabelMap(
      whole(labelled.labels).astype(np.uint8).reshape(height, width),
      whole(labelled.scores).reshape(height, width),
      np.asarray(labelled.class_scores)[: len(labelled.picture.windows), :, : self._num_words],
    )

  def counts(self) -> tuple[np.ndarray, np.ndarray]:
    """Predicted [T, C, C] and oracle [C, C] confusion matrices of all hosts, int64; padding included."""
    tally = jax.tree.map(np.asarray, self._tally)
    if jax.process_count() > 1:
      hosts = multihost_utils.process_allgather(tally)
      return hosts.predicted.counts().sum(axis=0), hosts.oracle.counts().sum(axis=0)
    return tally.predicted.counts(), tally.oracle.counts()

  def _tables(self, encoded: EncodedPicture) -> Tables:
    """Everything of fixed shape: unused windows stay zero, small ones fill the upper left."""
    picture, count = encoded.picture, len(encoded.segments)
    slots, side = self._protocol.max_windows, self._protocol.window
    height, width = picture.window_size
    segments = np.zeros((slots, side, side), np.uint8)
    segments[:count, :height, :width] = encoded.segments
    embeds = [
      np.concatenate([found, np.zeros((slots - count, *found[0].shape), np.float32)])
      for found in (encoded.segment_embeds, encoded.image_embeds)
    ]
    corners = np.zeros((2, slots), np.int32)
    corners[:, :count] = picture.tops, picture.lefts
    sizes = (picture.window_size, picture.resized, picture.original)
    placement = segmentation.Placement(
      corners[0], corners[1], np.int32(count), *(np.array(size, np.int32) for size in sizes)
    )
    return Tables(segments, *embeds, placement)
