"""Procedural textures: the nameable backgrounds of the embedded scenes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

# (generator, n, unit) to colours in 0..1, float32 [n, n, 3]; `unit` is the side of a scene in pixels, so that the
# pattern looks the same at every scene size.
_Painter = Callable[[np.random.Generator, int, float], np.ndarray]


class Stuff(NamedTuple):
  """A background that captions can name."""

  places: tuple[str, ...]  # phrases of a caption for the things on it; each names the class
  paint: _Painter
  turns: bool  # whether it looks natural turned by a quarter or upside down


def paint_texture(stuff: Stuff, rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  """Paints one texture, uint8 [3, n, n], for scenes of `unit` pixels a side."""
  colours = stuff.paint(rng, n, float(unit)) * 255
  return np.ascontiguousarray(np.clip(colours, 0, 255).astype(np.uint8).transpose(2, 0, 1))


def _smooth(rng: np.random.Generator, n: int, rows: float, columns: float) -> np.ndarray:
  """Smooth noise of unit spread [n, n]: about `rows` x `columns` bumps over the texture."""
  coarse = rng.standard_normal((int(rows) + 2, int(columns) + 2), np.float32)
  noise = np.asarray(Image.fromarray(coarse).resize((n, n), Image.Resampling.BICUBIC))
  return noise / (noise.std() + 1e-6)


def _grain(rng, n: int) -> np.ndarray:
  return rng.standard_normal((n, n), np.float32)


def _colour(rng: np.random.Generator, low: tuple[float, ...], high: tuple[float, ...]) -> np.ndarray:
  """A colour on the segment from `low` to `high`, each channel a little off it: float32 [3]."""
  low, high = np.float32(low), np.float32(high)
  return low + (high - low) * np.float32(rng.random()) + np.float32(rng.normal(0, 0.012, 3))


def _mix(low: np.ndarray, high: np.ndarray, share: np.ndarray) -> np.ndarray:
  """Blends two colours (or textures) by share [n, n] in 0..1, giving [n, n, 3]."""
  share = np.clip(share, 0, 1)[..., None]
  return low * (1 - share) + high * share


def _axes(n: int, unit: float) -> tuple[np.ndarray, np.ndarray]:
  """Pixel centres in scene sides: y [n, 1], x [1, n]."""
  line = (np.arange(n, dtype=np.float32) + 0.5) / unit
  return line[:, None], line[None]


def _cells(rng: np.random.Generator, n: int, unit: float, count: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Worley cells, about `count` to a scene side, one jittered point in each grid square.

  Returns:
    Distance to the nearest point [n, n] (in cells), distance from there to the border with the
    second nearest [n, n], and a random number per cell [n, n] in 0..1.
  """
  y, x = (axis * count for axis in _axes(n, unit))
  grid = int(n / unit * count) + 3
  points = rng.random((grid, grid, 2), np.float32) * 0.9 + 0.05
  value = rng.random((grid, grid), np.float32)
  row, column = y.astype(int), x.astype(int)
  nearest = np.full((n, n), 9, np.float32)
  second, chosen = nearest.copy(), np.zeros((n, n), np.float32)
  for i in (0, 1, 2):  # one ring of squares around the pixel's; points are stored shifted by one
    for j in (0, 1, 2):
      point = points[row + i, column + j]
      distance = np.hypot(row + i - 1 + point[..., 0] - y, column + j - 1 + point[..., 1] - x)
      closer = distance < nearest
      second = np.where(closer, nearest, np.minimum(second, distance))
      chosen = np.where(closer, value[row + i, column + j], chosen)
      nearest = np.minimum(nearest, distance)
  return nearest, second - nearest, chosen


def _grass(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  bumps = n / unit
  blades = _smooth(rng, n, 12 * bumps, 40 * bumps) + 0.8 * _smooth(rng, n, 20 * bumps, 64 * bumps)
  patches = _smooth(rng, n, 3 * bumps, 3 * bumps)
  dark = _colour(rng, (0.05, 0.28, 0.03), (0.14, 0.36, 0.08))
  light = _colour(rng, (0.35, 0.68, 0.12), (0.50, 0.78, 0.25))
  return _mix(dark, light, 0.5 + 0.2 * blades + 0.1 * patches)


def _sky(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  y, _ = _axes(n, unit)
  top = _colour(rng, (0.16, 0.42, 0.85), (0.35, 0.62, 0.95))
  horizon = _colour(rng, (0.62, 0.82, 0.98), (0.75, 0.90, 1.0))
  height = y * unit / n + 0.05 * _smooth(rng, n, 2, 2)
  bumps = n / unit
  cloud = _smooth(rng, n, 3 * bumps, 1.5 * bumps) + 0.4 * _smooth(rng, n, 8 * bumps, 5 * bumps)
  return _mix(_mix(top, horizon, height), np.float32(0.97), 0.9 * (cloud - rng.uniform(0.5, 1.3)))


def _sand(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  y, x = _axes(n, unit)
  bumps = n / unit
  slant = rng.uniform(-0.6, 0.6)
  warp = 0.05 * _smooth(rng, n, 3 * bumps, 3 * bumps)
  ripples = np.sin(2 * np.pi * rng.uniform(5, 9) * (y + slant * x + warp))
  shade = 0.5 + rng.uniform(0.1, 0.28) * ripples + 0.14 * _grain(rng, n)
  dark = _colour(rng, (0.72, 0.56, 0.33), (0.78, 0.64, 0.42))
  light = _colour(rng, (0.92, 0.80, 0.56), (0.97, 0.88, 0.68))
  return _mix(dark, light, shade + 0.08 * _smooth(rng, n, 2 * bumps, 2 * bumps))


def _water(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  y, _ = _axes(n, unit)
  bumps = n / unit
  warp = 0.06 * _smooth(rng, n, 5 * bumps, 3 * bumps)
  warp += 0.025 * _smooth(rng, n, 14 * bumps, 7 * bumps)
  crest = np.sin(2 * np.pi * rng.uniform(5, 8) * (y + warp)) * 0.5 + 0.5
  deep = _colour(rng, (0.00, 0.22, 0.42), (0.02, 0.36, 0.48))
  clear = _colour(rng, (0.05, 0.48, 0.66), (0.12, 0.60, 0.68))
  foam = _colour(rng, (0.65, 0.90, 0.95), (0.80, 0.97, 1.0))
  body = _mix(deep, clear, crest * 0.7 + 0.25 * _smooth(rng, n, 3 * bumps, 2 * bumps))
  return _mix(body, foam, crest**6 * (0.6 + 0.4 * _smooth(rng, n, 6 * bumps, 5 * bumps)))


def _blocks(
  rng: np.random.Generator, n: int, unit: float, rows: float, aspect: float, shift: float
) -> tuple[np.ndarray, np.ndarray]:
  """Rectangles laid in rows: distance to the nearest joint [n, n] in scene sides, value [n, n]."""
  y, x = _axes(n, unit)
  v = y * rows + rng.random()
  row = np.floor(v)
  u = x * rows / aspect + row * shift + rng.random()
  column = np.floor(u)
  gap_v = np.minimum(v - row, row + 1 - v) / rows
  gap_u = np.minimum(u - column, column + 1 - u) * aspect / rows
  values = rng.random((int(row.max()) + 2, int(column.max()) + 2), np.float32)
  return np.minimum(gap_u, gap_v), values[row.astype(int), column.astype(int)]


def _brick(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  gap, value = _blocks(rng, n, unit, rng.uniform(6, 8.5), rng.uniform(1.9, 2.4), 0.5)
  dark = _colour(rng, (0.48, 0.16, 0.10), (0.58, 0.22, 0.14))
  light = _colour(rng, (0.74, 0.32, 0.20), (0.80, 0.38, 0.26))
  mortar = _colour(rng, (0.68, 0.64, 0.60), (0.82, 0.79, 0.75))
  body = _mix(dark, light, value + 0.12 * _grain(rng, n))
  return _mix(body, mortar, (0.016 - gap) * unit + 0.5)


def _snow(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  y, x = _axes(n, unit)
  bumps = n / unit
  warp = 0.12 * _smooth(rng, n, 2 * bumps, 2 * bumps)
  drifts = (rng.uniform(2, 3.5) * (y + rng.uniform(-0.5, 0.5) * x + warp)) % 1  # soft, sharp crest
  shade = _colour(rng, (0.62, 0.74, 0.90), (0.72, 0.81, 0.94))
  lit = _colour(rng, (0.95, 0.97, 0.99), (1.0, 1.0, 1.0))
  body = _mix(shade, lit, 0.25 + 1.1 * drifts + 0.08 * _grain(rng, n))
  return np.where((rng.random((n, n)) < 0.02)[..., None], np.float32(1), body)


def _wood(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  y, _ = _axes(n, unit)
  bumps = n / unit
  gap, value = _blocks(rng, n, unit, rng.uniform(3, 5), rng.uniform(5, 9), 0.37)
  warp = 0.03 * _smooth(rng, n, 4 * bumps, 2 * bumps)
  rings = np.sin(2 * np.pi * (rng.uniform(12, 18) * (y + warp) + 5 * value))
  streaks = _smooth(rng, n, 40 * bumps, 3 * bumps)
  dark = _colour(rng, (0.34, 0.19, 0.08), (0.44, 0.26, 0.12))
  light = _colour(rng, (0.62, 0.40, 0.20), (0.72, 0.48, 0.26))
  body = _mix(dark, light, 0.25 + 0.5 * value + 0.14 * rings + 0.1 * streaks)
  return body * np.clip(0.45 + gap * unit / 1.6, 0, 1)[..., None]


def _night(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  bumps = n / unit
  dark = _colour(rng, (0.01, 0.01, 0.06), (0.04, 0.03, 0.12))
  glow = _colour(rng, (0.10, 0.08, 0.30), (0.22, 0.12, 0.38))
  body = _mix(dark, glow, 0.3 + 0.3 * _smooth(rng, n, 3 * bumps, 3 * bumps))
  nearest, _, value = _cells(rng, n, unit, rng.uniform(6, 9))
  spots = np.clip(1.6 - nearest * unit / 9 / (0.4 + value), 0, 1) * (value > 0.35)
  return _mix(body, _colour(rng, (0.95, 0.92, 0.75), (1.0, 1.0, 1.0)), spots)


def _leaves(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  autumn = np.float32(
    [(0.80, 0.26, 0.05), (0.92, 0.52, 0.08), (0.95, 0.74, 0.20), (0.60, 0.15, 0.07), (0.55, 0.34, 0.12)]
  )
  ground = np.full((n, n, 3), _colour(rng, (0.14, 0.08, 0.04), (0.24, 0.14, 0.08)))
  for _ in range(int(95 * (n / unit) ** 2)):
    length, turn = rng.uniform(0.09, 0.14) * unit, rng.uniform(0, 2 * np.pi)
    row, column = rng.uniform(0, n, 2)
    rows, columns = (slice(max(int(at - length), 0), min(int(at + length) + 2, n)) for at in (row, column))
    y, x = np.ogrid[rows, columns]
    y, x = y - row, x - column
    along = (x * np.cos(turn) + y * np.sin(turn)) / length
    across = np.abs(y * np.cos(turn) - x * np.sin(turn)) / length
    edge = 0.5 * (1 - along**2) - across  # above 0 inside a shape pointed at both ends
    shade = np.where((across < 0.04) | (edge < 0.07), 0.55, 1.0)  # rib and rim
    colour = autumn[rng.integers(5)] * rng.uniform(0.8, 1.1)
    inside = edge > 0
    ground[rows, columns][inside] = (colour * shade[..., None])[inside]
  return np.float32(ground)


def _road(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  y, x = _axes(n, unit)
  grey = _colour(rng, (0.24, 0.24, 0.25), (0.36, 0.36, 0.37))
  body = grey + (0.05 * _grain(rng, n) + 0.02 * _smooth(rng, n, 4, 4))[..., None]
  paint = _colour(rng, (0.92, 0.92, 0.90), (0.95, 0.78, 0.20))
  spacing = rng.uniform(0.5, 0.65)
  line = np.abs((y + rng.random()) % spacing - spacing / 2) < 0.028
  dash = (x + rng.random()) % 0.45 < 0.28
  return _mix(body, paint, 0.92 * (line & dash))


def _stone(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  nearest, border, value = _cells(rng, n, unit, rng.uniform(4, 6))
  dark = _colour(rng, (0.42, 0.42, 0.42), (0.50, 0.49, 0.46))
  light = _colour(rng, (0.66, 0.66, 0.66), (0.76, 0.74, 0.70))
  body = _mix(dark, light, value * 0.9 + 0.25 - 0.45 * nearest + 0.08 * _grain(rng, n))
  return body * np.clip(0.25 + border * 5, 0, 1)[..., None]


def _tiles(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  y, x = _axes(n, unit)
  rows = rng.uniform(4, 6)
  odd = (np.floor(y * rows + rng.random()) + np.floor(x * rows + rng.random())) % 2
  dark = _colour(rng, (0.35, 0.10, 0.40), (0.52, 0.18, 0.52))
  light = _colour(rng, (0.88, 0.80, 0.90), (0.96, 0.90, 0.95))
  return _mix(dark, light, odd + 0.04 * _smooth(rng, n, 6, 6) + 0.03 * _grain(rng, n))


def _lava(rng: np.random.Generator, n: int, unit: float) -> np.ndarray:
  bumps = n / unit
  _, border, value = _cells(rng, n, unit, rng.uniform(3.5, 5.5))
  crust = _colour(rng, (0.10, 0.05, 0.05), (0.20, 0.09, 0.07))
  hot = _mix(
    np.float32((0.85, 0.10, 0.0)), np.float32((1.0, 0.75, 0.10)), 0.5 + 0.3 * _smooth(rng, n, 5 * bumps, 5 * bumps)
  )
  body = crust * (0.8 + 0.5 * value + 0.1 * _grain(rng, n))[..., None]
  return _mix(body, hot, 1.2 - border * rng.uniform(2.5, 4))


STUFF: dict[str, Stuff] = {
  'grass': Stuff(('on the grass', 'in the grass'), _grass, turns=False),
  'sky': Stuff(('in the sky', 'against the sky'), _sky, turns=False),
  'sand': Stuff(('on the sand', 'in the sand'), _sand, turns=True),
  'water': Stuff(('in the water', 'on the water'), _water, turns=False),
  'brick': Stuff(('on the brick', 'against the brick'), _brick, turns=False),
  'snow': Stuff(('in the snow', 'on the snow'), _snow, turns=True),
  'wood': Stuff(('on the wood', 'on wood'), _wood, turns=True),
  'night': Stuff(('at night', 'in the night'), _night, turns=True),
  'leaves': Stuff(('among the leaves', 'on the leaves'), _leaves, turns=True),
  'road': Stuff(('on the road', 'in the road'), _road, turns=True),
  'stone': Stuff(('on the stone', 'on stone'), _stone, turns=True),
  'tiles': Stuff(('on the tiles', 'on tiles'), _tiles, turns=True),
  'lava': Stuff(('on the lava', 'in the lava'), _lava, turns=True),
}
