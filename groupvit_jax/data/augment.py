"""Augmentation of one image on the host: crop, resize, flip and RandAugment.

Random erasing and normalisation belong to the training step: `model/pixels.py`.
"""

import dataclasses
import io
import math
from typing import NamedTuple

import cv2
import ml_collections
import numpy as np
from PIL import Image

from groupvit_jax.data import images
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.rand_augment import RandAugment

MIN_SIDE = 16  # pixels
_ATTEMPTS = 10
_REDUCTIONS = (8, 4, 2)


class Box(NamedTuple):
  """A part of an image, in pixels."""

  top: int
  left: int
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class Augment:
  """Random resized crop, bilinear, then a random flip and RandAugment: a pure function of (image, rng)."""

  size: tuple[int, int]  # (H, W)
  area: tuple[float, float]  # the crop's share of the image's area
  ratio: tuple[float, float]  # the crop's width / height
  flip: float  # probability of a horizontal flip
  rand_augment: RandAugment | None
  min_side: int = MIN_SIDE  # smaller images are bad records
  max_pixels: int = images.LARGEST  # larger ones are, before they are decoded

  def __call__(self, image: bytes | np.ndarray, rng: np.random.Generator, key: str) -> np.ndarray:
    """Augments an image, uint8 [H, W, 3]: a file (JPEG, PNG, WebP, ...) or its pixels, uint8 [h, w, 3].

    `key` is its name in errors. Raises BadRecord for one that is corrupt, truncated, tiny or huge.
    """
    pixels, box = self.read_crop(image, rng, key)
    pixels = resize_box(pixels, box, self.size)
    if rng.random() < self.flip:
      pixels = cv2.flip(pixels, 1)
    return pixels if self.rand_augment is None else self.rand_augment(pixels, rng)

  def read_crop(self, image: bytes | np.ndarray, rng: np.random.Generator, key: str) -> tuple[np.ndarray, Box]:
    """Draws a crop and decodes what it needs: uint8 [h', w', 3], and the crop's box there."""
    header = images.read_jpeg_header(image, key) if isinstance(image, bytes) else None
    if header is None:
      pixels = self._decode_whole(image, key) if isinstance(image, bytes) else image
      self._check_size(*pixels.shape[:2], key)
      return pixels, random_box(*pixels.shape[:2], self.area, self.ratio, rng)
    self._check_size(header.height, header.width, key)
    box = random_box(header.height, header.width, self.area, self.ratio, rng)
    reduction = _reduction(box, self.size)
    pixels = images.decode_jpeg_rows(image, header, box.top + box.height, reduction, key)
    return pixels, _reduce(box, reduction)

  def _decode_whole(self, data: bytes, key: str) -> np.ndarray:
    """Decodes what `images.read_jpeg_header` leaves alone."""
    try:
      with Image.open(io.BytesIO(data)) as image:
        self._check_size(image.height, image.width, key)
      return images.decode_image(data, key)
    except BadRecord:
      raise
    except Image.DecompressionBombError as error:
      raise BadRecord('image_huge', key) from error
    except Exception as error:  # which one depends on the format and on where the damage is
      cause = 'image_truncated' if 'truncated' in str(error) else 'image_corrupt'
      raise BadRecord(cause, key) from error

  def _check_size(self, height: int, width: int, key: str) -> None:
    if min(height, width) < self.min_side:
      raise BadRecord('image_tiny', key)
    if height * width > self.max_pixels:
      raise BadRecord('image_huge', key)


def build_augment(config: ml_collections.ConfigDict, image_size: tuple[int, int]) -> Augment | None:
  """Builds what a config's `data.augment` names, for a model of images of (H, W).

  'none' is for pixels that have the model's size already, 'plain' for crops and flips, 'rand_augment' for RandAugment
  on top.
  """
  if config.name == 'none':
    return None
  rand_augment = None
  if config.name == 'rand_augment':
    rand_augment = RandAugment(config.op_probability, config.magnitude, config.magnitude_std)
  return Augment(tuple(image_size), tuple(config.area), tuple(config.ratio), config.flip, rand_augment)


def random_box(
  height: int, width: int, area: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
  """Draws the crop of an image (Szegedy et al. 2015, as torchvision defines it).

  The area is uniform, the ratio log-uniform, the position uniform. When ten crops do not fit, it is the largest one in
  the middle whose ratio lies in the range.
  """
  for _ in range(_ATTEMPTS):
    pixels = rng.uniform(*area) * height * width
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    if 0 < w <= width and 0 < h <= height:
      return Box(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)
  w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
  return Box((height - h) // 2, (width - w) // 2, h, w)


def resize_box(pixels: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
  """Resizes a part of an image as Pillow's bilinear filter does, within a level or so: uint8 [H, W, 3].

  Pillow widens its filter, a triangle, by the factor r by which it makes an image smaller; OpenCV's bilinear does not.
  So a Gaussian runs first that adds the missing variance: a triangle's is r^2 / 6, and sampling between pixels, which
  OpenCV does as well, is worth about half of 1 / 6.
  """
  part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
  sigma_y, sigma_x = _blur(box.height / size[0]), _blur(box.width / size[1])
  if sigma_y or sigma_x:
    part = cv2.GaussianBlur(part, (_taps(sigma_x), _taps(sigma_y)), sigma_x, sigmaY=sigma_y)
  return cv2.resize(part, size[::-1], interpolation=cv2.INTER_LINEAR)


def _blur(factor: float) -> float:
  """The Gaussian's standard deviation, in pixels, before pixels are made `factor` times fewer."""
  return math.sqrt((factor**2 - 0.5) / 6) if factor > 1 else 0.0


def _taps(sigma: float) -> int:
  """How many pixels the Gaussian spans: two deviations to each side; more changes nothing."""
  return 2 * round(2 * sigma) + 1


def _reduction(box: Box, size: tuple[int, int]) -> int:
  """How many times smaller a crop may be decoded and still be twice as large as needed."""
  room = min(box.height / size[0], box.width / size[1]) / 2
  return next((reduction for reduction in _REDUCTIONS if reduction <= room), 1)


def _reduce(box: Box, reduction: int) -> Box:
  """The box in an image made smaller: at most a quarter of an output pixel off."""
  top, left = round(box.top / reduction), round(box.left / reduction)
  bottom = round((box.top + box.height) / reduction)
  right = round((box.left + box.width) / reduction)
  return Box(top, left, bottom - top, right - left)
