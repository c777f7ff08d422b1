"""Multi-head attention, softmax(query key^T) value.

It is normalised after the values are summed, and only the weights are kept for the backward pass. So fewer passes run
over arrays of the size of the weights.
"""

from collections.abc import Sequence
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.extend.core
import jax.numpy as jnp

from groupvit_jax.model.tpu_attention import SAVED, TpuAttention

Implementation = Literal['xla', 'xla_in_parts', 'cudnn'] | TpuAttention

# More parts take longer to compile; this many keep as many cores busy.
_MOST_PARTS = 8


def self_attend(
  qkv: jax.Array,
  bias: jax.Array,
  num_heads: int,
  texts: jax.Array | None = None,
  implementation: Implementation = 'xla',
) -> jax.Array:
  """Multi-head attention of tokens among each other, with a float32 softmax.

  Args:
    qkv: [B, N, 3 D], query, key and value; where devices divide heads for TPUs, the three of each device together.
    bias: [3 D], to be added to `qkv`.
    num_heads: h.
    texts: [B, N] or [1, N], the text that each token is of: it sees those before it in that text. None: all see all.
    implementation: as for `attend`; the TPU kernel's stands aside where its arrays do not fit.

  Returns:
    Attended values [B, N, D].
  """
  batch, tokens, width = qkv.shape
  mask, shards = None if texts is None else causal_mask(texts)[:, None], 1
  if isinstance(implementation, TpuAttention):
    if implementation.fits(num_heads, qkv):
      return implementation.attend([qkv], [bias], num_heads, texts)
    seen = implementation.seen(tokens)
    mask = seen if mask is None else mask & seen
    shards, implementation = implementation.shards(num_heads), 'xla'
  by_shard = (qkv + bias[None, None]).reshape(batch, tokens, shards, 3, num_heads // shards, width // 3 // num_heads)
  parts = unfuse(by_shard.swapaxes(2, 3).reshape(batch, tokens, 3, num_heads, -1))
  if implementation == 'cudnn':  # it takes them apart: so they are kept, and not cut out of the projection once more
    parts = (checkpoint_name(part, SAVED[0]) for part in parts)
  return attend(*parts, mask, implementation).reshape(batch, tokens, width // 3)


def cross_attend(
  arrays: Sequence[jax.Array], biases: Sequence[jax.Array], num_heads: int, implementation: Implementation = 'xla'
) -> jax.Array:
  """Multi-head attention of some tokens on others, with a float32 softmax.

  Args:
    arrays: query [B, S, D], key and value [B, N, D].
    biases: [D], to be added to them.
    num_heads: h.
    implementation: XLA's, but where it is the TPU kernel's or cuDNN's.

  Returns:
    Attended values [B, S, D].
  """
  mask = None
  if isinstance(implementation, TpuAttention):
    if implementation.fits(num_heads, *arrays):
      return implementation.attend(arrays, biases, num_heads)
    mask = implementation.seen(arrays[1].shape[1])
  heads = [(x + bias[None, None]).reshape(*x.shape[:2], num_heads, -1) for x, bias in zip(arrays, biases)]
  return attend(*heads, mask, 'cudnn' if implementation == 'cudnn' else 'xla').reshape(arrays[0].shape)


def causal_mask(texts: jax.Array) -> jax.Array:
  """Which tokens a token sees, [B, N, N], of the text [B, N] that each is of."""
  tokens = texts.shape[1]
  return (texts[:, :, None] == texts[:, None]) & jnp.tril(jnp.ones((1, tokens, tokens), bool))


@jax.custom_vjp
def unfuse(qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Query, key and value [B, N, h, k] of a fused projection [B, N, 3, h, k].

  Their gradients are stacked; indexing would pad each with zeros and add them up.
  """
  return tuple(qkv[..., i, :, :] for i in range(3))


unfuse.defvjp(lambda qkv: (unfuse(qkv), None), lambda _, grads: (jnp.stack(grads, axis=-3),))


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
  implementation: Literal['xla', 'xla_in_parts', 'cudnn'] = 'xla',
) -> jax.Array:
  """Multi-head attention with a float32 softmax.

  Args:
    query: [B, N, h, k].
    key: [B, M, h, k].
    value: [B, M, h, k].
    mask: booleans that broadcast to [B, h, N, M]; False hides a key from a query.
    implementation: 'cudnn' is fused, for NVIDIA's GPUs in half precision; with a mask it is 'xla' for odd N, which
      cuDNN does not differentiate. 'xla_in_parts' splits the batch so that XLA runs its matmuls on several cores and
      in caches. It needs B on one device; with a mask it is 'xla'.

  Returns:
    Attended values [B, N, h, k].
  """
  if implementation == 'cudnn' and (mask is None or query.shape[1] % 2 == 0):
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation='cudnn')
  # Heads before tokens: on CPUs matmuls of arrays with tokens first take twice as long.
  query, key, value = map(_swap, (query, key, value))
  if implementation == 'xla_in_parts' and mask is None:
    return _swap(_attend_in_parts(query, key, value))
  return _swap(_attend(query, key, value, mask))


def is_cudnn_attention(primitive: jax.extend.core.Primitive, *_, **__) -> bool:
  """A checkpoint policy: whether this is cuDNN's forward pass, whose output its backward pass needs."""
  return primitive.name == 'dot_product_attention_fwd_wrapper'


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
