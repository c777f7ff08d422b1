"""Assigning tokens to groups: soft, hard and Gumbel, with the straight-through gradient (paper section 3.2).

Assignments are arrays [B, S, N]: each of N tokens distributes itself over S groups, so they sum to one over S.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

AssignmentMode = Literal['soft', 'hard', 'gumbel']


def assignment_logits(group_queries: jax.Array, token_keys: jax.Array) -> jax.Array:
  """Similarities of groups and tokens, in float32 (paper eq. 3, without the softmax).

  Args:
    group_queries: projected group tokens [B, S, D].
    token_keys: projected tokens [B, N, D].

  Returns:
    Logits [B, S, N], scaled by 1 / sqrt(D).
  """
  scale = group_queries.shape[-1] ** -0.5
  logits = jnp.einsum('bsd,bnd->bsn', group_queries, token_keys, preferred_element_type=jnp.float32)
  return logits * scale


def soft_assignment(logits: jax.Array) -> jax.Array:
  """Softmax over the groups (not over the tokens) of logits [B, S, N], in float32."""
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def straight_through(logits: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """One-hot argmax over the groups of logits [B, S, N], with the gradient of the soft assignment (paper eq. 5)."""
  return jax.nn.one_hot(jnp.argmax(logits, axis=-2), logits.shape[-2], dtype=dtype, axis=-2)


def _pull(dtype, logits, grad):
  _, pull = jax.vjp(soft_assignment, logits)  # the softmax is computed where its gradient is, and only there
  return pull(grad.astype(jnp.float32))


straight_through.defvjp(lambda logits, dtype: (straight_through(logits, dtype), logits), _pull)


def assign(
  logits: jax.Array, mode: AssignmentMode, keys: jax.Array | None = None, dtype: jnp.dtype = jnp.float32
) -> jax.Array:
  """Assignment used to pool tokens into segments (paper eqs. 3-5).

  Args:
    logits: similarities [B, S, N].
    mode: 'soft' keeps the softmax; 'hard' takes its argmax, straight-through; 'gumbel' perturbs the logits with
      Gumbel(0, 1) noise (temperature 1) before it does the same.
    keys: [B], source of each sample's noise. Without them 'gumbel' is 'hard', which is what evaluation wants.
    dtype: of the assignment; what decides is float32.

  Returns:
    Assignment [B, S, N].
  """
  if mode == 'gumbel' and keys is not None:
    logits = logits + jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
  return soft_assignment(logits).astype(dtype) if mode == 'soft' else straight_through(logits, dtype)


def pool_segments(assignment: jax.Array, values: jax.Array, eps: float = 1.0) -> jax.Array:
  """Average of the values assigned to each group (paper eq. 6): an average, not a sum.

  Args:
    assignment: [B, S, N].
    values: projected tokens [B, N, D].
    eps: added to a group's token count; an empty group therefore pools to zero. The released models use 1.

  Returns:
    Pooled values [B, S, D], in the dtype of `values`.
  """
  total = jnp.einsum('bsn,bnd->bsd', assignment.astype(values.dtype), values, preferred_element_type=jnp.float32)
  count = assignment.sum(axis=-1, keepdims=True, dtype=jnp.float32)
  return (total / (count + eps)).astype(values.dtype)  # smaller to divide than what is added up
