"""Builds the model and random erasing from a ConfigDict."""

from flax import linen as nn
import jax.numpy as jnp
import ml_collections

from groupvit_jax import config_entries
from groupvit_jax.errors import UserError
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.layers import Initializer, Remat
from groupvit_jax.model.pixels import RandomErasing
from groupvit_jax.model.text import TextTower
from groupvit_jax.model.vision import StageSpec, VisionInit, VisionTower


def build_model(
  config: ml_collections.ConfigDict, *, vocab_size: int, eos_id: int, multi_label: bool, remat: Remat = 'none'
) -> ImageTextModel:
  """Builds the model a config describes.

  Args:
    config: the `model` part of a config; see configs/ for its keys.
    vocab_size: of the tokenizer.
    eos_id: the tokenizer's end-of-text id.
    multi_label: whether prompts are trained beside captions.
    remat: activations that blocks keep for the backward pass.

  Raises:
    UserError: sizes that do not fit together, or a value that an entry does not take.
  """
  config_entries.check(config, 'model')
  vision, text, dtype = config.vision, config.text, jnp.dtype(config.dtype)
  stages = _stages(vision)
  _check_widths('vision', vision)
  _check_widths('text', text)
  if min(vision.image_size) < vision.patch_size:
    raise UserError(f'model.vision.patch_size={vision.patch_size} exceeds image_size={tuple(vision.image_size)}')
  return ImageTextModel(
    vision=VisionTower(
      image_size=tuple(vision.image_size),
      patch_size=vision.patch_size,
      width=vision.width,
      num_heads=vision.num_heads,
      stages=stages,
      init=_vision_init(vision.init),
      mlp_ratio=vision.mlp_ratio,
      drop_path=vision.drop_path,
      remat=remat,
      assignment=vision.assignment,
      dtype=dtype,
    ),
    text=TextTower(
      vocab_size=vocab_size,
      context_length=text.context_length,
      width=text.width,
      depth=text.depth,
      num_heads=text.num_heads,
      eos_id=eos_id,
      mlp_ratio=text.mlp_ratio,
      remat=remat,
      dtype=dtype,
      torch_init=_torch_defaults(vision.init),
    ),
    embed_dim=config.embed_dim,
    projector_dim=config.projector_dim,
    multi_label=multi_label,
    dtype=dtype,
    torch_init=_torch_defaults(vision.init),
  )


def build_random_erasing(config: ml_collections.ConfigDict) -> RandomErasing | None:
  """Builds random erasing from a config's `data.augment`; None for augmentation 'none' or `erase` 0."""
  if config.name == 'none' or config.erase == 0:
    return None
  return RandomErasing(config.erase)


def _check_widths(tower: str, config: ml_collections.ConfigDict) -> None:
  if config.width % config.num_heads:
    raise UserError(
      f'model.{tower}.width={config.width} is not divisible by num_heads={config.num_heads}; use a multiple'
    )
  if int(config.width * config.mlp_ratio) < 1:
    raise UserError(f'model.{tower}.mlp_ratio={config.mlp_ratio} leaves no hidden unit of width={config.width}')


def _stages(vision: ml_collections.ConfigDict) -> tuple[StageSpec, ...]:
  """Zips depths, group tokens and segments, and checks that the last stage alone does not group."""
  lists = vision.depths, vision.num_group_tokens, vision.num_segments
  if len(set(map(len, lists))) != 1:
    raise UserError(
      'model.vision.depths, num_group_tokens and num_segments must have one entry per stage each, got '
      + ', '.join(str(tuple(values)) for values in lists)
    )
  stages = tuple(StageSpec(*values) for values in zip(*lists))
  if len(stages) < 2 or stages[-1].num_group_tokens or not all(s.num_group_tokens for s in stages[:-1]):
    raise UserError(
      'model.vision.num_group_tokens must be positive in every stage but the last, where it is 0, got '
      f'{tuple(vision.num_group_tokens)}'
    )
  if any(s.num_segments < 1 for s in stages[:-1]):
    raise UserError(f'model.vision.num_segments must be positive, got {tuple(vision.num_segments)}')
  return stages


def _vision_init(config: ml_collections.ConfigDict) -> VisionInit:
  return VisionInit(
    kernel=_kernel_init(config.kernel),
    assign_kernel=_kernel_init(config.assign_kernel),
    value_kernel=_kernel_init(config.value_kernel),
    tokens=nn.initializers.normal(config.tokens_std),
    positions=nn.initializers.normal(config.positions_std),
    torch_defaults=_torch_defaults(config),
  )


def _torch_defaults(config: ml_collections.ConfigDict) -> bool:
  """Whether the rest starts as torch's defaults, too: with the paper's normal kernels."""
  return config.kernel.startswith('normal:')


def _kernel_init(spec: str) -> Initializer:
  """'normal:STD' or 'fan_in:SCALE' (a normal of variance SCALE / fan-in; 1 is LeCun's)."""
  kind, _, value = spec.partition(':')
  if kind == 'normal':
    return nn.initializers.normal(float(value))
  return nn.initializers.variance_scaling(float(value), 'fan_in', 'normal')
