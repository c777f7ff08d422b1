"""`transformers` models with random weights, and tokenizer files that go with them."""

import json
import pathlib

import numpy as np
import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Bytes, bytes that end a word, bos and eos: CLIP's vocabulary without a single merge.
VOCAB_SIZE = 2 * 256 + 2


def small_config(**vision) -> transformers.GroupViTConfig:
  """A narrow three-stage model of 224-px images; text of `write_clip_folder`'s vocabulary."""
  fields = dict(
      hidden_size=24, intermediate_size=60, num_attention_heads=3, depths=[1, 1, 1], num_hidden_layers=3,
      num_group_tokens=[7, 3, 0], num_output_groups=[7, 5, 5], assign_mlp_ratio=[0.5, 2.5])
  return transformers.GroupViTConfig(
      projection_dim=10, projection_intermediate_dim=22, vision_config=fields | vision,
      text_config=dict(
          hidden_size=20, intermediate_size=50, num_attention_heads=5, num_hidden_layers=2, vocab_size=VOCAB_SIZE,
          max_position_embeddings=9, bos_token_id=VOCAB_SIZE - 2, eos_token_id=VOCAB_SIZE - 1))


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


def write_clip_folder(folder: pathlib.Path) -> None:
  """A tokenizer's files as the released models have them."""
  letters = list(bytes_to_unicode().values())
  tokens = [*letters, *(letter + '</w>' for letter in letters), '<|startoftext|>', '<|endoftext|>']
  (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / 'merges.txt').write_text('#version: 0.2\n')


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
