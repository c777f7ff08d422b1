"""Caption contrast and multi-label contrast (paper section 3.3), and multi-label contrast with the best segment.

Embeddings come in as the projectors leave them; everything is float32 and over the global batch. The logits of a batch
are never held: blocks of them are computed, reduced along both axes, and computed again in the backward pass.
"""

from collections.abc import Callable
import functools
from typing import Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# Temperatures below 1/100 make training unstable (CLIP, section 2.5).
MAX_SCALE = 100.0

# Of the soft maximum over segments: 0 would be the maximum, a large one the mean.
SEGMENT_TEMPERATURE = 0.1

# How prompts are contrasted with images: `multi_label_loss` and `best_segment_loss` say what differs.
MultiLabel = Literal['pooled', 'pooled_distinct', 'best_segment']

# Stands for a logit that does not count: finite, so that differences of two are no nan.
_NEVER = -1e30

# Columns whose logits with its own rows a device computes at a time.
BLOCK = 256


class ContrastiveLoss(NamedTuple):
  """A contrastive loss and how often the right partner scored highest."""

  loss: jax.Array  # []
  image_to_text_accuracy: jax.Array  # [], in [0, 1]
  text_to_image_accuracy: jax.Array  # [], in [0, 1]


def l2_normalize(x: jax.Array) -> jax.Array:
  """Divides [..., E] by its Euclidean norm, in float32; a zero vector stays zero."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def clamped_scale(log_scale: jax.Array) -> jax.Array:
  """exp of a log temperature, at most 100; no gradient beyond."""
  return jnp.minimum(jnp.exp(log_scale), MAX_SCALE)


def contrastive_loss(
  image_embeds: jax.Array,
  text_embeds: jax.Array,
  log_scale: jax.Array,
  *,
  sharding: NamedSharding | None = None,
  block: int = BLOCK,
) -> ContrastiveLoss:
  """Symmetric InfoNCE over a batch of pairs (paper eqs. 8-9), mean of the two directions.

  It is the multi-label loss of one label an image.

  Args:
    image_embeds: [B, E].
    text_embeds: captions [B, E].
    log_scale: log temperature [].
    sharding: of B over devices; None for one device.
    block: images whose logits a device computes at a time.

  Returns:
    Loss and accuracies.
  """
  return multi_label_loss(image_embeds, text_embeds[:, None], log_scale, sharding=sharding, block=block)


def multi_label_loss(
  image_embeds: jax.Array,
  prompt_embeds: jax.Array,
  log_scale: jax.Array,
  *,
  sharding: NamedSharding | None = None,
  block: int = BLOCK,
) -> ContrastiveLoss:
  """Contrast of images with the prompts made from their captions (paper eqs. 10-11).

  An image's target puts 1/M on each of its own M prompts among all B*M; a prompt's target is its image.

  Args:
    image_embeds: [B, E].
    prompt_embeds: [B, M, E].
    log_scale: log temperature [].
    sharding: of B over devices; None for one device.
    block: images whose logits a device computes at a time.

  Returns:
    Loss (mean of the two directions) and accuracies; image to text counts a hit when the best prompt is any of the
    image's own.

  Raises:
    ValueError: M is 0.
  """
  batch, prompts, width = _check_prompts(prompt_embeds)
  images = clamped_scale(log_scale) * l2_normalize(image_embeds)
  texts = l2_normalize(prompt_embeds)
  own = jnp.einsum('be,bme->bm', images, texts, precision='highest')
  logits = functools.partial(jnp.einsum, 'te,be->tb', precision='highest')
  per_prompt, per_image = _reduce_logits(logits, texts.reshape(-1, width), images, sharding, block)
  image_to_text = (per_image.logsumexp - own.mean(axis=1)).mean()
  text_to_image = (per_prompt.logsumexp.reshape(batch, prompts) - own).mean()
  labels = jnp.arange(batch)
  return ContrastiveLoss(
    (image_to_text + text_to_image) / 2,
    jnp.mean(per_image.best // prompts == labels),
    jnp.mean(per_prompt.best.reshape(batch, prompts) == labels[:, None]),
  )


def best_segment_loss(
  segment_embeds: jax.Array,
  in_use: jax.Array,
  prompt_embeds: jax.Array,
  words: jax.Array,
  log_scale: jax.Array,
  *,
  temperature: float = SEGMENT_TEMPERATURE,
  sharding: NamedSharding | None = None,
  block: int = BLOCK,
) -> ContrastiveLoss:
  """Contrast of prompts with the segment of each image that fits them best; not in the paper.

  The paper's losses see the mean of all segments, so nothing asks that one segment carries a word. Two things differ:

  1. The similarity of image i and prompt t is a soft maximum over the image's segments that own a patch:
     s(i, t) = temperature * logsumexp_k(cos(segment_ik, prompt_t) / temperature).
  2. Prompts of one word are never each other's negatives, and positives do not compete with each other. With N the
     pairs (i, t) in which the word of t is none of the words of image i, and (i, p) an image and a prompt of its own,
     the loss is the mean of softplus(logsumexp_{t: (i, t) in N} scale * s(i, t) - scale * s(i, p)) over all (i, p), and
     of the same with the negatives {j: (j, p) in N} of the prompt.

  With the pooled feature as the only segment it is the second difference alone. The step adds up the losses of all
  grouping stages.

  Args:
    segment_embeds: [B, S, E].
    in_use: bool [B, S], which segments own a patch; at least one per image.
    prompt_embeds: [B, M, E].
    words: ids of the prompts' words [B, M, K], integers; two words are equal when all K are.
    log_scale: log temperature [] of the contrast.
    temperature: of the soft maximum.
    sharding: of B over devices; None for one device.
    block: prompts whose logits a device computes at a time.

  Returns:
    Loss (mean of the two directions) and accuracies: how often a positive scores above all of its negatives.

  Raises:
    ValueError: M is 0.
  """
  batch, prompts, width = _check_prompts(prompt_embeds)
  scale = clamped_scale(log_scale)
  segments, texts = l2_normalize(segment_embeds), l2_normalize(prompt_embeds)

  def logits(rows, columns):
    segments, in_use, own_words, scale = rows
    texts, words = columns
    cosines = jnp.einsum('bse,te->bst', segments, texts, precision='highest')
    positive = (own_words[:, :, None] == words[None, None]).all(axis=-1).any(axis=1)
    return jnp.where(positive, _NEVER, scale[:, None] * _soft_maximum(cosines, in_use, temperature))

  cosines = jnp.einsum('bse,bme->bsm', segments, texts, precision='highest')
  own = scale * _soft_maximum(cosines, in_use, temperature)
  rows = segments, in_use, words, jnp.broadcast_to(scale, batch)
  columns = texts.reshape(-1, width), words.reshape(batch * prompts, -1)
  per_image, per_prompt = _reduce_logits(logits, rows, columns, sharding, block)
  of_prompts = jax.tree.map(lambda x: x.reshape(batch, prompts), per_prompt)
  image_to_text = jax.nn.softplus(per_image.logsumexp[:, None] - own).mean()
  text_to_image = jax.nn.softplus(of_prompts.logsumexp - own).mean()
  return ContrastiveLoss(
    (image_to_text + text_to_image) / 2, jnp.mean(own > per_image.peak[:, None]), jnp.mean(own > of_prompts.peak)
  )


def _soft_maximum(cosines: jax.Array, in_use: jax.Array, temperature: float) -> jax.Array:
  """Soft maximum [B, T] of cosines [B, S, T] over the segments in use [B, S]."""
  return temperature * jax.nn.logsumexp(jnp.where(in_use[:, :, None], cosines / temperature, _NEVER), axis=1)


def _check_prompts(prompt_embeds: jax.Array) -> tuple[int, int, int]:
  """Shape [B, M, E] of prompts, of which there must be some."""
  if prompt_embeds.shape[1] == 0:
    raise ValueError('the multi-label loss needs prompts and got 0 per image; leave it out instead')
  return prompt_embeds.shape


class _Reduced(NamedTuple):
  """Logits reduced along one axis."""

  logsumexp: jax.Array
  peak: jax.Array  # the largest logit
  best: jax.Array  # int32, index of the largest logit, the first of equals


def _reduce_logits(
  logits: Callable, rows: object, columns: object, sharding: NamedSharding | None, block: int
) -> tuple[_Reduced, _Reduced]:
  """Reduces a matrix of logits [R, C] along both axes without holding it.

  Every device gathers the columns and computes their logits with its own rows, block by block.

  Args:
    logits: (rows [r, ...], columns [c, ...]) -> [r, c], float32.
    rows: arrays [R, ...].
    columns: arrays [C, ...].
    sharding: of R and of C over devices; None for one device.
    block: columns whose logits a device computes at a time, at most.

  Returns:
    One value per row [R], one per column [C]. Log-sum-exps alone have a gradient.
  """
  axes = () if sharding is None else sharding.spec[0]

  def reduce_own_rows(rows, columns):
    columns = jax.tree.map(lambda x: lax.all_gather(x, axes, tiled=True), columns) if axes else columns
    first_row = lax.axis_index(axes) * _length(rows) if axes else 0
    size = max(n for n in range(1, block + 1) if _length(columns) % n == 0)
    blocks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), columns)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def reduce_block(first_column, columns):
      found = logits(rows, columns)
      return _reduce(found, 1, first_column), _reduce(found, 0, first_row)

    first_columns = jnp.arange(0, _length(columns), size)
    per_row, per_column = lax.map(lambda inputs: reduce_block(*inputs), (first_columns, blocks))
    return _merge(per_row), jax.tree.map(lambda x: x.reshape(1, -1), per_column)

  if axes:
    spec = PartitionSpec(axes)
    reduce_own_rows = jax.shard_map(reduce_own_rows, mesh=sharding.mesh, in_specs=spec, out_specs=spec)
  per_row, per_column = reduce_own_rows(rows, columns)
  return per_row, _merge(per_column)


def _length(tree: object) -> int:
  return len(jax.tree.leaves(tree)[0])


def _reduce(logits: jax.Array, axis: int, first: jax.Array | int) -> _Reduced:
  """Reduces a block of logits along an axis, whose positions count from `first`."""
  values = lax.stop_gradient(logits)
  return _Reduced(jax.nn.logsumexp(logits, axis), values.max(axis), first + values.argmax(axis).astype(jnp.int32))


def _merge(parts: _Reduced) -> _Reduced:
  """Merges parts [K, n] of the logits, reduced one by one, to [n]."""
  peak = parts.peak.max(axis=0, keepdims=True)
  best = jnp.where(parts.peak == peak, parts.best, jnp.iinfo(jnp.int32).max).min(axis=0)
  return _Reduced(jax.nn.logsumexp(parts.logsumexp, axis=0), peak[0], best)
