"""The grouping block: N tokens become S segments (paper section 3.2)."""

from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from groupvit_jax.model import assignment as assignment_lib
from groupvit_jax.model.attention import Implementation
from groupvit_jax.model.layers import CrossAttention, Initializer, LayerNorm, Mlp, project, TokenMixer


class GroupingOutput(NamedTuple):
  """Segments and how they were made."""

  segments: jax.Array  # [B, S, D]
  assignment: jax.Array  # [B, S, N], soft and free of noise, float32


class PostNormCrossAttention(nn.Module):
  """Group tokens [B, S, D] look at tokens [B, N, D]: attention, MLP, and a norm at the end rather than before."""

  num_heads: int
  mlp_ratio: float
  kernel: Initializer
  dtype: jnp.dtype = jnp.float32
  attention: Implementation = 'xla'

  @nn.compact
  def __call__(self, groups: jax.Array, tokens: jax.Array) -> jax.Array:
    width = groups.shape[-1]
    attn = CrossAttention(self.num_heads, self.kernel, self.dtype, self.attention, name='attn')
    groups = groups + attn(groups, tokens)
    mlp = Mlp(int(width * self.mlp_ratio), width, self.kernel, self.kernel, dtype=self.dtype, name='mlp')
    groups = groups + mlp(LayerNorm(name='norm2')(groups))
    return LayerNorm(name='norm_post')(groups).astype(groups.dtype)


class GroupingBlock(nn.Module):
  """Merges tokens into segments by (straight-through hard) assignment to group tokens."""

  num_segments: int
  num_heads: int
  mlp_ratio: float
  mode: assignment_lib.AssignmentMode
  kernel: Initializer
  assign_kernel: Initializer  # of the assignment's query and key projections
  value_kernel: Initializer  # of its value and output projections
  dtype: jnp.dtype = jnp.float32
  attention: Implementation = 'xla'  # of group tokens on tokens

  @nn.compact
  def __call__(self, tokens: jax.Array, groups: jax.Array, *, keys: jax.Array | None = None) -> GroupingOutput:
    """Groups tokens.

    Args:
      tokens: [B, N + padding, D], padded as `attention` says.
      groups: group tokens [B, G, D].
      keys: [B], source of the Gumbel noise; None for none.

    Returns:
      Segments [B, S, D] and the soft assignment [B, S, N].
    """
    width, padding = tokens.shape[-1], getattr(self.attention, 'padding', 0)
    dense = lambda name, kernel: nn.Dense(width, kernel_init=kernel, dtype=self.dtype, dot_general=project, name=name)
    groups = LayerNorm(name='norm_groups')(groups).astype(self.dtype)
    tokens = LayerNorm(name='norm_tokens')(tokens).astype(self.dtype)

    groups = TokenMixer(width // 2, self.num_segments, self.kernel, self.dtype, name='mixer')(groups)
    groups = LayerNorm(name='norm_mixed')(groups).astype(self.dtype)
    cross_attn = PostNormCrossAttention(
      self.num_heads, self.mlp_ratio, self.kernel, self.dtype, self.attention, name='cross_attn'
    )
    groups = cross_attn(groups, tokens)

    with jax.named_scope('assign'):
      logits = assignment_lib.assignment_logits(
        dense('assign_query', self.assign_kernel)(groups), dense('assign_key', self.assign_kernel)(tokens)
      )[:, :, : tokens.shape[1] - padding]
      weights = assignment_lib.assign(logits, self.mode, keys, self.dtype)
      weights = jnp.pad(weights, ((0, 0), (0, 0), (0, padding)))
      pooled = assignment_lib.pool_segments(weights, dense('assign_value', self.value_kernel)(tokens))
      segments = dense('assign_out', self.value_kernel)(pooled) + groups

    mlp = Mlp(int(width * self.mlp_ratio), width, self.kernel, self.kernel, dtype=self.dtype, name='mlp')
    segments = segments + mlp(LayerNorm(name='norm_segments')(segments))
    return GroupingOutput(segments, assignment_lib.soft_assignment(logits))
