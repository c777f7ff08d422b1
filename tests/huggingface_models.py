"""`transformers` models with random weights, and tokenizer files that go with them."""

import json
import pathlib
import re

import numpy as np
import torch
import transformers

from tests.data.test_tokenizer import write_clip_folder

# Bytes, bytes that end a word, bos and eos: CLIP's vocabulary without a single merge.
VOCAB_SIZE = 2 * 256 + 2


def small_config(**vision) -> transformers.GroupViTConfig:
  """A narrow three-stage model of 224-px images; text of `write_clip_folder`'s vocabulary."""
  fields = dict(
    hidden_size=24,
    intermediate_size=60,
    num_attention_heads=3,
    depths=[1, 1, 1],
    num_hidden_layers=3,
    num_group_tokens=[7, 3, 0],
    num_output_groups=[7, 5, 5],
    assign_mlp_ratio=[0.5, 2.5],
  )
  return transformers.GroupViTConfig(
    projection_dim=10,
    projection_intermediate_dim=22,
    vision_config=fields | vision,
    text_config=dict(
      hidden_size=20,
      intermediate_size=50,
      num_attention_heads=5,
      num_hidden_layers=2,
      vocab_size=VOCAB_SIZE,
      max_position_embeddings=9,
      bos_token_id=VOCAB_SIZE - 2,
      eos_token_id=VOCAB_SIZE - 1,
    ),
  )


def authors_config(**vision) -> transformers.GroupViTConfig:
  """Another narrow one, with heads of 64 as the authors' checkpoints have them."""
  config = small_config(hidden_size=64, num_attention_heads=1, intermediate_size=160, **vision)
  config.text_config = transformers.GroupViTTextConfig(
    hidden_size=128,
    num_attention_heads=2,
    intermediate_size=256,
    num_hidden_layers=2,
    max_position_embeddings=9,
    vocab_size=VOCAB_SIZE,
    eos_token_id=VOCAB_SIZE - 1,
  )
  return config


def random_model(config: transformers.GroupViTConfig, seed: int = 0) -> transformers.GroupViTModel:
  """A model in evaluation mode with every parameter and statistic filled.

  Assignments are decisive and no bias or norm is neutral: with a library's own initialisation much would pass unseen.
  """
  rng = np.random.default_rng(seed)
  with torch.no_grad():
    model = transformers.GroupViTModel(config).eval()
    for name, value in model.state_dict().items():
      if not name.endswith('num_batches_tracked'):
        value.copy_(torch.as_tensor(_draw(rng, name, value.shape), dtype=torch.float32))
  return model


def authors_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  """The same weights under the authors' names; written by hand, not with the tables under test."""
  renamed = {}
  for name, value in state.items():
    if match := re.match(r'(.*\.(?:layers|self_attn).*)\.k_proj\.(weight|bias)$', name):
      if '.self_attn.' not in name:
        renamed[name] = value
        continue
      stem, kind = match.groups()
      fused = torch.cat([state[f'{stem}.{letter}_proj.{kind}'] for letter in 'qkv'])
      is_text = name.startswith('text')
      renamed[f'{stem}.in_proj_{kind}' if is_text else f'{stem}.qkv.{kind}'] = fused
    elif not re.search(r'\.self_attn\.[qv]_proj\.', name):
      renamed[name] = value
  substitutions = (
    (r'^vision_model\.encoder\.stages\.(\d+)\.layers', r'img_encoder.layers.\1.blocks'),
    (r'^vision_model\.encoder\.stages', 'img_encoder.layers'),
    (r'^vision_model\.embeddings\.position_embeddings', 'img_encoder.pos_embed'),
    (r'^vision_model\.embeddings\.patch_embeddings\.projection', 'img_encoder.patch_embed.proj'),
    (r'^vision_model\.embeddings\.layernorm', 'img_encoder.patch_embed.norm'),
    (r'^vision_model\.layernorm', 'img_encoder.norm'),
    (r'^(img.*blocks.*)\.self_attn\.out_proj', r'\1.attn.proj'),
    (r'^(img.*blocks.*)\.self_attn', r'\1.attn'),
    (r'^(img.*blocks.*)\.layer_norm', r'\1.norm'),
    (r'pre_assign_attn\.attn\.out_proj', 'pre_assign_attn.attn.proj'),
    (r'^text_model\.embeddings\.token_embedding', 'text_encoder.token_embedding'),
    (r'^text_model\.embeddings\.position_embedding\.weight', 'text_encoder.positional_embedding'),
    (r'^text_model\.final_layer_norm', 'text_encoder.ln_final'),
    (r'^text_model\.encoder\.layers', 'text_encoder.transformer.resblocks'),
    (r'^(text_encoder.*)\.self_attn', r'\1.attn'),
    (r'^(text_encoder.*)\.layer_norm(\d)', r'\1.ln_\2'),
    (r'^(text_encoder.*mlp)\.fc1', r'\1.c_fc'),
    (r'^(text_encoder.*mlp)\.fc2', r'\1.c_proj'),
    (r'^visual_projection\.3', 'img_projector.linear_out'),
    (r'^visual_projection', 'img_projector.linear_hidden'),
    (r'^text_projection\.3', 'text_projector.linear_out'),
    (r'^text_projection', 'text_projector.linear_hidden'),
  )
  result = {'multi_label_logit_scale': torch.tensor(1.25)}
  for name, value in renamed.items():
    for pattern, replacement in substitutions:
      name = re.sub(pattern, replacement, name)
    is_conv = re.search(r'linear_(hidden\.0|out)\.weight', name)
    result[name] = value[..., None] if is_conv else value
  return result


def write_released_folder(folder: pathlib.Path) -> None:
  """A narrow stand-in for the released models in the layout that they were uploaded in: torch's file, an old config."""
  model = random_model(small_config())
  folder.mkdir()
  state = model.state_dict() | {'text_model.embeddings.position_ids': torch.arange(9)[None]}
  torch.save(state, folder / 'pytorch_model.bin')
  config = model.config.to_dict()
  config['text_config'] |= dict(bos_token_id=0, pad_token_id=1, eos_token_id=2)
  config |= dict(text_config_dict=None, vision_config_dict=None, torch_dtype='float32', transformers_version=None)
  special = dict(
    bos_token='<|startoftext|>', eos_token='<|endoftext|>', unk_token='<|endoftext|>', pad_token='<|endoftext|>'
  )
  files = {
    'config.json': config,
    'special_tokens_map.json': special,
    'tokenizer_config.json': special
    | dict(
      add_prefix_space=False, do_lower_case=True, errors='replace', model_max_length=9, tokenizer_class='CLIPTokenizer'
    ),
    'preprocessor_config.json': dict(
      crop_size=224,
      do_center_crop=False,
      do_normalize=True,
      do_resize=True,
      resample=2,
      size=224,
      feature_extractor_type='CLIPFeatureExtractor',
      image_mean=[0.485, 0.456, 0.406],
      image_std=[0.229, 0.224, 0.225],
    ),
  }
  for name, values in files.items():
    (folder / name).write_text(json.dumps(values, indent=2))
  card = '---\nlicense: other\nlicense_name: stand-in-licence\ntags:\n- vision\n---\n# GroupViT\n'
  (folder / 'README.md').write_text(card)
  write_clip_folder(folder)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray | float:
  normal = rng.standard_normal(shape)
  if name.endswith('running_var'):
    return rng.uniform(0.5, 2, shape)
  if name == 'logit_scale':
    return 2.0
  if len(shape) > 1:
    if 'group_token' in name or 'embedding' in name and 'projection' not in name:
      return 0.7 * normal
    gain = 4.0 if '.assign.q_proj' in name or '.assign.k_proj' in name else 1.0
    return gain * normal / np.sqrt(np.prod(shape[1:]))
  is_scale = name.endswith('weight') and ('norm' in name or 'projection.1' in name)
  return is_scale + 0.3 * normal
