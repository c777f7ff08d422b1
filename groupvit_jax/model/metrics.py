"""Metrics of segmentation and grouping, as sums that merge across steps, devices and hosts.

B images, N tokens, S segments, C classes. Everything but `compute` runs inside jit.
"""

from collections.abc import Sequence
import operator
from typing import NamedTuple

from clu import metrics
import flax
import jax
import jax.numpy as jnp
import numpy as np

_LIMB_BITS = 30  # of the lower half of a count


def label_dtype(num_classes: int) -> np.dtype:
  """The smallest type of labels that holds so many classes and `ignore_label`."""
  return np.dtype(np.uint8 if num_classes <= ignore_label(np.uint8) else np.uint16)


def ignore_label(dtype: np.dtype) -> int:
  """The label of pixels that do not count: the highest of a type, 255 of uint8 and 65535 of uint16."""
  return int(np.iinfo(dtype).max)


class SegmentationScores(NamedTuple):
  """Scores of a confusion matrix; nan marks a class that means leave out."""

  iou: np.ndarray  # [C]
  accuracy: np.ndarray  # [C], recall
  miou: float
  mean_accuracy: float
  pixel_accuracy: float


@flax.struct.dataclass
class ConfusionMatrix(metrics.Metric):
  """Exact counts of (true, predicted) classes, up to 2**61, in two int32 halves because devices have no int64."""

  low: jax.Array  # [C, C], below 2**30
  high: jax.Array  # [C, C], in units of 2**30

  @classmethod
  def empty(cls, num_classes: int) -> 'ConfusionMatrix':
    """No pixels, C classes."""
    zeros = jnp.zeros((num_classes, num_classes), jnp.int32)
    return cls(zeros, zeros)

  @classmethod
  def from_labels(cls, truth: jax.Array, predicted: jax.Array, num_classes: int) -> 'ConfusionMatrix':
    """Counts pixels.

    Args:
      truth: integer labels of any shape with fewer than 2**30 elements; what is no class is not counted.
      predicted: labels of the same shape, integers below `num_classes`.
      num_classes: C.
    """
    truth, predicted = truth.ravel().astype(jnp.int32), predicted.ravel().astype(jnp.int32)
    cell = jnp.where(_counted(truth, num_classes), truth * num_classes + predicted, num_classes**2)
    counts = jnp.zeros(num_classes**2 + 1, jnp.int32).at[cell].add(1)[:-1]
    return cls(counts.reshape(num_classes, num_classes), jnp.zeros((num_classes, num_classes), jnp.int32))

  @classmethod
  def oracle(cls, truth: jax.Array, segments: jax.Array, *, num_segments: int, num_classes: int) -> 'ConfusionMatrix':
    """Counts of perfect naming: each segment [B, H, W] takes the majority label of its pixels in `truth` [B, H, W].

    The distance to the score of the predictions is the loss by naming; the distance to 1 is the loss by grouping.
    """

    def best_names(truth: jax.Array, segments: jax.Array) -> jax.Array:
      weight = _counted(truth, num_classes).astype(jnp.int32)
      overlap = jnp.zeros((num_segments, num_classes), jnp.int32).at[segments, truth].add(weight)
      return overlap.argmax(axis=1)[segments]

    return cls.from_labels(truth, jax.vmap(best_names)(truth.astype(jnp.int32), segments), num_classes)

  def merge(self, other: 'ConfusionMatrix') -> 'ConfusionMatrix':
    """The sum of both, carried."""
    low = self.low + other.low
    return ConfusionMatrix(low & (2**_LIMB_BITS - 1), self.high + other.high + (low >> _LIMB_BITS))

  def counts(self) -> np.ndarray:
    """The matrix [C, C] in int64: rows are true classes, columns predicted ones."""
    return (np.asarray(self.high, np.int64) << _LIMB_BITS) + np.asarray(self.low, np.int64)

  def compute(self) -> SegmentationScores:
    """Scores, with mmsegmentation's conventions.

    A class that is neither true nor predicted has no IoU (nan), one that is never true has no accuracy; means leave
    them out. A class that is predicted but never true has IoU 0, and counts.
    """
    return scores_from_counts(self.counts())


def scores_from_counts(counts: np.ndarray) -> SegmentationScores:
  """Scores of a confusion matrix [C, C], rows true, by the conventions of `ConfusionMatrix`."""
  hits, true, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
  iou = _ratio(hits, true + predicted - hits)
  accuracy = _ratio(hits, true)
  return SegmentationScores(iou, accuracy, _nan_mean(iou), _nan_mean(accuracy), float(_ratio(hits.sum(), counts.sum())))


def best_constant_scores(counts: np.ndarray) -> tuple[int, SegmentationScores]:
  """The class that gives the best mIoU when every pixel is labelled so, and its scores.

  Args:
    counts: confusion matrix [C, C], rows true.
  """
  true = counts.sum(axis=1)
  # The IoU of that class is its share of the pixels, that of others 0; a class without pixels is one more to average.
  miou = true / np.maximum(np.count_nonzero(true) + (true == 0), 1)
  best = int(np.argmax(miou))
  return best, scores_from_counts(np.where(np.arange(len(true)) == best, true[:, None], 0))


def _counted(truth: jax.Array, num_classes: int) -> jax.Array:
  return (truth >= 0) & (truth < num_classes)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """Elementwise quotient, nan where the denominator is 0."""
  return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)


def _nan_mean(values: np.ndarray) -> float:
  values = values[~np.isnan(values)]
  return float(values.mean()) if values.size else float('nan')


@flax.struct.dataclass
class GroupingHealth(metrics.Metric):
  """Whether grouping stages group: sums over images of three metrics per stage.

  In a collapsed stage few segments are used, or one takes almost every token. The loss may still fall.
  """

  entropy: jax.Array  # [stages]
  used: jax.Array  # [stages]
  largest: jax.Array  # [stages]
  count: jax.Array  # []

  @classmethod
  def empty(cls, num_stages: int) -> 'GroupingHealth':
    """No images."""
    zeros = jnp.zeros(num_stages, jnp.float32)
    return cls(zeros, zeros, zeros, jnp.zeros((), jnp.float32))

  @classmethod
  def from_assignments(cls, assignments: Sequence[jax.Array], mask: jax.Array | None = None) -> 'GroupingHealth':
    """Sums over a batch.

    Args:
      assignments: per grouping stage [B, S, N], soft (summing to one over S).
      mask: [B], 1 for an image that counts, 0 for padding; None counts all.
    """
    mask = jnp.ones(assignments[0].shape[0]) if mask is None else mask.astype(jnp.float32)
    per_stage = [_stage_health(soft.astype(jnp.float32)) for soft in assignments]
    entropy, used, largest = ((jnp.stack(f) * mask[None]).sum(axis=1) for f in zip(*per_stage))
    return cls(entropy, used, largest, mask.sum())

  def merge(self, other: 'GroupingHealth') -> 'GroupingHealth':
    """The sums over both."""
    return jax.tree.map(operator.add, self, other)

  def compute(self) -> dict[str, float]:
    """Means over images, `stage<i>/entropy` and so on, stages counted from 1.

    entropy: of a token's soft assignment, in nats, mean over tokens; log(S) is undecided.
    segments_in_use: segments that win at least one token.
    largest_segment: share of the tokens that the largest segment wins.
    """
    names = {'entropy': self.entropy, 'segments_in_use': self.used, 'largest_segment': self.largest}
    return {
      f'stage{i + 1}/{name}': float(total / self.count)
      for name, totals in names.items()
      for i, total in enumerate(np.asarray(totals))
    }


def _stage_health(soft: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Per image [B] of an assignment [B, S, N]: entropy, segments in use, share of the largest."""
  entropy = -jax.scipy.special.xlogy(soft, soft).sum(axis=1).mean(axis=1)
  tokens = jax.nn.one_hot(soft.argmax(axis=1), soft.shape[1]).sum(axis=1)  # [B, S], won by each
  used = (tokens > 0).sum(axis=1).astype(jnp.float32)
  return entropy, used, tokens.max(axis=1) / soft.shape[2]
