"""Multi-head attention, divided by the sums of its weights after the values are added up rather than before.

The same function as softmax(query key^T) value. But what is as large as the weights is passed over less often, and of
it only the weights themselves wait for the backward pass.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Implementation = Literal['xla', 'xla_in_parts', 'cudnn']

# More cost compilation, and no more than so many cores can be busy with them.
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
    implementation: 'cudnn' for the fused one of NVIDIA's GPUs, which takes half precision alone; 'xla_in_parts' for
      CPUs, where XLA works through the products of a batch one after the other and in memory, but runs parts of a
      batch side by side and in caches. That needs B on one device, and no mask: with one it is 'xla'.

  Returns:
    Attended values [B, N, h, k].
  """
  if implementation == 'cudnn':
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation='cudnn')
  # Heads before tokens: compilers for CPUs take twice as long over products of arrays that have tokens first.
  query, key, value = map(_swap, (query, key, value))
  if implementation == 'xla_in_parts' and mask is None:
    return _swap(_attend_in_parts(query, key, value))
  return _swap(_attend(query, key, value, mask))


def _attend_in_parts(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """`_attend` without a mask, for [B, h, N, k], as several products that do not depend on each other."""
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
  # What the softmax takes away: the same for all keys of a query, and smaller to add up here than among them.
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
