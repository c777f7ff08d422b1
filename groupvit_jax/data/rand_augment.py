"""RandAugment as timm's `rand-m9-mstd0.5-inc1` defines it (Cubuk et al. 2020; timm's parameters).

Of the 15 operations two are drawn, with replacement; each is applied with a probability, at a strength drawn
around `magnitude`. All work on uint8. Operations on single pixels, and sharpness, match Pillow exactly. Those that move
pixels round to the nearest level, where Pillow rounds down, and fade into the fill colour over one pixel, where Pillow
cuts.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import NamedTuple

import cv2
import numpy as np

FILL = (124, 116, 104)  # ImageNet's mean colour: what geometric operations show outside the image

NUM_OPS = 2
_FULL_MAGNITUDE = 10
_LEVELS = np.arange(256)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """uint8 [H, W, 3] -> uint8 [H, W, 3]; a pure function of (pixels, rng)."""

  probability: float  # of applying an operation that was drawn
  magnitude: float  # 0 to 10
  magnitude_std: float  # in the same units
  num_ops: int = NUM_OPS

  def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    for _ in range(self.num_ops):
      op = OPS[rng.integers(len(OPS))]
      if rng.random() < self.probability:
        magnitude = min(max(rng.normal(self.magnitude, self.magnitude_std), 0.0), _FULL_MAGNITUDE)
        sign = 1 if rng.random() < 0.5 else -1
        pixels = op.function(pixels, op.argument(magnitude / _FULL_MAGNITUDE, sign))
    return pixels


class Op(NamedTuple):
  """An operation: its strength from (level in [0, 1], sign), and what it does at that strength."""

  name: str
  argument: Callable[[float, int], float]
  function: Callable[[np.ndarray, float], np.ndarray]


def autocontrast(pixels: np.ndarray) -> np.ndarray:
  """Stretches each channel to 0..255."""
  rows = pixels.reshape(len(pixels), -1)  # NumPy is quick along long axes only
  darkest = rows.min(axis=0).reshape(-1, 3).min(axis=0)
  brightest = rows.max(axis=0).reshape(-1, 3).max(axis=0)
  tables = [_stretch(int(low), int(high)) for low, high in zip(darkest, brightest)]
  return _look_up(pixels, np.stack(tables, axis=-1))


def equalize(pixels: np.ndarray) -> np.ndarray:
  """Gives each channel a flat histogram."""
  histograms = [cv2.calcHist([pixels], [channel], None, [256], [0, 256]) for channel in range(3)]
  tables = [_flatten(histogram.ravel().astype(np.int64)) for histogram in histograms]
  return _look_up(pixels, np.stack(tables, axis=-1))


def solarize(pixels: np.ndarray, threshold: int) -> np.ndarray:
  """Inverts the values from `threshold` on."""
  return _look_up(pixels, np.where(_LEVELS < threshold, _LEVELS, 255 - _LEVELS))


def solarize_add(pixels: np.ndarray, amount: int) -> np.ndarray:
  """Brightens the values below 128 by `amount`."""
  return _look_up(pixels, np.where(_LEVELS < 128, np.minimum(_LEVELS + amount, 255), _LEVELS))


def color(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Moves colours away from grey: 0 is grey, 1 the image itself."""
  grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
  return _blend(grey, pixels, factor)


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Moves values away from the mean grey: 0 is that grey, 1 the image itself."""
  mean = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
  return _look_up(pixels, _blend_levels(mean, factor))


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Moves values away from their neighbours' mean: 0 is smooth, 1 the image; its border stays."""
  smooth = cv2.filter2D(pixels, -1, _SMOOTH)
  sharp = _blend(smooth, pixels, factor)
  sharp[[0, -1]], sharp[:, [0, -1]] = pixels[[0, -1]], pixels[:, [0, -1]]
  return sharp


def rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
  """Turns the image around its middle, counter-clockwise."""
  height, width = pixels.shape[:2]
  cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  x, y = width / 2, height / 2
  return _warp(pixels, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def _stretch(low: int, high: int) -> np.ndarray:
  """The table that maps low..high to 0..255."""
  if high <= low:
    return _LEVELS
  scale = 255.0 / (high - low)
  return np.clip((_LEVELS * scale - low * scale).astype(np.int64), 0, 255)


def _flatten(histogram: np.ndarray) -> np.ndarray:
  """The table that makes a histogram [256] flat."""
  used = histogram[histogram > 0]
  step = (histogram.sum() - used[-1]) // 255
  if len(used) < 2 or step == 0:
    return _LEVELS
  return np.minimum((step // 2 + np.cumsum(histogram) - histogram) // step, 255)


def _look_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Replaces values by those of a table [256], or of one [256, 3] for each channel."""
  return cv2.LUT(pixels, table.astype(np.uint8).reshape(1, 256, -1))


def _blend_levels(level: int, factor: float) -> np.ndarray:
  """The table of `_blend` with a constant."""
  blended = np.float32(level) + np.float32(factor) * (_LEVELS - level).astype(np.float32)
  return np.clip(blended, 0, 255).astype(np.uint8)


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
  """start + factor (end - start), cut to 0..255 and, as Pillow does, rounded down."""
  return cv2.addWeighted(start, 1 - factor, end, factor, -0.4999)  # OpenCV rounds to the nearest


def _warp(pixels: np.ndarray, matrix: list[list[float]]) -> np.ndarray:
  """Takes the pixel at (x, y) from `matrix` (x, y, 1), bilinearly; (0, 0) is the corner."""
  (a, b, c), (d, e, f) = matrix
  # OpenCV counts from the middle of the first pixel.
  centred = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
  return cv2.warpAffine(
    pixels,
    centred,
    pixels.shape[1::-1],
    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=FILL,
  )


def _enhance(level: float, sign: int) -> float:
  return max(0.1, 1 + sign * 0.9 * level)  # 1 changes nothing


def _shear(level: float, sign: int) -> float:
  return sign * 0.3 * level


def _translate(level: float, sign: int) -> float:
  return sign * 0.45 * level


# 'inc1': posterize, solarize and the enhancements grow stronger with the level.
OPS = (
  Op('autocontrast', lambda level, sign: 0, lambda pixels, _: autocontrast(pixels)),
  Op('equalize', lambda level, sign: 0, lambda pixels, _: equalize(pixels)),
  Op('invert', lambda level, sign: 0, lambda pixels, _: ~pixels),
  Op('rotate', lambda level, sign: sign * 30 * level, rotate),
  Op(
    'posterize', lambda level, sign: 4 - int(4 * level), lambda pixels, bits: pixels & np.uint8(256 - 2 ** (8 - bits))
  ),
  Op('solarize', lambda level, sign: 256 - int(256 * level), solarize),
  Op('solarize_add', lambda level, sign: int(110 * level), solarize_add),
  Op('color', _enhance, color),
  Op('contrast', _enhance, contrast),
  Op('brightness', _enhance, lambda pixels, factor: _look_up(pixels, _blend_levels(0, factor))),
  Op('sharpness', _enhance, sharpness),
  Op('shear_x', _shear, lambda pixels, factor: _warp(pixels, [[1, factor, 0], [0, 1, 0]])),
  Op('shear_y', _shear, lambda pixels, factor: _warp(pixels, [[1, 0, 0], [factor, 1, 0]])),
  Op('translate_x', _translate, lambda pixels, share: _warp(pixels, [[1, 0, share * pixels.shape[1]], [0, 1, 0]])),
  Op('translate_y', _translate, lambda pixels, share: _warp(pixels, [[1, 0, 0], [0, 1, share * pixels.shape[0]]])),
)
