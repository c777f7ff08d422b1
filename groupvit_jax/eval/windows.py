"""Resizes an image and cuts it into the windows that a model sees."""

import dataclasses

import cv2
import numpy as np

from groupvit_jax.errors import UserError
from groupvit_jax.eval.protocols import Protocol


@dataclasses.dataclass(frozen=True)
class CutImage:
  """An image cut into windows.

  Attributes:
    key: its name.
    index: its number in its source.
    original: rows and columns before resizing.
    resized: rows and columns after resizing.
    tops: first row of each of the K windows in the resized image.
    lefts: first column of each.
    windows: uint8 [K, H, W, 3].
    label: uint8 label map [rows, columns] of the original size, 255 to ignore; None where there is none.
  """

  key: str
  index: int
  original: tuple[int, int]
  resized: tuple[int, int]
  tops: tuple[int, ...]
  lefts: tuple[int, ...]
  windows: np.ndarray
  label: np.ndarray | None = None

  @property
  def window_size(self) -> tuple[int, int]:
    """Rows and columns of a window."""
    return self.windows.shape[1:3]


def resized_size(height: int, width: int, protocol: Protocol, patch_size: int) -> tuple[int, int]:
  """Rows and columns of an image after resizing.

  The short side becomes `protocol.short_side` unless the long side would pass its bound; the aspect
  ratio is kept, rounded half up as mmcv does. A side never shrinks below one patch. With resize='square' both sides are
  `short_side`.
  """
  if protocol.resize == 'square':
    return protocol.short_side, protocol.short_side
  short, long = sorted((height, width))
  scale = min(protocol.max_long_side / long, protocol.short_side / short)
  rows, columns = (max(int(side * scale + 0.5), patch_size) for side in (height, width))
  return rows, columns


def window_starts(length: int, protocol: Protocol) -> list[int]:
  """First pixel of each window along an axis; the last window is moved back inside."""
  count = protocol.windows_along(length)
  return [min(i * protocol.stride, max(length - protocol.window, 0)) for i in range(count)]


def cut_image(
  image: np.ndarray, protocol: Protocol, patch_size: int, *, key: str, index: int = 0, label: np.ndarray | None = None
) -> CutImage:
  """Resizes an image, uint8 [rows, columns, 3], and cuts it into windows.

  Raises:
    ValueError: the image is not 8-bit RGB, or its label map is of another size.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    raise UserError(f'image {key!r} is {image.dtype} {image.shape}; make it uint8 [H, W, 3]')
  height, width = image.shape[:2]
  if label is not None and label.shape != (height, width):
    raise UserError(f'image {key!r} is {height} x {width} px, its label map {label.shape}; make them one size')
  rows, columns = resized_size(height, width, protocol, patch_size)
  # Published results use OpenCV's bilinear resize; Pillow's bilinear antialiases.
  shrinks = protocol.antialias and rows < height
  resized = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
  starts = [(y, x) for y in window_starts(rows, protocol) for x in window_starts(columns, protocol)]
  side = protocol.window
  windows = np.stack([resized[y : y + side, x : x + side] for y, x in starts])
  tops, lefts = zip(*starts)
  return CutImage(key, index, (height, width), (rows, columns), tops, lefts, windows, label)
