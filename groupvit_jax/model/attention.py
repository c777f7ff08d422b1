"""Multi-head attention, softmax(query key^T) value.

It is normalised after the values are summed, and only the weights are kept for the backward pass. So fewer passes run
over arrays of the size of the weights.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal['xla', 'xla_in_parts', 'cudnn']

# More parts take longer to compile; this many keep as many cores busy.
_MOST_PARTS = 8


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  implementation: Implementation = 'xla',
) -> jax.Array:
  """Multi-head attention with a float32 softmax.

  Args:
    query: [B, N, h, k].
    key: [B, M, h, k].
    value: [B, M, h, k].
    mask: booleans that broadcast to [B, h, N, M]; False hides a key from a query.
    implementation: 'cudnn' is fused, for NVIDIA's GPUs in half precision; 'xla_in_parts' splits the batch so that XLA
      runs its matmuls on several CPU cores and in caches. It needs B on one device; with a mask it is 'xla'.

  Returns:
    Attended values [B, N, h, k].
  """
  if implementation == 'cudnn':
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation='cudnn')
  # Heads before tokens: on CPUs matmuls of arrays with tokens first take twice as long.
  query, key, value = map(_swap, (query, key, value))
  if implementation == 'xla_in_parts' and mask is None:
    return _swap(_attend_in_parts(query, key, value))
  return _swap(_attend(query, key, value, mask))


def _attend_in_parts(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """`_attend` without a mask, for [B, h, N, k], as several independent matmuls."""
  batch, heads = query.shape[:2]
  if jax.export.is_symbolic_dim(batch):  # of an exported program
    return _attend(query, key, value, None)
  parts = max(parts for parts in range(1, _MOST_PARTS + 1) if batch * heads % parts == 0)
  split = lambda x: jnp.split(x.reshape(batch * heads, *x.shape[2:]), parts)
  out = [_attend(*part, None) for part in zip(*map(split, (query, key, value)))]
  return jnp.concatenate(out).reshape(query.shape)


@jax.custom_vjp
def _attend(query, key, value, mask):
  return _forward(query, key, value, mask)[0]


def _forward(query, key, value, mask):
  """For [..., N, k]."""
  logits = jnp.einsum('...nk,...mk->...nm', query, key, preferred_element_type=jnp.float32)
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
  weights = jnp.exp((logits - logits.max(axis=-1, keepdims=True)) * _scale(query))
  norm = 1 / weights.sum(axis=-1, keepdims=True)
  weights = weights.astype(value.dtype)
  out = jnp.einsum('...nm,...mk->...nk', weights, value, preferred_element_type=jnp.float32) * norm
  out = out.astype(value.dtype)
  return out, (query, key, value, weights, norm, out)


def _backward(saved, grad):
  query, key, value, weights, norm, out = saved
  grad = grad * norm
  # The softmax's correction, equal for all keys of a query: a sum over k is smaller than one over M.
  shared = (grad * out).sum(axis=-1, keepdims=True)
  grad = grad.astype(value.dtype)
  grad_logits = jnp.einsum('...nk,...mk->...nm', grad, value, preferred_element_type=jnp.float32) - shared
  grad_logits = (weights * grad_logits * _scale(query)).astype(query.dtype)
  grads = (
    jnp.einsum('...nm,...mk->...nk', grad_logits, key),
    jnp.einsum('...nm,...nk->...mk', grad_logits, query),
    jnp.einsum('...nm,...nk->...mk', weights, grad),
  )
  return *grads, None


def _swap(x: jax.Array) -> jax.Array:
  """[B, N, h, k] -> [B, h, N, k], and back."""
  return x.swapaxes(1, 2)


def _scale(query: jax.Array) -> float:
  return query.shape[-1] ** -0.5


_attend.defvjp(_forward, _backward)
