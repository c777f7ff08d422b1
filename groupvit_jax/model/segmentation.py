"""From soft assignments to label maps: pure functions of arrays (paper section 4.3).

B windows, H W pixels, N tokens, S segments, C classes, E joint embedding; P pixels and K windows of an image. Every
matmul runs at the highest precision, because the results decide argmaxes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_LOGIT_SCALE = 100.0
_HIGHEST = jax.lax.Precision.HIGHEST
_SOFTMAX_TIES = 1e-6  # scores further apart stay so in a float32 softmax


class Placement(NamedTuple):
  """Positions of the windows of one image; integers, so that one compilation serves all images."""

  tops: jax.Array  # [K], first row of each window in the resized image
  lefts: jax.Array  # [K]
  num_windows: jax.Array  # [], at most K: those that exist
  window: jax.Array  # [2], rows and columns of a window
  resized: jax.Array  # [2], rows and columns of the image the windows were cut from
  original: jax.Array  # [2], rows and columns of the original image


def token_affinity(assignments: Sequence[jax.Array]) -> jax.Array:
  """Affinity of each patch token to each final segment: the product of the stages' assignments.

  Args:
    assignments: per grouping stage [B, S_i, N_i], soft; N_i = S_(i-1).

  Returns:
    [B, N, S], rows sum to one where assignments sum to one over segments.
  """
  affinity = jnp.swapaxes(assignments[0], 1, 2).astype(jnp.float32)
  for assignment in assignments[1:]:
    affinity = jnp.einsum('bng,bsg->bns', affinity, assignment, precision=_HIGHEST)
  return affinity


def segments_in_use(assignments: Sequence[jax.Array]) -> jax.Array:
  """Which final segments own a patch, bool [B, S]: a patch belongs to the one with the highest affinity.

  Args:
    assignments: as for `token_affinity`.
  """
  affinity = token_affinity(assignments)
  return jax.nn.one_hot(jnp.argmax(affinity, axis=-1), affinity.shape[-1], dtype=bool).any(axis=1)


def interpolation_taps(
  index: jax.Array, size_in: int | jax.Array, size_out: int | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The two samples that bilinear interpolation (half-pixel centres) mixes at each output position.

  Integer arithmetic keeps the weights exact in images of many thousand pixels.

  Args:
    index: output positions, int32.
    size_in: samples in.
    size_out: samples out; size_in * size_out must stay below 2**30.

  Returns:
    Lower sample, upper sample, and the weight of the upper one, each shaped like `index`.
  """
  numerator = jnp.maximum((2 * index + 1) * size_in - size_out, 0)
  low = numerator // (2 * size_out)
  weight = (numerator % (2 * size_out)).astype(jnp.float32) / (2 * size_out)
  return low, jnp.minimum(low + 1, size_in - 1), weight


def interpolation_matrix(size_in: int, size_out: int) -> jax.Array:
  """Weights [size_out, size_in] of bilinear interpolation along one axis."""
  low, high, weight = interpolation_taps(jnp.arange(size_out), size_in, size_out)
  lower = jax.nn.one_hot(low, size_in) * (1 - weight)[:, None]
  return lower + jax.nn.one_hot(high, size_in) * weight[:, None]


def segment_map(affinity: jax.Array, grid: tuple[int, int], size: tuple[int, int]) -> jax.Array:
  """The segment that each pixel belongs to: bilinear to the window, then the argmax.

  Args:
    affinity: [B, N, S].
    grid: rows and columns of the patch grid, N in all.
    size: H, W of the window.

  Returns:
    Segment indices [B, H, W], int32.
  """
  maps = affinity.reshape(affinity.shape[0], *grid, affinity.shape[-1])
  rows, columns = (interpolation_matrix(g, s) for g, s in zip(grid, size))
  maps = jnp.einsum('hi,bijs->bhjs', rows, maps, precision=_HIGHEST)
  maps = jnp.einsum('wj,bhjs->bhws', columns, maps, precision=_HIGHEST)
  return jnp.argmax(maps, axis=-1).astype(jnp.int32)


def normalize(embeds: jax.Array) -> jax.Array:
  """Unit vectors along the last axis, in float32; a zero vector stays zero."""
  embeds = embeds.astype(jnp.float32)
  return embeds / jnp.maximum(jnp.linalg.norm(embeds, axis=-1, keepdims=True), 1e-12)


def class_scores(
  image_embeds: jax.Array,
  segment_embeds: jax.Array,
  text_embeds: jax.Array,
  logit_scale: jax.Array,
  *,
  class_filter: int | None,
  double_softmax: bool,
  exists: jax.Array | None = None,
) -> jax.Array:
  """Probabilities of the classes for each segment of each window.

  With a class filter and double softmax: `softmax(filtered logits) * softmax(logits)`. The filter keeps the classes
  that fit the pooled feature best.

  Args:
    image_embeds: pooled feature [B, E].
    segment_embeds: [B, S, E].
    text_embeds: class embeddings [C, E].
    logit_scale: log temperature []; its exponential is clamped at 100.
    class_filter: classes kept per window, None for all.
    double_softmax: whether the filtered softmax is multiplied by the unfiltered one.
    exists: [C], False for padding, which scores 0 as if it were not there; None when all do.

  Returns:
    [B, S, C], float32.
  """
  text = normalize(text_embeds)
  scale = jnp.minimum(jnp.exp(logit_scale.astype(jnp.float32)), MAX_LOGIT_SCALE)
  logits = scale * jnp.einsum('bse,ce->bsc', normalize(segment_embeds), text, precision=_HIGHEST)
  if exists is not None:
    logits = jnp.where(exists[None, None], logits, -jnp.inf)
  kept = logits
  if class_filter is not None:
    num_classes = text.shape[0]
    pooled = jnp.einsum('be,ce->bc', normalize(image_embeds), text, precision=_HIGHEST)
    if exists is not None:
      pooled = jnp.where(exists[None], pooled, -jnp.inf)
    _, best = jax.lax.top_k(pooled, min(class_filter, num_classes))
    keep = jax.nn.one_hot(best, num_classes).sum(axis=1) > 0
    kept = jnp.where(keep[:, None, :], logits, -jnp.inf)
  scores = jax.nn.softmax(kept, axis=-1)
  return scores * jax.nn.softmax(logits, axis=-1) if double_softmax else scores


def background_scores(scores: jax.Array, thresholds: jax.Array, *, per_window: bool) -> jax.Array:
  """The background's score for each segment, one column per threshold.

  Per window (as in the paper) it is 1 where the segment's best score is below min(threshold, best score in the window)
  and else 0. Otherwise it is the threshold: background wins where the best class stays below it.

  Args:
    scores: [B, S, C].
    thresholds: [T].
    per_window: which of the two.

  Returns:
    [B, S, T], float32.
  """
  # Computed once: fused into both sides of the comparison, a score might not equal itself.
  best = jax.lax.optimization_barrier(scores.max(axis=-1))
  if not per_window:
    return jnp.broadcast_to(thresholds.astype(jnp.float32), (*best.shape, thresholds.shape[0]))
  bound = jnp.minimum(thresholds[None, None, :], best.max(axis=-1)[:, None, None])
  return (best[:, :, None] < bound).astype(jnp.float32)


def pixel_shares(segments: jax.Array, num_segments: int, placement: Placement, pixels: jax.Array) -> jax.Array:
  """Share of each (window, segment) pair in each pixel of an image.

  Summing windows, dividing by their number and bilinear resizing are linear in the windows' scores. So a pixel is a
  weighting of (window, segment) pairs, and no map of image x classes exists.

  Args:
    segments: segment of each pixel of each window [K, H, W], integers, or each segment's share in it [K, H, W, S]; a
      smaller window fills the upper left.
    num_segments: S.
    placement: of the windows.
    pixels: row-major positions [P] in the original image; those beyond its end repeat others.

  Returns:
    Weights [K, S, P], float32, that sum to one for each pixel; uninitialised for windows that do not exist.
  """
  neighbours = _neighbours(placement, pixels)

  def locate(k: jax.Array, y: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    row, column = y - placement.tops[k], x - placement.lefts[k]
    rows, columns = placement.window[0], placement.window[1]
    return (row >= 0) & (row < rows) & (column >= 0) & (column < columns), row, column

  def count(k: jax.Array, covers: list[jax.Array]) -> list[jax.Array]:
    return [cover + locate(k, y, x)[0] for cover, (y, x, _) in zip(covers, neighbours)]

  def add(k: jax.Array, shares: jax.Array) -> jax.Array:
    window = jnp.zeros((num_segments, pixels.shape[0]), jnp.float32)
    for (y, x, weight), cover in zip(neighbours, covers):
      inside, row, column = locate(k, y, x)
      segment = segments.at[k, row, column].get(mode='clip')
      member = jax.nn.one_hot(segment, num_segments, axis=0) if segments.ndim == 3 else segment.T
      window += member * jnp.where(inside, weight / cover, 0)[None]
    return shares.at[k].set(window)

  covers = [jnp.zeros(pixels.shape, jnp.int32)] * len(neighbours)
  covers = jax.lax.fori_loop(0, placement.num_windows, count, covers)
  shares = jax.lax.empty((segments.shape[0], num_segments, pixels.shape[0]), jnp.float32)
  return jax.lax.fori_loop(0, placement.num_windows, add, shares)


def stitch(shares: jax.Array, scores: jax.Array, num_windows: jax.Array) -> jax.Array:
  """Class scores of pixels: shares [K, S, P] and scores [K, S, C] of K windows -> [C, P]."""

  def add(k: jax.Array, total: jax.Array) -> jax.Array:
    return total + jnp.einsum('sc,sp->cp', scores[k], shares[k], precision=_HIGHEST)

  total = jnp.zeros((scores.shape[2], shares.shape[2]), jnp.float32)
  return jax.lax.fori_loop(0, num_windows, add, total)


def best_classes(
  shares: jax.Array, scores: jax.Array, num_windows: jax.Array, *, exists: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Argmax and maximum over classes of `stitch`, computed a few classes at a time.

  Classes that score nowhere in the image are skipped: the class filter leaves 5 per window, and the cost is
  pixels x classes.

  Args:
    shares: [K, S, P].
    scores: [K, S, C], not negative; zeros for windows that do not exist.
    num_windows: [], those that do.
    exists: [C], classes that are no padding. If given, the argmax is that of the classes' softmax in float32, as in the
      published procedure: scores closer than about 1e-7 are equal there.

  Returns:
    Labels [P], int32, the first of several best ones, and their scores [P].
  """
  at_once = 8
  scored = (scores > 0).any(axis=(0, 1))
  order = jnp.argsort(~scored, stable=True).astype(jnp.int32)
  order = jnp.concatenate([order, jnp.zeros(-scores.shape[2] % at_once, order.dtype)])
  blocks = (scored.sum() + at_once - 1) // at_once

  def over_classes(visit: Callable[[tuple, jax.Array, jax.Array], tuple], start: tuple) -> tuple:
    """Folds `visit` over the classes that score somewhere, and their scores [P]; others score -inf."""

    def block(i: jax.Array, found: tuple) -> tuple:
      classes = jax.lax.dynamic_slice_in_dim(order, i * at_once, at_once)
      inside = i * at_once + jnp.arange(at_once) < scored.sum()
      totals = jnp.where(inside[:, None], stitch(shares, scores[:, :, classes], num_windows), -jnp.inf)
      for label, total in zip(classes, totals):
        found = visit(found, label, total)
      return found

    return jax.lax.fori_loop(0, blocks, block, start)

  zeros = jnp.zeros(shares.shape[2])
  labels, best, second = over_classes(_improve, (zeros.astype(jnp.int32), zeros, zeros))
  if exists is None:
    return labels, best
  others = exists & ~scored  # these score 0 everywhere

  def softmax_labels() -> jax.Array:
    rest = others.sum() * jnp.exp(-best)
    (total,) = over_classes(lambda found, _, score: (found[0] + jnp.exp(score - best),), (rest,))
    probability = lambda score: jnp.exp(score - best) / total
    found = over_classes(lambda found, label, score: _improve(found, label, probability(score)), (labels, zeros, zeros))
    other = jnp.argmax(others)
    tied = others.any() & (probability(0) == found[1]) & (other < found[0])
    return jnp.where(tied, other, found[0]).astype(jnp.int32)

  close = (best - second < _SOFTMAX_TIES).any()
  return jax.lax.cond(close, softmax_labels, lambda: labels), best


def _improve(found: tuple[jax.Array, ...], label: jax.Array, score: jax.Array) -> tuple[jax.Array, ...]:
  """Labels, best and second-best scores, each [P], after another class of a higher label."""
  labels, best, second = found
  better = score > best
  second = jnp.maximum(second, jnp.where(better, best, score))
  return jnp.where(better, label, labels), jnp.maximum(best, score), second


def segment_overlap(shares: jax.Array, truth: jax.Array, num_windows: jax.Array, num_classes: int) -> jax.Array:
  """Number of pixels of each label in each segment.

  Args:
    shares: [K, S, P].
    truth: labels [P]; those that are no class are left out.
    num_windows: [], windows that exist.
    num_classes: C.

  Returns:
    [K, S, C], float32.
  """

  def add(k: jax.Array, overlap: jax.Array) -> jax.Array:
    per_class = jnp.zeros((num_classes, shares.shape[1])).at[truth].add(shares[k].T, mode='drop')
    return overlap.at[k].set(per_class.T)

  overlap = jnp.zeros((*shares.shape[:2], num_classes))
  return jax.lax.fori_loop(0, num_windows, add, overlap)


def _neighbours(placement: Placement, pixels: jax.Array) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
  """Rows, columns and weights of the four resized pixels that each original pixel mixes."""
  height, width = placement.original[0], placement.original[1]
  y = jnp.minimum(pixels // width, height - 1)
  top, bottom, down = interpolation_taps(y, placement.resized[0], height)
  left, right, across = interpolation_taps(pixels % width, placement.resized[1], width)
  rows = ((top, 1 - down), (bottom, down))
  columns = ((left, 1 - across), (right, across))
  return [(row, column, a * b) for row, a in rows for column, b in columns]
