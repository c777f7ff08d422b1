"""Pixel normalization: uint8 images to what the image tower takes."""

import jax
import jax.numpy as jnp
import numpy as np

# ImageNet statistics of RGB in [0, 1].
IMAGE_MEAN = np.array([[[[0.485, 0.456, 0.406]]]], np.float32)
IMAGE_STD = np.array([[[[0.229, 0.224, 0.225]]]], np.float32)


def normalize_images(images: jax.Array) -> jax.Array:
  """uint8 pixels [B, H, W, 3] -> float32, with ImageNet's mean and standard deviation."""
  return (images.astype(jnp.float32) / 255 - IMAGE_MEAN) / IMAGE_STD
