"""Text on drawings in any script: emoji in colour, letters in the first font that has them all, or code points."""

from collections.abc import Iterator
import functools
import re

from PIL import ImageDraw, ImageFont

from groupvit_jax.data.scenes.glyphs import find_font

_EMOJI = re.compile('([\u2190-\u2bff\U0001f000-\U0001faff][\u2190-\u2bff\U0001f000-\U0001faff\u200d\ufe0f]*)')
_JOINERS = '\u200d\ufe0f'  # have no glyph of their own
_NOTHING = '\U0010ffff'  # what no font has: its glyph is the box that stands for missing ones
_PILLOW = ''  # stands for the path of Pillow's font, which has little beyond ASCII


def text_length(text: str, points: int) -> float:
  """Pixels that a text is wide."""
  return sum(font.getlength(part) for part, font in _parts(text, points))


def text_height(points: int) -> int:
  """Pixels of a line, the same with and without ascenders."""
  return sum(_font(_PILLOW, points).getmetrics())


def write_text(
  draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, ink: tuple[int, int, int], points: int, anchor: str
) -> None:
  """Writes a text.

  `xy` is its middle or the middle of its left edge, by Pillow's anchor 'mm' or 'lm'.
  """
  ascent, descent = _font(_PILLOW, points).getmetrics()
  x, y = xy[0] - (text_length(text, points) / 2 if anchor == 'mm' else 0), xy[1] + (ascent - descent) / 2
  for part, font in _parts(text, points):
    draw.text((x, y), part, ink, font, anchor='ls', embedded_color=True)
    x += font.getlength(part)


def _parts(text: str, points: int) -> Iterator[tuple[str, ImageFont.FreeTypeFont]]:
  """The parts of a text, and the font of each."""
  emoji = str(find_font())
  for part in filter(None, _EMOJI.split(text)):
    if _EMOJI.fullmatch(part) and _has_all(emoji, part):
      yield part, _font(emoji, points)
    else:
      path = next((path for path in _fonts() if _has_all(path, part)), _dejavu())
      yield ''.join(each if _has_all(path, each) else f'U+{ord(each):04X} ' for each in part), _font(path, points)


def _dejavu() -> str:
  """The path of the font that comes with matplotlib: European scripts and many others."""
  import matplotlib  # most names do without

  return f'{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf'


def _fonts() -> Iterator[str]:
  """Paths of fonts to try in turn: those that come along, then the system's."""
  yield _PILLOW
  yield _dejavu()
  from matplotlib import font_manager  # half a second

  yield from (entry.fname for entry in font_manager.fontManager.ttflist if 'Last Resort' not in entry.name)


@functools.cache
def _has_all(path: str, text: str) -> bool:
  """Whether a font has a glyph for each character of a text."""
  font = _font(path, 20)
  missing = font.getmask(_NOTHING)
  glyphs = (font.getmask(character) for character in text if character not in _JOINERS)
  return all((glyph.size, bytes(glyph)) != (missing.size, bytes(missing)) for glyph in glyphs)


@functools.lru_cache(64)
def _font(path: str, points: int) -> ImageFont.FreeTypeFont:
  return ImageFont.truetype(path, points) if path else ImageFont.load_default(points)
