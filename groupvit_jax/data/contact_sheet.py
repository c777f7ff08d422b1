"""Pictures with their texts underneath, on one page."""

from collections.abc import Sequence
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_WIDTH, _MARGIN = 224, 8  # of a picture on the page, and around it, in pixels
_LETTERS, _LINE, _FONT = 36, 14, 12  # to a line, pixels between lines, pixels of a letter
_INK, _FAINT = (20, 20, 20), (110, 110, 110)


def draw_sheet(images: Sequence[np.ndarray], texts: Sequence[Sequence[str]], columns: int) -> np.ndarray:
  """Draws a contact sheet.

  Args:
    images: uint8 [H, W, 3] each, of any size.
    texts: what stands under each picture: the caption, then its prompts in grey.
    columns: pictures side by side.

  Returns:
    uint8 [height, width, 3].
  """
  font = ImageFont.load_default(_FONT)
  cells = [_Cell(image, lines) for image, lines in zip(images, texts, strict=True)]
  rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
  heights = [max(cell.height for cell in row) for row in rows]
  sheet = Image.new('RGB', (columns * (_WIDTH + _MARGIN) + _MARGIN, sum(heights) + _MARGIN), 'white')
  draw, top = ImageDraw.Draw(sheet), _MARGIN
  for row, height in zip(rows, heights, strict=True):
    for column, cell in enumerate(row):
      cell.draw(sheet, draw, _MARGIN + column * (_WIDTH + _MARGIN), top, font)
    top += height
  return np.asarray(sheet)


class _Cell:
  """A picture and its texts."""

  def __init__(self, image: np.ndarray, texts: Sequence[str]):
    picture = Image.fromarray(image)
    self._picture = picture.resize((_WIDTH, round(_WIDTH * picture.height / picture.width)))
    self._lines = [
      (line, _FAINT if n else _INK)
      for n, text in enumerate(texts)
      for line in textwrap.wrap(text, _LETTERS, max_lines=4) or ['']
    ]

  @property
  def height(self) -> int:
    return self._picture.height + _LINE * len(self._lines) + 2 * _MARGIN

  def draw(
    self, sheet: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, font: ImageFont.FreeTypeFont
  ) -> None:
    sheet.paste(self._picture, (left, top))
    top += self._picture.height + 2
    for line, colour in self._lines:
      draw.text((left, top), line, colour, font)
      top += _LINE
