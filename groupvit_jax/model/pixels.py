"""Pixels on the device: normalization and random erasing (Zhong et al. 2020; timm's parameters)."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

# ImageNet statistics of RGB in [0, 1].
IMAGE_MEAN = np.array([[[[0.485, 0.456, 0.406]]]], np.float32)
IMAGE_STD = np.array([[[[0.229, 0.224, 0.225]]]], np.float32)

AREA = (0.02, 1 / 3)  # the rectangle's share of the image
ASPECT = (0.3, 1 / 0.3)  # its height / width

_ATTEMPTS = 10
_STREAM = 0x65726173  # the towers fold their stages' numbers into the same keys


def normalize_images(images: jax.Array) -> jax.Array:
  """uint8 pixels [B, H, W, 3] -> float32, with ImageNet's mean and standard deviation."""
  return (images.astype(jnp.float32) / 255 - IMAGE_MEAN) / IMAGE_STD


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
