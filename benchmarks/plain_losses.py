"""The losses as their definition reads: one matrix of all logits. What `groupvit_jax.model.losses` is compared with."""

import jax
import jax.numpy as jnp

from groupvit_jax.model.losses import clamped_scale, ContrastiveLoss, l2_normalize


def multi_label_loss(image_embeds: jax.Array, prompt_embeds: jax.Array, log_scale: jax.Array) -> ContrastiveLoss:
  """`losses.multi_label_loss` of [B, E] and [B, M, E]; M = 1 is the contrastive loss."""
  batch, prompts, _ = prompt_embeds.shape
  logits = clamped_scale(log_scale) * jnp.einsum(
    'be,cme->bcm', l2_normalize(image_embeds), l2_normalize(prompt_embeds), precision='highest'
  )
  own = jnp.einsum('bbm->bm', logits)
  image_to_text = (jax.nn.logsumexp(logits, axis=(1, 2)) - own.mean(axis=1)).mean()
  text_to_image = (jax.nn.logsumexp(logits, axis=0) - own).mean()
  labels = jnp.arange(batch)
  return ContrastiveLoss(
    (image_to_text + text_to_image) / 2,
    jnp.mean(logits.reshape(batch, -1).argmax(axis=1) // prompts == labels),
    jnp.mean(logits.argmax(axis=0) == labels[:, None]),
  )
