"""Drawings for people: masks, overlays with class names, groups with borders, and panels of them.

Numpy, OpenCV and Pillow; nothing here knows a model. Shape letters: H W pixels,
C classes.
"""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

from groupvit_jax.eval.lettering import text_height, text_length, write_text
from groupvit_jax.model.metrics import ignore_label

_IGNORE_COLOUR = (224, 224, 224)
LONG_SIDE = 384  # overlays are at least this long: far below it no name is legible
_TILE = 256  # the same for the tiles of a panel, of which there are many
_LARGEST_TILE = 384  # and at most so long
OPACITY = 0.55  # of classes over the image
GROUP_OPACITY = 0.35  # of groups, whose borders say more than their colours
_TEXT_SHARE = 26  # letters are this fraction of an image's short side high
_SMALLEST_TEXT, _PANEL_TEXT, _LEGEND_LINE = 12, 15, 23  # pixels
_SMALLEST_AREA = 0.004  # of the image: a smaller class is not named on it
_GAP = 6  # pixels between the tiles of a panel
_WHITE, _INK = (255, 255, 255), (24, 24, 24)

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Row(NamedTuple):
  """What a panel shows of one image; all are [H, W, ...] of one size."""

  image: np.ndarray  # uint8 [H, W, 3]
  truth: np.ndarray | None  # labels [H, W]
  prediction: np.ndarray | None  # labels [H, W]
  groups: tuple[np.ndarray, ...]  # per grouping stage [H, W]; the final segments come last


# Of classes that people expect in a colour, RGB.
_EXPECTED = {
  'grass': (92, 168, 58),
  'tree': (28, 98, 48),
  'sky': (140, 200, 245),
  'water': (30, 100, 190),
  'sea': (20, 80, 150),
  'sand': (228, 196, 124),
  'snow': (220, 230, 242),
  'brick': (168, 76, 60),
  'road': (112, 112, 120),
}
# How green- and red-blind eyes see linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
_COLOUR_BLIND = np.float32(
  [
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
  ]
)


def class_palette(names: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
  """Colours (RGB) of classes: for grass, sky and the like those that people expect, for others far ones, which
  repeat after 256.
  """
  expected = {name: _EXPECTED[name.lower()] for name in names if name.lower() in _EXPECTED}
  others = itertools.cycle(spread_palette(min(len(names) - len(expected), 256), tuple(expected.values())))
  return tuple(expected[name] if name in expected else next(others) for name in names)


@functools.cache
def spread_palette(count: int, taken: tuple[tuple[int, int, int], ...] = ()) -> tuple[tuple[int, int, int], ...]:
  """C colours (RGB, at most 256) as far from each other as they get, the first ones farthest; always the same.

  Farthest-point sampling in CIELAB, as normal and as colour-blind eyes see it, away from black, white and grey, so that
  they show on images and under letters. A longer palette starts like a shorter one, and keeps away from `taken`.
  """
  levels = np.linspace(0, 255, 16).round().astype(np.uint8)
  rgb = np.stack(np.meshgrid(levels, levels, levels, indexing='ij'), axis=-1).reshape(-1, 3)
  lab = perceived(rgb)
  chroma = np.hypot(lab[0, :, 1], lab[0, :, 2])
  keep = (lab[0, :, 0] > 35) & (lab[0, :, 0] < 90) & (chroma > 25)
  rgb, lab = rgb[keep], lab[:, keep]
  distance = np.full(len(rgb), np.inf)
  chosen = [] if taken else [int(np.abs(rgb.astype(int) - (0, 119, 221)).sum(axis=1).argmin())]
  away = [*np.moveaxis(perceived(np.uint8(taken).reshape(-1, 3)), 1, 0), *(lab[:, index] for index in chosen)]
  while len(chosen) < count:
    for other in away:
      distance = np.minimum(distance, np.linalg.norm(lab - other[:, None], axis=-1).min(axis=0))
    chosen.append(int(distance.argmax()))
    away = [lab[:, chosen[-1]]]
  return tuple(tuple(map(int, rgb[index])) for index in chosen[:count])


def perceived(rgb: np.ndarray) -> np.ndarray:
  """CIELAB [3, n, 3] of colours uint8 [n, 3] to normal, green-blind and red-blind eyes."""
  scaled = rgb.astype(np.float32) / 255
  linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
  seen = np.clip(np.concatenate([linear[None], np.einsum('eij,nj->eni', _COLOUR_BLIND, linear)]), 0, 1)
  return cv2.cvtColor(seen.astype(np.float32), cv2.COLOR_LRGB2LAB) if len(rgb) else np.zeros((3, 0, 3), np.float32)


def mask_image(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> Image.Image:
  """A label map [H, W] as an image of indices: uint8 in mode P with colours, 255 (grey) is 'ignore'; uint16 without."""
  image = Image.fromarray(np.ascontiguousarray(labels))
  if labels.dtype == np.uint8:
    image = image.convert('P')
    image.putpalette(_table(palette).tobytes())
  return image


def hex_colour(colour: Sequence[int]) -> str:
  """An RGB colour as '#rrggbb'."""
  return '#{:02x}{:02x}{:02x}'.format(*colour)


def colour_map(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
  """Labels [H, W] in their colours, uint8 [H, W, 3]; those of no class are grey."""
  table = _table(palette)
  return table[np.minimum(labels, len(table) - 1)]


def enlarge(array: np.ndarray, factor: int) -> np.ndarray:
  """Repeats rows and columns of [H, W, ...] a whole number of times: no pixel is invented."""
  return array.repeat(factor, axis=0).repeat(factor, axis=1)


def enlargement(size: tuple[int, int], long_side: int) -> int:
  """The smallest whole factor that makes the long side of an image (H, W) at least `long_side`."""
  return -(-long_side // max(size)) or 1


def shrink(row: Row, long_side: int) -> Row:
  """The row with a long side of at most so many pixels."""
  height, width = row.image.shape[:2]
  scale = min(1, long_side / max(height, width))
  if scale == 1:
    return row
  size = max(1, round(width * scale)), max(1, round(height * scale))
  labels = lambda array: None if array is None else cv2.resize(array, size, interpolation=cv2.INTER_NEAREST)
  image = cv2.resize(row.image, size, interpolation=cv2.INTER_AREA)
  return Row(image, labels(row.truth), labels(row.prediction), tuple(map(labels, row.groups)))


def draw_overlay(
  image: np.ndarray,
  labels: np.ndarray,
  palette: Sequence[Sequence[int]],
  names: Sequence[str],
  *,
  opacity: float = OPACITY,
  long_side: int = LONG_SIDE,
) -> np.ndarray:
  """Classes over an image: colours, borders between them, and each name on its largest area.

  Args:
    image: uint8 [H, W, 3].
    labels: [H, W]; those of no class are left as they are.
    palette: C colours.
    names: C names; an empty one is not drawn.
    opacity: of the colours, 0 to 1.
    long_side: pixels; smaller images are enlarged.

  Returns:
    uint8 [H * f, W * f, 3], f their `enlargement`.
  """
  factor = enlargement(labels.shape, long_side)
  image, labels = enlarge(image, factor), enlarge(labels, factor)
  coloured = _blend(image, colour_map(labels, palette), opacity * (labels < len(palette)))
  canvas = Image.fromarray(_draw_borders(coloured, labels))
  _write_names(canvas, labels, palette, names)
  return np.asarray(canvas)


def draw_groups(
  image: np.ndarray, groups: np.ndarray, *, opacity: float = GROUP_OPACITY, long_side: int = LONG_SIDE
) -> np.ndarray:
  """Groups over an image: a tint for each and borders between them.

  A group's colour is that of its number, so a group token has one colour in all images.

  Arguments and result are as for `draw_overlay`, but for the groups' numbers [H, W], below 256.
  """
  factor = enlargement(groups.shape, long_side)
  image, groups = enlarge(image, factor), enlarge(groups, factor)
  tints = np.array(spread_palette(int(groups.max()) + 1), np.uint8)[groups]
  return _draw_borders(_blend(image, tints, np.full(groups.shape, opacity)), groups)


def draw_panel(rows: Sequence[Row], palette: Sequence[Sequence[int]], names: Sequence[str]) -> np.ndarray:
  """One line of tiles per image: input, truth, prediction, final groups, first groups.

  Truth and prediction are left out where no row has one, and the first groups where there is one grouping stage.

  Returns:
    uint8 [H', W', 3], with titles above and the C colours' names below.
  """
  rows = [shrink(row, _LARGEST_TILE) for row in rows]
  shown = [kind for kind in ('truth', 'prediction') if any(getattr(row, kind) is not None for row in rows)]
  named = [draw_tiles(row, palette, names, shown, long_side=_TILE) for row in rows]
  titles, tiles = list(named[0]), [list(row.values()) for row in named]
  width = max(row[0].shape[1] for row in tiles)
  head = _PANEL_TEXT + 2 * _GAP
  used = _used_labels(rows)
  size = _GAP + len(titles) * (width + _GAP)
  legend = draw_legend([(palette[label], names[label]) for label in used], size)
  tops = np.cumsum([head, *(row[0].shape[0] + _GAP for row in tiles)]).tolist()
  canvas = Image.new('RGB', (size, tops[-1] + legend.height), _WHITE)
  draw = ImageDraw.Draw(canvas)
  for column, title in enumerate(titles):
    left = _GAP + column * (width + _GAP)
    write_text(draw, (left + width / 2, head / 2), title, _INK, _PANEL_TEXT, 'mm')
    for top, row in zip(tops, tiles):
      canvas.paste(Image.fromarray(row[column]), (left, top))
  canvas.paste(legend, (0, tops[-1]))
  return np.asarray(canvas)


def draw_legend(entries: Sequence[tuple[Sequence[int], str]], width: int) -> Image.Image:
  """A swatch and a name for each (colour, name), in as many columns as fit into so many pixels."""
  widest = max((text_length(name, _PANEL_TEXT) for _, name in entries), default=0)
  columns = max(1, int((width - 2 * _GAP) // (widest + 3 * _PANEL_TEXT)))
  canvas = Image.new('RGB', (width, _LEGEND_LINE * -(-len(entries) // columns) + _GAP), _WHITE)
  draw = ImageDraw.Draw(canvas)
  for index, (colour, name) in enumerate(entries):
    left = _GAP + index % columns * (width - _GAP) / columns
    middle, half = (index // columns + 0.5) * _LEGEND_LINE, _PANEL_TEXT / 2
    draw.rectangle((left, middle - half, left + 2 * half, middle + half), tuple(colour))
    write_text(draw, (left + 1.5 * _PANEL_TEXT, middle), name, _INK, _PANEL_TEXT, 'lm')
  return canvas


def draw_tiles(
  row: Row,
  palette: Sequence[Sequence[int]],
  names: Sequence[str],
  shown: Sequence[str] = ('truth', 'prediction'),
  *,
  long_side: int = LONG_SIDE,
) -> dict[str, np.ndarray]:
  """The tiles of a row by title, all of one size; `shown` are those of its label maps that are drawn."""
  tiles = {'input': enlarge(row.image, enlargement(row.image.shape[:2], long_side))}
  for kind in shown:
    labels = getattr(row, kind)
    labels = np.full(row.image.shape[:2], ignore_label(np.uint16), np.uint16) if labels is None else labels
    tiles[kind] = draw_overlay(row.image, labels, palette, names, long_side=long_side)
  stages = {'final groups': -1, 'first groups': 0} if len(row.groups) > 1 else {'groups': 0}
  return tiles | {title: draw_groups(row.image, row.groups[i], long_side=long_side) for title, i in stages.items()}


def _used_labels(rows: Sequence[Row]) -> list[int]:
  """Labels that occur in any truth or prediction."""
  maps = [array for row in rows for array in (row.truth, row.prediction) if array is not None]
  return sorted({label for array in maps for label in np.unique(array).tolist() if label != ignore_label(array.dtype)})


def _table(palette: Sequence[Sequence[int]]) -> np.ndarray:
  """256 colours or more, uint8 [n, 3]: the palette's, then the grey of ignored pixels."""
  table = np.full((max(256, len(palette) + 1), 3), _IGNORE_COLOUR, np.uint8)
  table[: len(palette)] = palette
  return table


def _blend(image: np.ndarray, colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
  """Mixes two images [H, W, 3] by an opacity [H, W]."""
  share = opacity[:, :, None].astype(np.float32)
  return (image * (1 - share) + colours * share).round().astype(np.uint8)


def _draw_borders(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """White lines with a dark rim where labels change, as wide as suits the image's size."""
  edge = np.zeros(labels.shape, np.uint8)
  edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
  edge[1:] |= labels[1:] != labels[:-1]
  wide = max(1, round(min(labels.shape) / 320))
  line = cv2.dilate(edge, np.ones((wide, wide), np.uint8))
  rim = cv2.dilate(line, np.ones((3, 3), np.uint8))
  image = np.where(rim[:, :, None] > 0, image // 2, image)
  return np.where(line[:, :, None] > 0, np.uint8(255), image)


def _write_names(
  canvas: Image.Image, labels: np.ndarray, palette: Sequence[Sequence[int]], names: Sequence[str]
) -> None:
  """Writes each class's name in the middle of its largest area, large areas first."""
  draw = ImageDraw.Draw(canvas)
  boxes: list[Box] = []
  areas = np.bincount(labels.ravel())
  for label in np.argsort(-areas, kind='stable').tolist():
    if label < len(names) and names[label] and areas[label] >= _SMALLEST_AREA * labels.size:
      points = _fitting_size(names[label], canvas.size)
      size = text_length(names[label], points), text_height(points)
      boxes.append(_place_name(labels == label, size, boxes))
      _write_name(draw, boxes[-1], names[label], tuple(palette[label]), points)


def _place_name(area: np.ndarray, size: tuple[float, float], others: Sequence[Box]) -> Box:
  """The box of a name: deep inside its area, inside the image, clear of other names if possible."""
  height, width = area.shape
  half_width, half_height = size[0] / 2 + size[1] / 4, size[1] / 2
  # Beyond the image is not inside the area: names keep away from the image's border too.
  depth = cv2.distanceTransform(np.pad(area.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
  best = None
  for _ in range(8):
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    if depth[y, x] <= 0:
      break
    x = min(max(x, half_width), max(width - half_width, width / 2))
    y = min(max(y, half_height), max(height - half_height, height / 2))
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    best = best or box
    if not any(_overlap(box, other) for other in others):
      return box
    # Elsewhere, by a plate's height and half its width at least.
    rows, columns = int(2 * half_height), int(half_width)
    depth[max(0, int(y) - rows) : int(y) + rows, max(0, int(x) - columns) : int(x) + columns] = 0
  return best


def _overlap(a: Box, b: Box) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _write_name(draw: ImageDraw.ImageDraw, box: Box, name: str, colour: tuple[int, int, int], points: int) -> None:
  """A name on a plate of its class's colour, in black or white, whichever is easier to read."""
  luminance = np.dot(colour, (0.299, 0.587, 0.114))
  ink = _INK if luminance > 140 else _WHITE
  left, top, right, bottom = box
  height = bottom - top
  draw.rounded_rectangle(box, height / 4, colour, ink, max(1, round(height / 16)))
  write_text(draw, ((left + right) / 2, (top + bottom) / 2), name, ink, points, 'mm')


def _fitting_size(name: str, size: tuple[int, int]) -> int:
  """The points that suit an image (width, height), fewer where a name is too long."""
  points = max(_SMALLEST_TEXT, round(min(size) / _TEXT_SHARE))
  length, room = text_length(name, points), 0.9 * size[0]
  return points if length <= room else max(6, math.floor(points * room / length))
