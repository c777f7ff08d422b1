"""Hugging Face format: names of weights and config entries in `transformers`."""

from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from groupvit_jax.config_entries import check_value, ENTRIES, Kind, several, whole
from groupvit_jax.errors import UserError
from groupvit_jax.interop import state_dicts
from groupvit_jax.interop.state_dicts import array, batch_norm, dense, KERNEL_OUT, mlp, norm, Rule
from groupvit_jax.model.vision import StageSpec


def _block(ours: str, theirs: str) -> tuple[Rule, ...]:
  projections = tuple(f'{theirs}.self_attn.{name}_proj' for name in 'qkv')
  return (
    *norm(f'{ours}/norm1', f'{theirs}.layer_norm1'),
    Rule(f'params/{ours}/attn/qkv/kernel', tuple(f'{p}.weight' for p in projections), state_dicts.SPLIT_KERNEL),
    Rule(f'params/{ours}/attn/qkv/bias', tuple(f'{p}.bias' for p in projections), state_dicts.SPLIT_BIAS),
    *dense(f'{ours}/attn/out', f'{theirs}.self_attn.out_proj', KERNEL_OUT),
    *norm(f'{ours}/norm2', f'{theirs}.layer_norm2'),
    *mlp(f'{ours}/mlp', f'{theirs}.mlp'),
  )


def grouping(ours: str, theirs: str, attention_out: str) -> tuple[Rule, ...]:
  """Rules of a grouping block; the authors' checkpoints name only the attention's output projection differently."""
  cross, attn = f'{ours}/cross_attn', f'{theirs}.pre_assign_attn'
  return (
    *norm(f'{ours}/norm_groups', f'{theirs}.norm_tokens'),
    *norm(f'{ours}/norm_tokens', f'{theirs}.norm_x'),
    *mlp(f'{ours}/mixer/mlp', f'{theirs}.mlp_inter'),
    *norm(f'{ours}/norm_mixed', f'{theirs}.norm_post_tokens'),
    *dense(f'{cross}/attn/query', f'{attn}.attn.q_proj'),
    *dense(f'{cross}/attn/key', f'{attn}.attn.k_proj'),
    *dense(f'{cross}/attn/value', f'{attn}.attn.v_proj'),
    *dense(f'{cross}/attn/out', f'{attn}.attn.{attention_out}', KERNEL_OUT),
    *norm(f'{cross}/norm2', f'{attn}.norm2'),
    *mlp(f'{cross}/mlp', f'{attn}.mlp'),
    *norm(f'{cross}/norm_post', f'{attn}.norm_post'),
    *dense(f'{ours}/assign_query', f'{theirs}.assign.q_proj'),
    *dense(f'{ours}/assign_key', f'{theirs}.assign.k_proj'),
    *dense(f'{ours}/assign_value', f'{theirs}.assign.v_proj'),
    *dense(f'{ours}/assign_out', f'{theirs}.assign.proj'),
    *norm(f'{ours}/norm_segments', f'{theirs}.norm_new_x'),
    *mlp(f'{ours}/mlp', f'{theirs}.mlp_channels'),
  )


def _projector(ours: str, theirs: str) -> tuple[Rule, ...]:
  return (
    *dense(f'{ours}/fc1', f'{theirs}.0'),
    *batch_norm(f'{ours}/norm', f'{theirs}.1'),
    *dense(f'{ours}/fc2', f'{theirs}.3'),
  )


_STAGE = 'vision_model.encoder.stages.{i}'

RULES = (
  *dense('vision/patch_embed', 'vision_model.embeddings.patch_embeddings.projection', state_dicts.PATCH_KERNEL),
  *norm('vision/patch_norm', 'vision_model.embeddings.layernorm'),
  *array('vision/positions', 'vision_model.embeddings.position_embeddings', state_dicts.BATCHED),
  *array('vision/stage{i}_group_tokens', f'{_STAGE}.group_token', state_dicts.BATCHED),
  *norm('vision/stage{i}_group_projector/norm', f'{_STAGE}.group_projector.0'),
  *mlp('vision/stage{i}_group_projector/mixer/mlp', f'{_STAGE}.group_projector.1'),
  *_block('vision/stage{i}_block{j}', _STAGE + '.layers.{j}'),
  *grouping('vision/stage{i}_grouping', f'{_STAGE}.downsample', 'out_proj'),
  *norm('vision/norm', 'vision_model.layernorm'),
  *array('text/token_embedding', 'text_model.embeddings.token_embedding.weight'),
  *array('text/positions', 'text_model.embeddings.position_embedding.weight'),
  *_block('text/block{j}', 'text_model.encoder.layers.{j}'),
  *norm('text/norm', 'text_model.final_layer_norm'),
  *_projector('image_projector', 'visual_projection'),
  *_projector('text_projector', 'text_projection'),
  *array('logit_scale', 'logit_scale'),
)

# A step counter that torch's BatchNorm keeps, and a constant that old versions saved.
_IGNORE = r'.*\.num_batches_tracked|text_model\.embeddings\.position_ids'
_COUNTERS = ('visual_projection.1.num_batches_tracked', 'text_projection.1.num_batches_tracked')

# Values of keys that a config.json leaves out.
_DEFAULTS = dict(projection_dim=256, projection_intermediate_dim=4096)
_VISION_DEFAULTS = dict(
  hidden_size=384,
  intermediate_size=1536,
  depths=(6, 3, 3),
  num_group_tokens=(64, 8, 0),
  num_output_groups=(64, 8, 8),
  num_attention_heads=6,
  image_size=224,
  patch_size=16,
  num_channels=3,
  hidden_act='gelu',
  layer_norm_eps=1e-5,
  assign_eps=1.0,
  assign_mlp_ratio=(0.5, 4),
)
_TEXT_DEFAULTS = dict(
  hidden_size=256,
  intermediate_size=1024,
  num_hidden_layers=12,
  num_attention_heads=4,
  max_position_embeddings=77,
  vocab_size=49408,
  eos_token_id=49407,
  hidden_act='quick_gelu',
  layer_norm_eps=1e-5,
)

# What keys take: mostly what our entries of the same meaning do.
_of = lambda name: ENTRIES[f'model.{name}'].kind
_SIDE, _TOKEN = _of('vision.patch_size'), whole(0, 10**7)
_SIDES = several(_SIDE, '', 2, 2)
_RATIOS = several(_of('vision.mlp_ratio'), 'a list of two numbers above 0 and at most 64', 2, 2)
_SIZE = Kind(f'{_SIDE.words}, or a list of two', lambda x: _SIDE.accepts(x) or _SIDES.accepts(x))
_KINDS = {
  '': dict(projection_dim=_of('embed_dim'), projection_intermediate_dim=_of('projector_dim')),
  'vision_config': dict(
    hidden_size=_of('vision.width'),
    intermediate_size=_of('projector_dim'),
    depths=_of('vision.depths'),
    num_group_tokens=_of('vision.num_group_tokens'),
    num_output_groups=_of('vision.num_segments'),
    num_attention_heads=_of('vision.num_heads'),
    image_size=_SIZE,
    patch_size=_SIZE,
  ),
  'text_config': dict(
    hidden_size=_of('text.width'),
    intermediate_size=_of('projector_dim'),
    num_hidden_layers=_of('text.depth'),
    num_attention_heads=_of('text.num_heads'),
    max_position_embeddings=_of('text.context_length'),
    vocab_size=_TOKEN,
    eos_token_id=_TOKEN,
  ),
}


def from_huggingface(state: Mapping[str, np.ndarray], abstract: Mapping) -> dict:
  """`state_dicts.from_state_dict` of the state dict of `transformers.GroupViTModel`."""
  return state_dicts.from_state_dict(state, abstract, RULES, _IGNORE)


def to_huggingface(variables: Mapping) -> state_dicts.StateDict:
  """The state dict that `transformers.GroupViTModel` loads strictly.

  Remove `multi_label_logit_scale` from the params first: `transformers` has no such parameter.

  Raises:
    UserError: a parameter has no counterpart.
  """
  return state_dicts.to_state_dict(variables, RULES) | {name: np.zeros((), np.int64) for name in _COUNTERS}


def from_huggingface_config(config: Mapping[str, Any]) -> state_dicts.ModelSpec:
  """Our model config from a parsed `config.json`.

  Raises:
    UserError: the model does not support what it describes.
  """
  top, vision, text = _parts(config).values()
  _check_supported(vision, text)
  ratio = state_dicts.mlp_ratio
  model = ml_collections.ConfigDict(
    dict(
      dtype='float32',
      embed_dim=top['projection_dim'],
      projector_dim=top['projection_intermediate_dim'],
      vision=dict(
        image_size=_pair(vision['image_size']),
        patch_size=_pair(vision['patch_size'])[0],
        width=vision['hidden_size'],
        num_heads=vision['num_attention_heads'],
        depths=tuple(vision['depths']),
        num_group_tokens=tuple(vision['num_group_tokens']),
        # The last stage has an entry, too, which nothing reads.
        num_segments=(*vision['num_output_groups'][:-1], 0),
        mlp_ratio=ratio(vision['hidden_size'], vision['intermediate_size']),
        **state_dicts.TRAINING_CONFIG,
      ),
      text=dict(
        context_length=text['max_position_embeddings'],
        width=text['hidden_size'],
        depth=text['num_hidden_layers'],
        num_heads=text['num_attention_heads'],
        mlp_ratio=ratio(text['hidden_size'], text['intermediate_size']),
      ),
    )
  )
  # Old configs have 2 by mistake; `transformers` then takes the largest id, the EOS of CLIP's vocabulary.
  eos_id = text['vocab_size'] - 1 if text['eos_token_id'] == 2 else text['eos_token_id']
  return state_dicts.ModelSpec(model, text['vocab_size'], eos_id, multi_label=False)


def to_huggingface_config(
  spec: state_dicts.ModelSpec, *, bos_id: int | None, pad_id: int, dtype: str
) -> dict[str, Any]:
  """The `config.json` of a model, as plain values; `bos_id` is None if texts start without one.

  Raises:
    UserError: `transformers` cannot represent the model.
  """
  config, vision, text = spec.config, spec.config.vision, spec.config.text
  stages = [StageSpec(*spec) for spec in zip(vision.depths, vision.num_group_tokens, vision.num_segments, strict=True)]
  if any(stage.num_group_tokens != stage.num_segments for stage in stages[:-2]):
    raise UserError(
      'transformers sizes the projection of group tokens by the segments of the stage before it, so every grouping '
      'stage but the last must have as many segments as group tokens; model.vision has num_group_tokens='
      f'{tuple(vision.num_group_tokens)} and num_segments={tuple(vision.num_segments)}'
    )
  if spec.eos_id == 2:
    raise UserError(
      'transformers pools the text at the largest id instead of EOS where eos_token_id is 2; '
      'train with a tokenizer whose EOS has another id'
    )
  segments = tuple(vision.num_segments)
  return dict(
    architectures=['GroupViTModel'],
    model_type='groupvit',
    dtype=dtype,
    projection_dim=config.embed_dim,
    projection_intermediate_dim=config.projector_dim,
    vision_config=_VISION_DEFAULTS
    | dict(
      model_type='groupvit_vision_model',
      image_size=_size(tuple(vision.image_size)),
      patch_size=vision.patch_size,
      hidden_size=vision.width,
      num_attention_heads=vision.num_heads,
      depths=list(vision.depths),
      num_hidden_layers=sum(vision.depths),
      num_group_tokens=list(vision.num_group_tokens),
      num_output_groups=[*segments[:-1], segments[-2]],
      intermediate_size=int(vision.width * vision.mlp_ratio),
      assign_mlp_ratio=[0.5, vision.mlp_ratio],
    ),
    text_config=_TEXT_DEFAULTS
    | dict(
      model_type='groupvit_text_model',
      vocab_size=spec.vocab_size,
      bos_token_id=bos_id,
      eos_token_id=spec.eos_id,
      pad_token_id=pad_id,
      max_position_embeddings=text.context_length,
      hidden_size=text.width,
      num_hidden_layers=text.depth,
      num_attention_heads=text.num_heads,
      intermediate_size=int(text.width * text.mlp_ratio),
    ),
  )


def _parts(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """A config's own keys (under '') and its towers'; in old ones a part named `..._dict` takes precedence, unless null.

  Raises:
    UserError: it is not GroupViT's, or a value makes no model.
  """
  if config.get('model_type') != 'groupvit':
    raise UserError(f"config.json has model_type {config.get('model_type')!r}; this reads 'groupvit'")
  found = {'': _DEFAULTS | {key: config[key] for key in _DEFAULTS if key in config}}
  for name, defaults in (('vision_config', _VISION_DEFAULTS), ('text_config', _TEXT_DEFAULTS)):
    old = config.get(f'{name}_dict')
    part = (config.get(name) or {}) if old is None else old
    if not isinstance(part, dict):
      raise UserError(f'config.json has {name}={part!r}; it must be an object; download it again')
    found[name] = defaults | part
  for name, kinds in _KINDS.items():
    for key, kind in kinds.items():
      check_value(f'config.json has {name}.{key}'.replace(' .', ' '), found[name][key], kind)
  return found


def _check_supported(vision: Mapping[str, Any], text: Mapping[str, Any]) -> None:
  fixed = [('vision_config', vision, key) for key in ('num_channels', 'hidden_act', 'layer_norm_eps', 'assign_eps')]
  fixed += [('text_config', text, key) for key in ('hidden_act', 'layer_norm_eps')]
  for part, values, key in fixed:
    only = (_VISION_DEFAULTS if part == 'vision_config' else _TEXT_DEFAULTS)[key]
    if values[key] != only:
      raise UserError(f'config.json has {part}.{key}={values[key]!r}; only {only!r} is supported')
  if len(set(_pair(vision['patch_size']))) != 1:
    raise UserError(
      f'config.json has vision_config.patch_size={vision["patch_size"]}; only square patches are supported'
    )
  ratios, width = vision['assign_mlp_ratio'], vision['hidden_size']
  check_value('config.json has vision_config.assign_mlp_ratio', ratios, _RATIOS)
  tokens_ratio, channels_ratio = ratios
  if (int(width * tokens_ratio), int(width * channels_ratio)) != (width // 2, vision['intermediate_size']):
    raise UserError(
      f'config.json has vision_config.assign_mlp_ratio={vision["assign_mlp_ratio"]}; only half the width across '
      'tokens and intermediate_size across channels are supported'
    )


def _pair(value: Any) -> tuple[Any, Any]:
  return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


def _size(image_size: tuple[int, int]) -> int | list[int]:
  return image_size[0] if image_size[0] == image_size[1] else list(image_size)
