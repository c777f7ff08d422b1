"""The text tower: a causal transformer pooled at the end-of-text token (CLIP's, narrower)."""

from flax import linen as nn
import jax
import jax.numpy as jnp

from groupvit_jax.models.layers import Block, BlockInit, layer_norm, quick_gelu, Remat, rematerialized


def eos_positions(tokens: jax.Array, eos_id: int) -> jax.Array:
  """Index of the first end-of-text token of each text [B, L], -> [B].

  The first, because CLIP pads with the same id; by equality, because only in CLIP's vocabulary is it the largest.
  """
  return jnp.argmax(tokens == eos_id, axis=-1)


def clip_block_init(width: int, depth: int) -> BlockInit:
  """CLIP's initialisation: residual branches shrink with the depth."""
  normal = nn.initializers.normal
  out = normal(width**-0.5 * (2 * depth) ** -0.5)
  return BlockInit(attn_in=normal(width**-0.5), attn_out=out, mlp_in=normal((2 * width) ** -0.5), mlp_out=out)


class TextTower(nn.Module):
  """GroupViT's text encoder."""

  vocab_size: int
  context_length: int  # the longest text, in tokens
  width: int
  depth: int
  num_heads: int
  eos_id: int
  mlp_ratio: float = 4.0
  remat: Remat = 'none'
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Encodes texts.

    Args:
      tokens: ids [B, L], L at most `context_length`; what follows the first EOS has no influence.

    Returns:
      Features at the EOS token [B, D], float32.

    Raises:
      ValueError: L exceeds the context length.
    """
    length = tokens.shape[1]
    if length > self.context_length:
      raise ValueError(f'texts of {length} tokens exceed the context length {self.context_length}; cut them')
    embedding = self.param(
        'token_embedding', nn.initializers.normal(0.02), (self.vocab_size, self.width), jnp.float32)
    positions = self.param(
        'positions', nn.initializers.normal(0.01), (self.context_length, self.width), jnp.float32)
    x = (embedding[tokens] + positions[None, :length]).astype(self.dtype)
    causal = jnp.tril(jnp.ones((length, length), bool))
    block_class = rematerialized(Block, self.remat)
    for j in range(self.depth):
      x = block_class(
          self.num_heads, self.mlp_ratio, clip_block_init(self.width, self.depth), quick_gelu, dtype=self.dtype,
          name=f'block{j}')(x, mask=causal)
    at_eos = jnp.take_along_axis(x, eos_positions(tokens, self.eos_id)[:, None, None], axis=1)[:, 0]
    return layer_norm('norm')(at_eos)
