"""Model FLOPs, counted by hand from a config: what the method needs, whatever a program computes.

Two for each multiplication and addition of a matrix product; norms, activations, softmaxes and losses are left out.
A backward pass needs twice the forward pass.
"""

from collections.abc import Sequence

import ml_collections


def block(tokens: int, width: int, mlp_ratio: float) -> float:
  """A transformer block: query, key, value and output, scores and their use, two layers of the MLP."""
  return 2 * tokens * width * width * (4 + 2 * mlp_ratio) + 4 * tokens * tokens * width


def image_tower(vision: ml_collections.ConfigDict, height: int, width: int) -> float:
  """One picture through the image encoder."""
  dim, tokens = vision.width, (height // vision.patch_size) * (width // vision.patch_size)
  total = 2 * tokens * 3 * vision.patch_size**2 * dim
  previous = 0
  for depth, groups, segments in zip(vision.depths, vision.num_group_tokens, vision.num_segments):
    if groups and previous:
      total += token_mixer(previous, groups, dim)
    total += depth * block(tokens + groups, dim, vision.mlp_ratio)
    if groups:
      total += grouping_block(tokens, groups, segments, dim, vision.mlp_ratio)
      tokens, previous = segments, groups
  return total


def token_mixer(tokens: int, out: int, dim: int) -> float:
  """An MLP across tokens, with half the width in between."""
  return 2 * dim * (dim // 2) * (tokens + out)


def grouping_block(tokens: int, groups: int, segments: int, dim: int, mlp_ratio: float) -> float:
  """Mixer; cross-attention and its MLP; assignment; the MLP of the segments."""
  mlp = 2 * segments * dim * dim * 2 * mlp_ratio
  attention = 2 * dim * dim * (2 * segments + 2 * tokens) + 4 * segments * tokens * dim
  assignment = 2 * dim * dim * (2 * segments + 2 * tokens) + 4 * segments * tokens * dim
  return token_mixer(groups, segments, dim) + attention + mlp + assignment + mlp


def text_tower(text: ml_collections.ConfigDict, lengths: Sequence[int]) -> float:
  """Texts of so many tokens each, their ends included and nothing after them."""
  return sum(text.depth * block(length, text.width, text.mlp_ratio) for length in lengths)


def projector(dim: int, hidden: int, out: int) -> float:
  """One feature through a projector."""
  return 2 * hidden * (dim + out)


def train_step(model: ml_collections.ConfigDict, lengths: Sequence[Sequence[int]]) -> float:
  """A step on images with texts of `lengths` [B][T]: towers, projectors and the logits of both losses, three times."""
  batch, texts = len(lengths), sum(map(len, lengths))
  forward = batch * image_tower(model.vision, *model.vision.image_size)
  forward += sum(text_tower(model.text, row) for row in lengths)
  forward += batch * projector(model.vision.width, model.projector_dim, model.embed_dim)
  forward += texts * projector(model.text.width, model.projector_dim, model.embed_dim)
  forward += 2 * batch * texts * model.embed_dim
  return 3 * forward


def encode_windows(model: ml_collections.ConfigDict, batch: int, size: int) -> float:
  """Embeddings of square windows and of their segments; finding each pixel's segment is left out."""
  segments = [count for groups, count in zip(model.vision.num_group_tokens, model.vision.num_segments) if groups][-1]
  return encode_images(model, batch, size) + batch * segments * projector(
    model.vision.width, model.projector_dim, model.embed_dim
  )


def encode_images(model: ml_collections.ConfigDict, batch: int, size: int) -> float:
  """Embeddings of square pictures."""
  return batch * (
    image_tower(model.vision, size, size) + projector(model.vision.width, model.projector_dim, model.embed_dim)
  )
