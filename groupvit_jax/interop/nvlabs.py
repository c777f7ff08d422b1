"""Names and shapes in the authors' checkpoints (`.pth`)."""

from collections.abc import Iterable, Mapping
import math
import re

import ml_collections
import numpy as np

from groupvit_jax.errors import UserError
from groupvit_jax.interop import huggingface, state_dicts
from groupvit_jax.interop.state_dicts import array, batch_norm, dense, KERNEL_OUT, mlp, norm, Rule

# Of the released models. The number of heads does not follow from shapes.
HEAD_WIDTH = 64

_LAYER = 'img_encoder.layers.{i}'
_RESBLOCK = 'text_encoder.transformer.resblocks.{j}'


def _projector(ours: str, theirs: str) -> tuple[Rule, ...]:
  return (
    *dense(f'{ours}/fc1', f'{theirs}.linear_hidden.0'),
    *batch_norm(f'{ours}/norm', f'{theirs}.linear_hidden.1'),
    *dense(f'{ours}/fc2', f'{theirs}.linear_out'),
  )


RULES = (
  *dense('vision/patch_embed', 'img_encoder.patch_embed.proj', state_dicts.PATCH_KERNEL),
  *norm('vision/patch_norm', 'img_encoder.patch_embed.norm'),
  *array('vision/positions', 'img_encoder.pos_embed', state_dicts.BATCHED),
  *array('vision/stage{i}_group_tokens', f'{_LAYER}.group_token', state_dicts.BATCHED),
  *norm('vision/stage{i}_group_projector/norm', f'{_LAYER}.group_projector.0'),
  *mlp('vision/stage{i}_group_projector/mixer/mlp', f'{_LAYER}.group_projector.1'),
  *norm('vision/stage{i}_block{j}/norm1', _LAYER + '.blocks.{j}.norm1'),
  *dense('vision/stage{i}_block{j}/attn/qkv', _LAYER + '.blocks.{j}.attn.qkv'),
  *dense('vision/stage{i}_block{j}/attn/out', _LAYER + '.blocks.{j}.attn.proj', KERNEL_OUT),
  *norm('vision/stage{i}_block{j}/norm2', _LAYER + '.blocks.{j}.norm2'),
  *mlp('vision/stage{i}_block{j}/mlp', _LAYER + '.blocks.{j}.mlp'),
  *huggingface.grouping('vision/stage{i}_grouping', f'{_LAYER}.downsample', 'proj'),
  *norm('vision/norm', 'img_encoder.norm'),
  *array('text/token_embedding', 'text_encoder.token_embedding.weight'),
  *array('text/positions', 'text_encoder.positional_embedding'),
  *norm('text/block{j}/norm1', f'{_RESBLOCK}.ln_1'),
  *array('text/block{j}/attn/qkv/kernel', f'{_RESBLOCK}.attn.in_proj_weight', state_dicts.KERNEL_IN),
  *array('text/block{j}/attn/qkv/bias', f'{_RESBLOCK}.attn.in_proj_bias', state_dicts.VECTOR),
  *dense('text/block{j}/attn/out', f'{_RESBLOCK}.attn.out_proj', KERNEL_OUT),
  *norm('text/block{j}/norm2', f'{_RESBLOCK}.ln_2'),
  *mlp('text/block{j}/mlp', f'{_RESBLOCK}.mlp', 'c_fc', 'c_proj'),
  *norm('text/norm', 'text_encoder.ln_final'),
  *_projector('image_projector', 'img_projector'),
  *_projector('text_projector', 'text_projector'),
  *array('logit_scale', 'logit_scale'),
  *array('multi_label_logit_scale', 'multi_label_logit_scale'),
)

_IGNORE = r'.*\.num_batches_tracked'

# Arrays whose shapes give the model's sizes, with their number of axes; present whatever the number of stages.
_SIZE_ARRAYS = {
  'img_encoder.pos_embed': 3,
  'img_encoder.patch_embed.proj.weight': 4,
  'img_encoder.layers.0.blocks.0.mlp.fc1.weight': 2,
  'img_projector.linear_hidden.0.weight': 2,
  'img_projector.linear_out.weight': 2,
  'text_encoder.token_embedding.weight': 2,
  'text_encoder.positional_embedding': 2,
  'text_encoder.transformer.resblocks.0.mlp.c_fc.weight': 2,
}
_SIZE_ARRAYS_OF_A_STAGE = {'group_token': 3, 'downsample.mlp_inter.fc2.weight': 2}


def from_nvlabs(state: Mapping[str, np.ndarray], abstract: Mapping) -> dict:
  """`state_dicts.from_state_dict` of the state dict in an authors' checkpoint."""
  return state_dicts.from_state_dict(_without_kernel_axes(state), abstract, RULES, _IGNORE)


def spec_from_shapes(state: Mapping[str, np.ndarray]) -> state_dicts.ModelSpec:
  """The model that a state dict belongs to, by the shapes of its arrays.

  Raises:
    UserError: lists the arrays that sizes follow from and that are missing or have another number of axes, or the sizes
      are not those of a square image and heads of 64.
  """
  shapes = {name: x.shape for name, x in _without_kernel_axes(state).items()}
  grouping = r'(img_encoder\.layers\.\d+)\.(?:group_token|downsample\.)'
  stages = sorted({match[1] for name in shapes if (match := re.match(grouping, name))})
  axes = _SIZE_ARRAYS | {f'{stage}.{name}': n for stage in stages for name, n in _SIZE_ARRAYS_OF_A_STAGE.items()}
  if odd := [f'{name} with {n} axes' for name, n in axes.items() if len(shapes.get(name, ())) != n]:
    raise UserError(f"these are no weights of the authors' GroupViT: they lack {', '.join(odd)}")
  config = ml_collections.ConfigDict(
    dict(
      dtype='float32',
      embed_dim=shapes['img_projector.linear_out.weight'][0],
      projector_dim=shapes['img_projector.linear_hidden.0.weight'][0],
      vision=_vision_config(shapes),
      text=_text_config(shapes),
    )
  )
  vocab_size = shapes['text_encoder.token_embedding.weight'][0]
  # EOS is the last token of CLIP's vocabulary.
  return state_dicts.ModelSpec(config, vocab_size, vocab_size - 1, 'multi_label_logit_scale' in shapes)


def _vision_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
  _, num_patches, width = shapes['img_encoder.pos_embed']
  side, patch_size = math.isqrt(num_patches), shapes['img_encoder.patch_embed.proj.weight'][2]
  if side**2 != num_patches:
    raise UserError(f'there are {num_patches} positions, which make no square: the shape of the images is unknown')
  prefix = 'img_encoder.layers'
  stages = range(_count(rf'{prefix}\.(\d+)\.', shapes))
  # The last stage has neither group tokens nor a grouping block.
  none = (0, 0)
  return dict(
    image_size=(side * patch_size, side * patch_size),
    patch_size=patch_size,
    width=width,
    num_heads=_heads(width),
    depths=tuple(_count(rf'{prefix}\.{i}\.blocks\.(\d+)\.', shapes) for i in stages),
    num_group_tokens=tuple(shapes.get(f'{prefix}.{i}.group_token', none)[1] for i in stages),
    num_segments=tuple(shapes.get(f'{prefix}.{i}.downsample.mlp_inter.fc2.weight', none)[0] for i in stages),
    mlp_ratio=state_dicts.mlp_ratio(width, shapes[f'{prefix}.0.blocks.0.mlp.fc1.weight'][0]),
    **state_dicts.TRAINING_CONFIG,
  )


def _text_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, object]:
  context_length, width = shapes['text_encoder.positional_embedding']
  prefix = 'text_encoder.transformer.resblocks'
  return dict(
    context_length=context_length,
    width=width,
    depth=_count(rf'{prefix}\.(\d+)\.', shapes),
    num_heads=_heads(width),
    mlp_ratio=state_dicts.mlp_ratio(width, shapes[f'{prefix}.0.mlp.c_fc.weight'][0]),
  )


def _count(pattern: str, names: Iterable[str]) -> int:
  """Number of distinct numbers that names have at the pattern's group."""
  return len({match[1] for name in names if (match := re.match(pattern, name))})


def _heads(width: int) -> int:
  if width % HEAD_WIDTH:
    raise UserError(f'width {width} is no multiple of {HEAD_WIDTH}, the width of a head in all released models')
  return width // HEAD_WIDTH


def _without_kernel_axes(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Removes the last axis of projectors, which are 1 x 1 convolutions [out, in, 1] there."""
  is_conv = lambda name, x: '_projector.linear_' in name and x.ndim == 3 and x.shape[2] == 1
  return {name: x[:, :, 0] if is_conv(name, x) else x for name, x in state.items()}
