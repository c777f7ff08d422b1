"""From a picture to the windows a model sees: resizing and cutting, on the host."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import os
from typing import TypeVar

import cv2
import numpy as np

from groupvit_jax.errors import UserError
from groupvit_jax.eval.protocols import Protocol

_MOST_THREADS = 16  # more pictures a second than these decode, no accelerator labels; each holds two pictures

T = TypeVar('T')
R = TypeVar('R')


@dataclasses.dataclass(frozen=True)
class Picture:
  """A picture cut into windows.

  Attributes:
    key: its name.
    original: rows and columns as it came.
    resized: rows and columns after resizing.
    tops: first row of each of the K windows in the resized picture.
    lefts: first column of each.
    windows: uint8 [K, H, W, 3].
    label: uint8 [rows, columns] as it came, 255 to ignore; None where there is none.
  """

  key: str
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
  """Rows and columns of a picture after resizing.

  The short side becomes `protocol.short_side` unless the long side would pass its bound; the aspect
  ratio is kept, rounded half up as mmcv does. A side never shrinks below one patch.
  """
  short, long = sorted((height, width))
  scale = min(protocol.max_long_side / long, protocol.short_side / short)
  rows, columns = (max(int(side * scale + 0.5), patch_size) for side in (height, width))
  return rows, columns


def window_starts(length: int, protocol: Protocol) -> list[int]:
  """First pixel of each window along an axis; the last window is moved back inside."""
  count = protocol.windows_along(length)
  return [min(i * protocol.stride, max(length - protocol.window, 0)) for i in range(count)]


def cut_picture(
  image: np.ndarray, protocol: Protocol, patch_size: int, *, key: str, label: np.ndarray | None = None
) -> Picture:
  """Resizes a picture and cuts it into windows.

  Args:
    image: uint8 [rows, columns, 3].
    protocol: sizes.
    patch_size: of the model, in pixels.
    key: name of the picture, for messages.
    label: uint8 [rows, columns], or None.

  Returns:
    The picture.

  Raises:
    ValueError: the image is not 8-bit RGB, or its label map is of another size.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    raise UserError(f'picture {key!r} is {image.dtype} {image.shape}; make it uint8 [H, W, 3]')
  height, width = image.shape[:2]
  if label is not None and label.shape != (height, width):
    raise UserError(f'picture {key!r} is {height} x {width} px, its label map {label.shape}; make them one size')
  rows, columns = resized_size(height, width, protocol, patch_size)
  # Published figures are made with OpenCV's bilinear; Pillow's, called so too, antialiases.
  shrinks = protocol.antialias and rows < height
  method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
  resized = cv2.resize(image, (columns, rows), interpolation=method)
  starts = [(y, x) for y in window_starts(rows, protocol) for x in window_starts(columns, protocol)]
  side = protocol.window
  windows = np.stack([resized[y : y + side, x : x + side] for y, x in starts])
  tops, lefts = zip(*starts)
  return Picture(key, (height, width), (rows, columns), tops, lefts, windows, label)


def decode_threads() -> int:
  """Threads that decode and resize pictures ahead of the devices: one for each core, within reason."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return min(cores, _MOST_THREADS)


def prefetch(make: Callable[[T], R], items: Iterable[T], *, num_threads: int) -> Iterator[R]:
  """`map(make, items)` in order, with threads that work ahead; 0 threads work in the caller.

  At most two results per thread wait, which bounds the memory.
  """
  if not num_threads:
    yield from map(make, items)
    return
  waiting: collections.deque[Future[R]] = collections.deque()
  with ThreadPoolExecutor(num_threads) as pool:
    try:
      for item in items:
        waiting.append(pool.submit(make, item))
        if len(waiting) > 2 * num_threads:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)
