"""What the page does with a picture and words; knows no Gradio."""

import dataclasses
import html
import os
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from groupvit_jax.errors import UserError
from groupvit_jax.prediction import Prediction
from groupvit_jax.predictor import EncodedImage, parse_words, Predictor

_SCREEN_SIDE = 1280  # pixels: a larger overlay only takes longer to arrive


class Looked(NamedTuple):
  """A picture that somebody looks at."""

  path: str
  encoded: EncodedImage  # its image and groups no larger than a screen
  prediction: Prediction | None  # the last one; None when the last words had a mistake


class Viewer:
  """Encodes a picture once, and looks for as many words as people type."""

  def __init__(self, predictor: Predictor, *, max_pixels: int):
    """Takes a predictor; pictures of more than `max_pixels` are refused."""
    self._predictor, self._max_pixels = predictor, max_pixels

  def look(self, path: str | None, text: str, threshold: float, before: Looked | None) -> Looked:
    """Looks for words in a picture.

    Args:
      path: of the picture; None when there is none.
      text: words between commas; 'dog|puppy' is one class.
      threshold: score below which a pixel is background; with 0 there is no background.
      before: what was looked at before; the encoder does not run again for the same picture.

    Returns:
      What was found, its label map as large as the picture.

    Raises:
      ValueError: there is no picture, it cannot be read or is too large, or the words have a mistake. Each
        is a sentence for the person at the page.
    """
    if path is None:
      raise UserError('There is no picture yet: drop, paste or choose one.')
    words = [word for word in text.split(',') if word.strip()]
    if not words:
      raise UserError('There are no words to look for: type some, with commas between them, as in dog, grass.')
    parse_words(words)
    encoded = before.encoded if before is not None and before.path == path else self._encode(path)
    found = self._predictor.find(encoded, words, threshold=threshold or None)
    return Looked(path, encoded, found)

  def _encode(self, path: str) -> EncodedImage:
    name = os.path.basename(path)
    size = _stated_size(path)
    if size[0] * size[1] > self._max_pixels:
      raise UserError(
        f'{name} has {size[0]} x {size[1]} pixels; this page takes up to '
        f'{self._max_pixels / 1e6:g} million: make it smaller.'
      )
    try:
      encoded = self._predictor.encode([path])[0]
    except ValueError as error:
      raise UserError(str(error).replace(path, name)) from error  # where uploads lie is nobody's business
    # Groups are shown whatever the words. Made now, they need the large picture no more.
    scale = min(1, _SCREEN_SIDE / max(encoded.image.shape[:2]))
    size = tuple(max(1, round(side * scale)) for side in encoded.image.shape[:2])
    maps = tuple(_pick(groups, size) for groups in encoded.group_maps())
    image = cv2.resize(encoded.image, size[::-1], interpolation=cv2.INTER_AREA)
    return encoded._replace(image=image, group_maps=lambda: maps)


def for_screen(prediction: Prediction) -> Prediction:
  """The same prediction, its label map as large as its image: a screen, where the picture is larger."""
  size = prediction.image.shape[:2]
  return dataclasses.replace(
    prediction, labels=_pick(prediction.labels, size), pixel_scores=_pick(prediction.pixel_scores, size)
  )


def legend(prediction: Prediction) -> str:
  """HTML: colour, name, area and best score of each class, largest area first, and what was not found."""
  rows, absent = [], []
  for row in prediction.to_json()['classes']:
    name = html.escape(row['name'])
    if not row['pixels']:
      absent.append(name)
      continue
    colour = '#{:02x}{:02x}{:02x}'.format(*prediction.palette[row['label']])
    score = '' if row['score'] is None else f'{row["score"]:.2f}'
    rows.append(
      f'<tr><td><span style="display:inline-block;width:1em;height:1em;background:{colour}"></span> '
      f'{name}</td><td>{row["area"]:.1%}</td><td>{score}</td></tr>'
    )
  table = '<table><thead><tr><th>word</th><th>area</th><th>best score</th></tr></thead><tbody>'
  rest = f'<p>not found: {", ".join(absent)}</p>' if absent else ''
  return f'<div id="legend">{table}{"".join(rows)}</tbody></table>{rest}</div>'


def _pick(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """An array [H, W] at another size, of pixels that it has."""
  return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST)


def _stated_size(path: str) -> tuple[int, int]:
  """(W, H) as the file's header says, before anything is decoded; (0, 0) of what the predictor will refuse."""
  try:
    with Image.open(path) as image:
      return image.size
  except Exception:  # which one depends on the format and on where the damage is
    return 0, 0
