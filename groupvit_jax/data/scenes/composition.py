"""Composition of a scene: positions and occlusion of things, light, painting."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_OVERHANG = 0.25  # share of a thing's box that may lie outside the image


class Placed(NamedTuple):
  """A thing in a scene: the window of its sprite that is in the image, and where it lies."""

  name: int  # index of the thing's class
  rgb: np.ndarray  # uint8 [3, h, w], colours multiplied by alpha
  clear: np.ndarray  # float32 [h, w], 1 - alpha
  rows: slice  # of the image
  columns: slice
  gain: np.ndarray  # float32 [3, 1, 1], its colour jitter


class Layout(NamedTuple):
  """Everything random about a scene."""

  stuff: int  # index of the background's class
  texture: np.ndarray  # uint8 [3, H, W], its colours
  light: np.ndarray  # float32 [3, H, W], multiplies the texture
  noise: np.ndarray  # float32 [H, W], added to the scene
  placed: list[Placed]  # from back to front
  owner: np.ndarray  # uint8 [H, W], 0 for the stuff, k for the k-th thing placed
  caption: str


def find_room(
  owner: np.ndarray,
  mask: np.ndarray,
  area: int,
  spots: Sequence[tuple[float, float]],
  spare: list[float],
  min_visible: float,
) -> tuple[slice, slice, tuple[slice, slice]] | None:
  """First position where the thing, and all below it, stay visible enough.

  Args:
    owner: uint8 [H, W], 0 for the stuff, k for the k-th thing placed.
    mask: bool [h, w], the thing's pixels.
    area: their number.
    spots: positions to try, pairs of numbers in [0, 1).
    spare: pixels that each owner can lose; updated, and extended, where a position is found.
    min_visible: share of the thing's pixels that must be in the image.

  Returns:
    Rows and columns of the image and the window of the sprite, or None.
  """
  for attempt, (u, v) in enumerate(spots):
    # Each try hangs out less than the one before; the last lies inside the image.
    overhang = _OVERHANG * (1 - attempt / (len(spots) - 1))
    rows, window_rows = _span(u, mask.shape[0], owner.shape[0], overhang)
    columns, window_columns = _span(v, mask.shape[1], owner.shape[1], overhang)
    window = window_rows, window_columns
    visible = mask[window]
    covered = np.bincount(owner[rows, columns][visible], minlength=len(spare)).tolist()
    left = [old - lost for old, lost in zip(spare, covered)]
    own = sum(covered) - min_visible * area
    if min(left) >= 0 and own >= 0:
      spare[:] = [*left, own]
      return rows, columns, window
  return None


def _span(u: float, length: int, size: int, overhang: float) -> tuple[slice, slice]:
  """Puts `length` pixels somewhere along `size`; the span covered, and the part that covers it."""
  margin = overhang * length
  start = round(u * (size - length + 2 * margin) - margin)
  first, last = max(start, 0), min(start + length, size)
  return slice(first, last), slice(first - start, last - start)


def paint_scene(layout: Layout) -> np.ndarray:
  """Lays the things over the stuff, from back to front: uint8 [H, W, 3]."""
  canvas = layout.texture * layout.light  # [3, H, W]
  for thing in layout.placed:
    window = canvas[:, thing.rows, thing.columns]
    window *= thing.clear
    window += thing.rgb * thing.gain
  canvas += layout.noise
  planes = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
  image = np.empty((*planes.shape[1:], 3), np.uint8)
  for channel, plane in enumerate(planes):  # three strided copies beat one transposed copy
    image[:, :, channel] = plane
  return image


def pick(draws: Iterator[float], choices: int) -> int:
  """One of 0..choices-1."""
  return int(next(draws) * choices)


def cut_window(draws: Iterator[float], plane: np.ndarray, size: int) -> np.ndarray:
  """A random [..., size, size] window of an array whose last two axes are larger."""
  row, column = (pick(draws, plane.shape[-1] - size + 1) for _ in range(2))
  return plane[..., row : row + size, column : column + size]


def turn_texture(draws: Iterator[float], texture: np.ndarray, turns: bool) -> np.ndarray:
  """Mirrors a texture at random and, where it may, stands it on its side or head."""
  mirror, head, side = (next(draws) < 0.5 for _ in range(3))
  texture = texture[:, :: -1 if turns and head else 1, :: -1 if mirror else 1]
  return texture.swapaxes(1, 2) if turns and side else texture


def light_scene(draws: Iterator[float], size: int) -> np.ndarray:
  """Brightness with a slight tint, falling off linearly across the scene: float32 [3, H, W]."""
  level, down, across = (next(draws) for _ in range(3))
  tint = np.float32([next(draws), next(draws), next(draws)]) * 0.12 - 0.06
  ramp = np.linspace(-0.15, 0.15, size, dtype=np.float32)
  plane = ramp[:, None] * (2 * down - 1) + ramp * (2 * across - 1)
  return plane + (tint + (0.82 + 0.3 * level))[:, None, None]
