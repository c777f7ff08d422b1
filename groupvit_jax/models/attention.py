"""Multi-head attention, divided by the sums of its weights after the values are added up rather than before.

The same function as softmax(query key^T) value. But what is as large as the weights is passed over less often, and of
it only the weights themselves wait for the backward pass.
"""

from typing import Literal

import jax
from jax import lax
import jax.numpy as jnp

Implementation = Literal['xla', 'cudnn']

# Pairs of a query and a key from which on the weights of all heads are too large for a CPU's cache.
_MANY_PAIRS = 2**18


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None,
           implementation: Implementation = 'xla') -> jax.Array:
  """Multi-head attention with a float32 softmax.

  Args:
    query: [B, N, h, k].
    key: [B, M, h, k].
    value: [B, M, h, k].
    mask: booleans that broadcast to [B, h, N, M]; False hides a key from a query.
    implementation: 'cudnn' for the fused one of NVIDIA's GPUs, which takes half precision alone.

  Returns:
    Attended values [B, N, h, k].
  """
  if implementation == 'cudnn':
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation='cudnn')
  pairs = query.shape[1] * key.shape[1]
  # An exported program takes pictures of any size: how many there are is not known before it runs.
  if mask is None and (jax.export.is_symbolic_dim(pairs) or pairs >= _MANY_PAIRS):
    all_heads = lambda *args: _attend(*args, None)
    return lax.platform_dependent(query, key, value, cpu=_attend_by_head, default=all_heads)
  return _attend(query, key, value, mask)


def _attend_by_head(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """`attend`, a head after the other: the weights of one stay in a CPU's cache, those of all do not."""
  heads_first = lambda x: jnp.moveaxis(x, 2, 0)[..., None, :]  # [h, B, N, 1, k]
  out = lax.map(lambda head: _attend(*head, None), tuple(map(heads_first, (query, key, value))))
  return jnp.moveaxis(out[..., 0, :], 0, 2)


@jax.custom_vjp
def _attend(query, key, value, mask):
  return _forward(query, key, value, mask)[0]


def _forward(query, key, value, mask):
  # Heads before tokens: compilers for CPUs take twice as long over products of arrays that have tokens first.
  query, key, value = map(_swap, (query, key, value))  # [B, h, N, k]
  logits = jnp.einsum('bhnk,bhmk->bhnm', query, key, preferred_element_type=jnp.float32)
  if mask is not None:
    logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
  weights = jnp.exp((logits - logits.max(axis=-1, keepdims=True)) * _scale(query))
  norm = 1 / weights.sum(axis=-1, keepdims=True)
  weights = weights.astype(value.dtype)
  out = jnp.einsum('bhnm,bhmk->bhnk', weights, value, preferred_element_type=jnp.float32) * norm
  out = out.astype(value.dtype)
  return _swap(out), (query, key, value, weights, norm, out)


def _backward(saved, grad):
  query, key, value, weights, norm, out = saved
  grad = _swap(grad) * norm
  # What the softmax takes away: the same for all keys of a query, and smaller to add up here than among them.
  shared = (grad * out).sum(axis=-1, keepdims=True)
  grad = grad.astype(value.dtype)
  grad_logits = jnp.einsum('bhnk,bhmk->bhnm', grad, value, preferred_element_type=jnp.float32) - shared
  grad_logits = (weights * grad_logits * _scale(query)).astype(query.dtype)
  grads = (jnp.einsum('bhnm,bhmk->bhnk', grad_logits, key), jnp.einsum('bhnm,bhnk->bhmk', grad_logits, query),
           jnp.einsum('bhnm,bhnk->bhmk', weights, grad))
  return *map(_swap, grads), None


def _swap(x: jax.Array) -> jax.Array:
  """[B, N, h, k] -> [B, h, N, k], and back."""
  return x.swapaxes(1, 2)


def _scale(query: jax.Array) -> float:
  return query.shape[-1] ** -0.5


_attend.defvjp(_forward, _backward)
