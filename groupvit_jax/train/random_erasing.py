"""Random erasing with pixel noise, in the training step (Zhong et al. 2020; timm's parameters)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_collections

from groupvit_jax.errors import UserError

AREA = (0.02, 1 / 3)  # the rectangle's share of the image
ASPECT = (0.3, 1 / 0.3)  # its height / width

_ATTEMPTS = 10
_STREAM = 0x65726173  # the towers fold their stages' numbers into the same keys


@dataclasses.dataclass(frozen=True)
class RandomErasing:
  """Fills a rectangle of some images with standard normal noise, each pixel and channel its own.

  The area is uniform in `AREA`, the aspect log-uniform in `ASPECT`, the place uniform. Of ten
  rectangles the first one that is smaller than the image is taken.
  """

  probability: float  # of erasing in an image

  def __call__(self, images: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns images [B, H, W, 3], erased.

    Args:
      images: float [B, H, W, 3], with mean 0 and deviation 1.
      keys: [B], one for each sample (see `sample_keys`).
    """
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, _STREAM)
    return jax.vmap(self._erase)(images, keys)

  def _erase(self, image: jax.Array, key: jax.Array) -> jax.Array:
    whether_key, box_key, noise_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, image.shape, image.dtype)
    erased = jnp.where(_rectangle(box_key, *image.shape[:2])[:, :, None], noise, image)
    return jnp.where(jax.random.bernoulli(whether_key, self.probability), erased, image)


def build_random_erasing(config: ml_collections.ConfigDict) -> RandomErasing | None:
  """Builds what a config's `data.augment` asks for: None for augmentation 'none', or `erase` 0.

  Raises:
    ValueError: `erase` is no probability.
  """
  if config.name == 'none' or config.erase == 0:
    return None
  if not 0 < config.erase <= 1:
    raise UserError(f'data.augment.erase={config.erase}: use a probability, 0 to 1')
  return RandomErasing(config.erase)


def _rectangle(key: jax.Array, height: int, width: int) -> jax.Array:
  """True [H, W] inside a random rectangle."""
  area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
  area = height * width * jax.random.uniform(area_key, _ATTEMPTS, minval=AREA[0], maxval=AREA[1])
  low, high = (math.log(aspect) for aspect in ASPECT)
  aspect = jnp.exp(jax.random.uniform(aspect_key, _ATTEMPTS, minval=low, maxval=high))
  heights = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
  widths = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
  fits = (heights < height) & (widths < width)
  chosen = jnp.argmax(fits)
  h, w = heights[chosen], widths[chosen]
  top = jax.random.randint(top_key, (), 0, jnp.maximum(height - h, 0) + 1)
  left = jax.random.randint(left_key, (), 0, jnp.maximum(width - w, 0) + 1)
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
  return (rows >= top) & (rows < top + h) & (columns >= left) & (columns < left + w) & fits[chosen]
