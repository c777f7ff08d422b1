"""The losses as their definition reads: one matrix of all logits. What `groupvit_jax.model.losses` is compared with."""

import jax
import jax.numpy as jnp

from groupvit_jax.model.losses import clamped_scale, ContrastiveLoss, l2_normalize, SEGMENT_TEMPERATURE


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


def best_segment_loss(
  segment_embeds: jax.Array, in_use: jax.Array, prompt_embeds: jax.Array, words: jax.Array, log_scale: jax.Array
) -> ContrastiveLoss:
  """`losses.best_segment_loss` of [B, S, E], [B, S], [B, M, E] and [B, M, K]."""
  batch = len(words)
  cosines = jnp.einsum('bse,cme->bscm', l2_normalize(segment_embeds), l2_normalize(prompt_embeds), precision='highest')
  in_use = jnp.broadcast_to(in_use[:, :, None, None], cosines.shape)
  similarity = SEGMENT_TEMPERATURE * jax.nn.logsumexp(cosines / SEGMENT_TEMPERATURE, axis=1, where=in_use)
  logits = clamped_scale(log_scale) * similarity  # [B, B, M]
  own = jnp.einsum('bbm->bm', logits)
  same_word = (words[:, :, None, None] == words[None, None]).all(axis=-1)  # [B, M, B, M]
  negative = ~same_word.any(axis=1)  # [B, B, M]
  rows = jax.nn.logsumexp(logits, axis=(1, 2), where=negative)
  columns = jax.nn.logsumexp(logits, axis=0, where=negative)
  others = jnp.where(negative, logits, -jnp.inf)
  return ContrastiveLoss(
    (jax.nn.softplus(rows[:, None] - own).mean() + jax.nn.softplus(columns - own).mean()) / 2,
    jnp.mean(own > others.max(axis=(1, 2)).reshape(batch, 1)),
    jnp.mean(own > others.max(axis=0)),
  )
