"""The two losses of GroupViT: caption contrast and multi-label contrast (paper section 3.3).

Embeddings come in as the projectors leave them; everything is float32 and over the global batch. The logits of a
batch are never held, only a block of them: see `streamed_logits`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from groupvit_jax.model import streamed_logits

# Temperatures below 1/100 make training unstable (CLIP, section 2.5).
MAX_SCALE = 100.0

# Texts whose logits a device computes at a time. Larger blocks are no faster: this fills a matrix unit many times.
BLOCK = 1024


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
  place: NamedSharding | None = None,
  block: int = BLOCK,
) -> ContrastiveLoss:
  """Symmetric InfoNCE over a batch of pairs (paper eqs. 8-9), mean of the two directions.

  It is the multi-label loss of one label an image.

  Args:
    image_embeds: [B, E].
    text_embeds: captions [B, E].
    log_scale: log temperature [].
    place: how B is divided over devices; None when there is but one.
    block: texts whose logits a device computes at a time.

  Returns:
    Loss and accuracies.
  """
  return multi_label_loss(image_embeds, text_embeds[:, None], log_scale, place=place, block=block)


def multi_label_loss(
  image_embeds: jax.Array,
  prompt_embeds: jax.Array,
  log_scale: jax.Array,
  *,
  place: NamedSharding | None = None,
  block: int = BLOCK,
) -> ContrastiveLoss:
  """Contrast of images with the prompts made from their captions (paper eqs. 10-11).

  An image's target puts 1/M on each of its own M prompts among all B*M; a prompt's target is its image.

  Args:
    image_embeds: [B, E].
    prompt_embeds: [B, M, E].
    log_scale: log temperature [].
    place: how B is divided over devices; None when there is but one.
    block: prompts whose logits a device computes at a time.

  Returns:
    Loss (mean of the two directions) and accuracies; image to text counts a hit when the best prompt is any of the
    image's own.

  Raises:
    ValueError: M is 0.
  """
  batch, prompts, width = prompt_embeds.shape
  if prompts == 0:
    raise ValueError('the multi-label loss needs prompts and got 0 per image; leave it out instead')
  images = clamped_scale(log_scale) * l2_normalize(image_embeds)
  texts = l2_normalize(prompt_embeds)
  own = jnp.einsum('be,bme->bm', images, texts, precision='highest')
  all_pairs = streamed_logits.logsumexp(images, texts.reshape(-1, width), place, block)
  image_to_text = (all_pairs.rows - own.mean(axis=1)).mean()
  text_to_image = (all_pairs.columns.reshape(batch, prompts) - own).mean()
  labels = jnp.arange(batch)
  return ContrastiveLoss(
    (image_to_text + text_to_image) / 2,
    jnp.mean(all_pairs.best_columns // prompts == labels),
    jnp.mean(all_pairs.best_rows.reshape(batch, prompts) == labels[:, None]),
  )
