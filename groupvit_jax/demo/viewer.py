"""What the page does with a picture and words; knows no Gradio."""

import dataclasses
import html
import os
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from groupvit_jax.prediction import Prediction
from groupvit_jax.predictor import EncodedImage, parse_words, Predictor

_SCREEN_SIDE = 1280  # pixels: a larger overlay only takes longer to arrive


class Looked(NamedTuple):
  """A picture that somebody looks at."""

  path: str
  encoded: EncodedImage
  prediction: Prediction  # the last one


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

    Raises:
      ValueError: there is no picture, it cannot be read or is too large, or the words have a mistake. Each
        is a sentence for the person at the page.
    """
    if path is None:
      raise ValueError('There is no picture yet: drop, paste or choose one.')
    words = [word for word in text.split(',') if word.strip()]
    if not words:
      raise ValueError('There are no words to look for: type some, with commas between them, as in dog, grass.')
    parse_words(words)
    encoded = before.encoded if before is not None and before.path == path else self._encode(path)
    found = self._predictor.find(encoded, words, threshold=threshold or None)
    return Looked(path, encoded, found)

  def _encode(self, path: str) -> EncodedImage:
    name = os.path.basename(path)
    size = _stated_size(path)
    if size[0] * size[1] > self._max_pixels:
      raise ValueError(f'{name} has {size[0]} x {size[1]} pixels; this page takes up to '
                       f'{self._max_pixels / 1e6:g} million: make it smaller.')
    try:
      return self._predictor.encode([path])[0]
    except ValueError as error:
      raise ValueError(str(error).replace(path, name)) from error  # where uploads lie is nobody's business


def overlay(prediction: Prediction, opacity: float) -> np.ndarray:
  """The picture under colours and names, uint8 [H', W', 3], no larger than a screen."""
  return _for_screen(prediction).overlay(opacity)


def group_overlays(prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
  """The picture under the first and under the final groups."""
  shown = _for_screen(prediction)
  return shown.group_overlay(0), shown.group_overlay(-1)


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
    rows.append(f'<tr><td><span style="display:inline-block;width:1em;height:1em;background:{colour}"></span> '
                f'{name}</td><td>{row["area"]:.1%}</td><td>{score}</td></tr>')
  table = '<table><thead><tr><th>word</th><th>area</th><th>best score</th></tr></thead><tbody>'
  rest = f'<p>not found: {", ".join(absent)}</p>' if absent else ''
  return f'<div id="legend">{table}{"".join(rows)}</tbody></table>{rest}</div>'


def _for_screen(prediction: Prediction) -> Prediction:
  """The same prediction of a smaller picture, if it is larger than a screen."""
  height, width = prediction.labels.shape
  scale = _SCREEN_SIDE / max(height, width)
  if scale >= 1:
    return prediction
  size = max(1, round(width * scale)), max(1, round(height * scale))
  pick = lambda labels: cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
  return dataclasses.replace(
      prediction, image=cv2.resize(prediction.image, size, interpolation=cv2.INTER_AREA),
      labels=pick(prediction.labels), group_maps=lambda: tuple(map(pick, prediction.groups)))


def _stated_size(path: str) -> tuple[int, int]:
  """(W, H) as the file's header says, before anything is decoded; (0, 0) of what the predictor will refuse."""
  try:
    with Image.open(path) as image:
      return image.size
  except Exception:  # which one depends on the format and on where the damage is
    return 0, 0
