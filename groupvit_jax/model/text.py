"""The text tower: a causal transformer pooled at the end-of-text token (CLIP's, narrower)."""

import functools

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from groupvit_jax.model.attention import Implementation
from groupvit_jax.model.layers import Block, BlockInit, LayerNorm, quick_gelu, Remat, rematerialized
from groupvit_jax.model.text_packing import TextRows


def clip_block_init(width: int, depth: int, torch_biases: bool) -> BlockInit:
  """CLIP's initialisation: residual branches shrink with the depth."""
  normal = nn.initializers.normal
  out = normal(width**-0.5 * (2 * depth) ** -0.5)
  return BlockInit(normal(width**-0.5), out, normal((2 * width) ** -0.5), out, torch_biases)


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
  scan_layers: bool = False  # loop over the blocks: the compiler sees one, at the price of copies; the same parameters
  dtype: jnp.dtype = jnp.float32
  attention: Implementation = 'xla'  # of the blocks
  torch_init: bool = False  # whether biases of MLPs start as torch's, else at zero

  @nn.compact
  def __call__(self, rows: TextRows) -> jax.Array:
    """Encodes texts.

    Args:
      rows: P groups of n texts, none longer than `context_length`.

    Returns:
      Features at the EOS tokens [P * n, D], float32.
    """
    embedding = self.param('token_embedding', nn.initializers.normal(0.02), (self.vocab_size, self.width), jnp.float32)
    positions = self.param('positions', nn.initializers.normal(0.01), (self.context_length, self.width), jnp.float32)
    groups, _, length = rows.tokens.shape
    x = (embedding[rows.tokens] + positions[rows.positions]).astype(self.dtype).reshape(-1, length, self.width)
    texts = rows.texts.reshape(-1, length)
    make_block = functools.partial(
      rematerialized(Block, self.remat),
      self.num_heads,
      self.mlp_ratio,
      clip_block_init(self.width, self.depth, self.torch_init),
      quick_gelu,
      dtype=self.dtype,
      attention=self.attention,
    )
    names = [f'block{j}' for j in range(self.depth)]
    if self.scan_layers and len(names) > 1 and not self.is_initializing():
      stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(self.variables['params'][name] for name in names))
      block = make_block(parent=None)
      x, _ = lax.scan(lambda x, params: (block.apply({'params': params}, x, texts=texts), None), x, stacked)
    else:
      for name in names:
        x = make_block(name=name)(x, texts=texts)
    at_eos = jnp.take_along_axis(x.reshape(groups, -1, self.width), rows.ends[..., None], axis=1)
    return LayerNorm(name='norm')(at_eos.reshape(-1, self.width))
