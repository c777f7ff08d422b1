"""Parts of the training step, as the paper names them, by the names of a compiled program's operations."""

import re

# The first that matches names the part; paths are those of modules and named scopes.
_PARTS = (
  ('optimizer', r'optimizer|^state\.(params|opt_state)'),
  ('losses', r'(caption|multi_label)_loss'),
  ('projectors', r'_projector/|/project/'),
  ('packing texts', r'pack_texts'),
  ('text tower: attention', r'\btext/.*attn\b'),
  ('text tower: MLPs', r'\btext/.*mlp\b'),
  ('text tower: norms', r'\btext/.*norm'),
  ('text tower: rest', r'\btext\b|text_features'),
  ('patch embedding', r'patch_embed|patch_norm'),
  (r'stage \1: grouping', r'stage(\d+)_(?:grouping|group_)'),
  (r'stage \1: attention', r'stage(\d+)_block\d+/.*attn\b'),
  (r'stage \1: MLPs', r'stage(\d+)_block\d+/.*mlp\b'),
  (r'stage \1: norms', r'stage(\d+)_block\d+/.*norm'),
  (r'stage \1: rest', r'\bvision/stage(\d+)\b'),
  ('image tower: rest', r'\bvision\b|vision_features'),
  ('augmentation', r'RandomErasing|random_erasing|normalize_images'),
)
NO_PART = 'rest'


def part_of(op_name: str) -> str:
  """The part that an operation belongs to, by its path."""
  for name, pattern in _PARTS:
    if match := re.search(pattern, op_name):
      return match.expand(name)
  return NO_PART


def pass_of(op_name: str) -> str:
  """'forward', 'backward', or 'recomputed' for what a backward pass computes again."""
  if 'rematted_computation' in op_name:
    return 'recomputed'
  return 'backward' if 'transpose(' in op_name else 'forward'
