"""Image and text towers, projected into one space (paper section 3.3)."""

import functools
import math
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from groupvit_jax.errors import UserError
from groupvit_jax.model.attention import Implementation
from groupvit_jax.model.layers import bias_init, project, sample_keys
from groupvit_jax.model.pixels import normalize_images
from groupvit_jax.model.text import TextTower
from groupvit_jax.model.text_packing import one_a_row, TextRows
from groupvit_jax.model.vision import VisionOutput, VisionTower


class ImageOutput(NamedTuple):
  """Output of `encode_image`; embeddings are not normalised."""

  embeds: jax.Array  # [B, E]
  segments: jax.Array  # [B, S, D], not projected
  assignments: tuple[jax.Array, ...]  # per grouping stage [B, S, N], soft


class SegmentOutput(NamedTuple):
  """Output of `encode_segments`; embeddings are not normalised."""

  image_embeds: jax.Array  # [B, E]
  segment_embeds: jax.Array  # [B, S, E]
  assignments: tuple[jax.Array, ...]  # per grouping stage [B, S, N], soft


class Projected(NamedTuple):
  """Input of the losses; embeddings are not normalised."""

  image_embeds: jax.Array  # [B, E]
  text_embeds: jax.Array  # [B, T, E], captions first, then prompts
  logit_scale: jax.Array  # [], log temperature of the captions
  multi_label_logit_scale: jax.Array | None  # [], of the prompts; None for a model without them


class ImageTextOutput(NamedTuple):
  """Output of the whole model: the fields of `Projected`, and the assignments."""

  image_embeds: jax.Array
  text_embeds: jax.Array
  logit_scale: jax.Array
  multi_label_logit_scale: jax.Array | None
  assignments: tuple[jax.Array, ...]  # per grouping stage [B, S, N], soft


class BatchNorm(nn.BatchNorm):
  """Flax's BatchNorm, with torch's running variance: unbiased, n / (n - 1) times that of the n rows of a batch."""

  def __call__(self, x: jax.Array) -> jax.Array:
    before = self.get_variable('batch_stats', 'var')
    out = super().__call__(x)
    if not (self.use_running_average or self.is_initializing()):
      after = self.get_variable('batch_stats', 'var')  # momentum * before + (1 - momentum) * the batch's
      excess = (after - self.momentum * before) / max(x[..., 0].size - 1, 1)
      self.put_variable('batch_stats', 'var', after + excess)
    return out


class Projector(nn.Module):
  """Linear, BatchNorm over the global batch, ReLU, Linear: [..., D] -> [..., E], float32 out."""

  hidden: int
  out: int
  dtype: jnp.dtype = jnp.float32
  torch_init: bool = False  # whether biases start as torch's, else at zero

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
    kernel = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # torch's default for a Linear
    dense = functools.partial(nn.Dense, kernel_init=kernel, dtype=self.dtype, dot_general=project)
    x = dense(self.hidden, bias_init=bias_init(self.torch_init, x.shape[-1]), name='fc1')(x)
    # Flax's momentum is the share that is kept, torch's (0.1) the share that is replaced.
    x = BatchNorm(
      use_running_average=not train, momentum=0.9, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, name='norm'
    )(x)
    x = dense(self.out, bias_init=bias_init(self.torch_init, self.hidden), name='fc2')(jax.nn.relu(x))
    return x.astype(jnp.float32)


class ImageTextModel(nn.Module):
  """GroupViT: learns segments from image-text pairs."""

  vision: VisionTower
  text: TextTower
  embed_dim: int  # E
  projector_dim: int
  multi_label: bool  # whether prompts are trained, with a temperature of their own
  init_temperature: float = 0.07
  dtype: jnp.dtype = jnp.float32
  torch_init: bool = False  # of the projectors

  def setup(self):
    sizes = self.projector_dim, self.embed_dim
    self.image_projector = Projector(*sizes, self.dtype, self.torch_init)
    self.text_projector = Projector(*sizes, self.dtype, self.torch_init)
    init_scale = nn.initializers.constant(math.log(1 / self.init_temperature))
    self.logit_scale = self.param('logit_scale', init_scale, (), jnp.float32)
    if self.multi_label:
      self.multi_label_logit_scale = self.param('multi_label_logit_scale', init_scale, (), jnp.float32)

  def __call__(
    self, images: jax.Array, tokens: jax.Array, *, train: bool = False, key: jax.Array | None = None
  ) -> ImageTextOutput:
    """Embeds image-text pairs.

    Args:
      images: [B, H, W, 3], normalised.
      tokens: ids [B, T, L]: a caption and T - 1 prompts per image.
      train: whether BatchNorm uses (and updates) the batch's statistics.
      key: source of stochastic depth and Gumbel noise; None for neither.
    """
    keys = None if key is None else sample_keys(key, len(images))
    vision = self.vision(images, keys=keys)
    return ImageTextOutput(*self.project(vision.pooled, self._text_features(tokens), train=train), vision.assignments)

  def with_attention(self, implementation: Implementation) -> 'ImageTextModel':
    """The same model with another implementation of attention."""
    vision, text = (tower.clone(attention=implementation) for tower in (self.vision, self.text))
    return self.clone(vision=vision, text=text)

  def with_dtype(self, dtype: jnp.dtype) -> 'ImageTextModel':
    """The same model with matmuls of another dtype."""
    return self.clone(vision=self.vision.clone(dtype=dtype), text=self.text.clone(dtype=dtype), dtype=dtype)

  def vision_features(self, images: jax.Array, *, keys: jax.Array | None = None) -> VisionOutput:
    """Output of the image tower for images [B, H, W, 3]; `keys` [B] from `sample_keys`, None for no noise."""
    return self.vision(images, keys=keys)

  def text_features(self, rows: TextRows) -> jax.Array:
    """Features [P * n, D] of P groups of n texts, not projected."""
    return self.text(rows)

  def project(self, image_features: jax.Array, text_features: jax.Array, *, train: bool = False) -> Projected:
    """Projects the towers' features of a whole batch.

    Args:
      image_features: [B, D], or [B, 1 + S, D] with segments: BatchNorm sees all of them alike.
      text_features: [B, T, D].
      train: whether BatchNorm uses (and updates) the batch's statistics.

    Returns:
      Embeddings and log temperatures.
    """
    return Projected(
      self.image_projector(image_features, train=train),
      self.text_projector(text_features, train=train),
      self.logit_scale,
      self.multi_label_logit_scale if self.multi_label else None,
    )

  def encode_image(self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None) -> ImageOutput:
    """Embeds images [B, H, W, 3]; arguments as in `__call__`."""
    out = self.vision(images, keys=None if key is None else sample_keys(key, len(images)))
    return ImageOutput(self.image_projector(out.pooled, train=train), out.segments, out.assignments)

  def encode_segments(self, images: jax.Array) -> SegmentOutput:
    """Embeds images [B, H, W, 3] and each of their final segments, for segmentation."""
    out = self.vision(images)
    return SegmentOutput(self.image_projector(out.pooled), self.image_projector(out.segments), out.assignments)

  def encode_pixels(self, images: jax.Array) -> SegmentOutput:
    """`encode_segments` of uint8 images [B, H, W, 3]."""
    return self.encode_segments(normalize_images(images))

  def encode_text(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    """Embeds texts [..., L], -> [..., E]."""
    return self.text_projector(self._text_features(tokens), train=train)

  def _text_features(self, tokens: jax.Array) -> jax.Array:
    """Features [..., D] of tokens [..., L]."""
    length, most = tokens.shape[-1], self.text.context_length
    if length > most:
      raise UserError(f'texts of {length} tokens exceed the context length {most}; cut them')
    features = self.text(one_a_row(tokens.reshape(-1, length), self.text.eos_id))
    return features.reshape(*tokens.shape[:-1], features.shape[-1])
