"""The image tower: patches, stages of transformer blocks and grouping blocks (paper section 3.1)."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from groupvit_jax.errors import UserError
from groupvit_jax.model import tpu_attention
from groupvit_jax.model.assignment import AssignmentMode
from groupvit_jax.model.attention import Implementation
from groupvit_jax.model.grouping import GroupingBlock
from groupvit_jax.model.layers import (
  bias_init,
  Block,
  BlockInit,
  fold_keys,
  Initializer,
  LayerNorm,
  project,
  Remat,
  rematerialized,
  TokenMixer,
  torch_uniform,
)
from groupvit_jax.model.tpu_attention import TpuAttention


class VisionOutput(NamedTuple):
  """Output of the image tower."""

  pooled: jax.Array  # [B, D], mean over the final segments
  segments: jax.Array  # [B, S, D], after the final norm
  assignments: tuple[jax.Array, ...]  # per grouping stage [B, S, N], soft, float32
  # Per grouping stage but the last [B, S, D]: as they enter the next grouping, after the final norm.
  earlier_segments: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class VisionInit:
  """Initialisers of the image tower.

  The paper's (timm's) are `normal(0.02)` throughout. A small model learns to group only when its assignment starts
  out decisive, see docs/design.md.
  """

  kernel: Initializer
  assign_kernel: Initializer  # query and key projections of the assignment
  value_kernel: Initializer  # its value and output projections
  tokens: Initializer  # group tokens of the first stage
  positions: Initializer
  torch_defaults: bool = False  # of the patch embedding


@dataclasses.dataclass(frozen=True)
class StageSpec:
  """One stage: `depth` blocks over tokens and `num_group_tokens` group tokens, grouped into `num_segments`."""

  depth: int
  num_group_tokens: int  # 0 in a stage that does not group
  num_segments: int


def resize_positions(positions: jax.Array, height: int, width: int) -> jax.Array:
  """Resizes position embeddings [h, w, D] to [height, width, D] as torch's bicubic interpolation does."""
  if positions.shape[:2] == (height, width):
    return positions
  shape = height, width, positions.shape[2]
  return jax.image.resize(positions, shape, 'cubic-pytorch', antialias=False, precision='highest')


class PatchEmbed(nn.Module):
  """Patches of p x p pixels, each projected: [B, H, W, C] -> [B, H // p, W // p, D].

  A convolution of stride p. Compilers for CPUs and GPUs multiply matrices faster; those for TPUs, which keep samples in
  the lanes of images, would move every pixel four times.
  """

  patch_size: int
  width: int
  dtype: jnp.dtype = jnp.float32
  convolve: bool = False  # or multiply matrices
  torch_init: bool = False  # whether parameters start as those of torch's Conv2d, else LeCun normal and at zero

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    batch, height, width, channels = images.shape
    size, rows, columns = self.patch_size, height // self.patch_size, width // self.patch_size
    fan_in = size * size * channels
    init = torch_uniform(fan_in) if self.torch_init else nn.initializers.lecun_normal()
    kernel = self.param('kernel', init, (size, size, channels, self.width), jnp.float32)
    bias = self.param('bias', bias_init(self.torch_init, fan_in), (self.width,), jnp.float32)
    pixels = images[:, : rows * size, : columns * size].astype(self.dtype)
    kernel = kernel.astype(self.dtype)
    if self.convolve:
      numbers = 'NHWC', 'HWIO', 'NHWC'
      out = lax.conv_general_dilated(pixels, kernel, (size, size), 'VALID', dimension_numbers=numbers)
    else:
      patches = pixels.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
      patches = patches.reshape(batch, rows, columns, size * size * channels)
      out = project(patches, kernel.reshape(-1, self.width))
    return out + bias.reshape(1, 1, 1, -1).astype(self.dtype)


class GroupProjector(nn.Module):
  """Turns a stage's group tokens [B, G, D] into the next stage's [B, G', D]: norm, then an MLP across tokens."""

  num_group_tokens: int
  kernel: Initializer
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, groups: jax.Array) -> jax.Array:
    width = groups.shape[-1]
    mixer = TokenMixer(width // 2, self.num_group_tokens, self.kernel, self.dtype, name='mixer')
    return mixer(LayerNorm(name='norm')(groups))


class VisionTower(nn.Module):
  """GroupViT's image encoder."""

  image_size: tuple[int, int]  # H, W of training; others are accepted, with positions resized
  patch_size: int
  width: int
  num_heads: int
  stages: tuple[StageSpec, ...]
  init: VisionInit
  mlp_ratio: float = 4.0
  drop_path: float = 0.1  # of the last block; rises linearly from 0 at the first
  remat: Remat = 'none'
  assignment: AssignmentMode = 'gumbel'  # in training; evaluation pools with the hard assignment unless 'soft'
  dtype: jnp.dtype = jnp.float32
  attention: Implementation = 'xla'  # of the blocks

  @nn.compact
  def __call__(self, images: jax.Array, *, keys: jax.Array | None = None) -> VisionOutput:
    """Encodes images.

    Args:
      images: [B, H, W, 3], normalised, of any size; pixels beyond the last whole patch are ignored.
      keys: [B], source of stochastic depth and Gumbel noise; None (evaluation) for neither.

    Raises:
      UserError: an image is smaller than a patch.
    """
    x = self._embed(images)
    rates = iter(np.linspace(0, self.drop_path, sum(stage.depth for stage in self.stages)))
    groups, assignments, earlier_segments = None, [], []
    norm = LayerNorm(name='norm')
    for i, stage in enumerate(self.stages):
      rate = list(itertools.islice(rates, stage.depth))
      stage_keys = fold_keys(keys, i)
      if stage.num_group_tokens:
        groups = self._group_tokens(i, stage.num_group_tokens, groups, x.shape[0])
      with jax.named_scope(f'stage{i}'):
        num_tokens, num_groups, attention = x.shape[1], stage.num_group_tokens, self.attention
        if isinstance(attention, TpuAttention):
          attention = attention.padded(num_groups + num_tokens)
          x = jnp.pad(x, ((0, 0), (0, attention.padding), (0, 0)))
        if num_groups:  # first, so that tokens begin with a tile of memory
          x = jnp.concatenate([groups, x], axis=1)
        x = self._blocks(i, tpu_attention.row_major(x, attention), rate, stage_keys, attention)
        if num_groups:
          groups, x = (tpu_attention.row_major(part, attention) for part in (x[:, :num_groups], x[:, num_groups:]))
          if assignments:
            earlier_segments.append(norm(x[:, :num_tokens]))
          grouping = self._grouping(i, stage.num_segments, attention)
          x, soft = grouping(x, groups, keys=fold_keys(stage_keys, stage.depth))
          assignments.append(soft)
        else:
          x = x[:, :num_tokens]
    segments = norm(x)
    return VisionOutput(segments.mean(axis=1), segments, tuple(assignments), tuple(earlier_segments))

  def _embed(self, images: jax.Array) -> jax.Array:
    """Patch tokens [B, N, D] with positions."""
    if images.shape[1] < self.patch_size or images.shape[2] < self.patch_size:
      raise UserError(
        f'an image of {images.shape[1]} x {images.shape[2]} px is smaller than one patch '
        f'({self.patch_size} px); enlarge it first'
      )
    grid = (self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size)
    convolve = isinstance(self.attention, TpuAttention)
    x = PatchEmbed(self.patch_size, self.width, self.dtype, convolve, self.init.torch_defaults, name='patch_embed')(
      images
    )
    x = LayerNorm(name='patch_norm')(x)
    positions = self.param('positions', self.init.positions, (*grid, self.width), jnp.float32)
    x = x + resize_positions(positions, *x.shape[1:3])[None]
    return x.reshape(x.shape[0], -1, self.width).astype(self.dtype)

  def _group_tokens(self, i: int, count: int, previous: jax.Array | None, batch: int) -> jax.Array:
    """Group tokens [B, G, D] entering stage i: learned, plus a projection of the previous ones where there are any."""
    init = self.init.tokens if previous is None else nn.initializers.zeros
    tokens = self.param(f'stage{i}_group_tokens', init, (count, self.width), jnp.float32)
    tokens = jnp.broadcast_to(tokens, (batch, count, self.width)).astype(self.dtype)
    if previous is None:
      return tokens
    projector = GroupProjector(count, self.init.kernel, self.dtype, name=f'stage{i}_group_projector')
    return tokens + projector(previous)

  def _blocks(
    self, i: int, x: jax.Array, rates: list[float], keys: jax.Array | None, attention: Implementation
  ) -> jax.Array:
    """Runs stage i's blocks over group tokens and tokens together, [B, G + N, D]."""
    make_block = functools.partial(
      rematerialized(Block, self.remat),
      self.num_heads,
      self.mlp_ratio,
      BlockInit.uniform(self.init.kernel),
      dtype=self.dtype,
      attention=attention,
    )
    for j, rate in enumerate(rates):
      x = make_block(drop_rate=float(rate), name=f'stage{i}_block{j}')(x, keys=fold_keys(keys, j))
    return x

  def _grouping(self, i: int, num_segments: int, attention: Implementation) -> GroupingBlock:
    return rematerialized(GroupingBlock, self.remat)(
      num_segments,
      self.num_heads,
      self.mlp_ratio,
      self.assignment,
      self.init.kernel,
      self.init.assign_kernel,
      self.init.value_kernel,
      self.dtype,
      attention,
      name=f'stage{i}_grouping',
    )
