"""The two losses of GroupViT: caption contrast and multi-label contrast (paper section 3.3).

Embeddings come in as the projectors leave them; everything is float32 and over the global batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# Temperatures below 1/100 make training unstable (CLIP, section 2.5).
MAX_SCALE = 100.0


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


def contrastive_loss(image_embeds: jax.Array, text_embeds: jax.Array, log_scale: jax.Array) -> ContrastiveLoss:
  """Symmetric InfoNCE over a batch of pairs (paper eqs. 8-9), mean of the two directions.

  Args:
    image_embeds: [B, E].
    text_embeds: captions [B, E].
    log_scale: log temperature [].

  Returns:
    Loss and accuracies.
  """
  logits = clamped_scale(log_scale) * jnp.einsum(
      'be,ce->bc', l2_normalize(image_embeds), l2_normalize(text_embeds), precision='highest')
  labels = jnp.arange(logits.shape[0])
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  loss = (cross_entropy(logits, labels).mean() + cross_entropy(logits.T, labels).mean()) / 2
  return ContrastiveLoss(
      loss, jnp.mean(logits.argmax(axis=1) == labels), jnp.mean(logits.argmax(axis=0) == labels))


def multi_label_loss(image_embeds: jax.Array, prompt_embeds: jax.Array, log_scale: jax.Array) -> ContrastiveLoss:
  """Contrast of images with the prompts made from their captions (paper eqs. 10-11).

  An image's target puts 1/M on each of its own M prompts among all B*M; a prompt's target is its image.

  Args:
    image_embeds: [B, E].
    prompt_embeds: [B, M, E].
    log_scale: log temperature [].

  Returns:
    Loss (mean of the two directions) and accuracies; image to text counts a hit when the best prompt is any of the
    image's own.
  """
  batch, prompts, _ = prompt_embeds.shape
  logits = clamped_scale(log_scale) * jnp.einsum(
      'be,cme->bcm', l2_normalize(image_embeds), l2_normalize(prompt_embeds), precision='highest')
  own = jnp.einsum('bbm->bm', logits)
  image_to_text = (jax.nn.logsumexp(logits, axis=(1, 2)) - own.mean(axis=1)).mean()
  text_to_image = (jax.nn.logsumexp(logits, axis=0) - own).mean()
  labels = jnp.arange(batch)
  return ContrastiveLoss(
      (image_to_text + text_to_image) / 2,
      jnp.mean(logits.reshape(batch, -1).argmax(axis=1) // prompts == labels),
      jnp.mean(logits.argmax(axis=0) == labels[:, None]))
