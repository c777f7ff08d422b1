"""Segments the image of a visitor; knows no Gradio."""

import base64
import dataclasses
import html
import io
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from groupvit_jax.errors import UserError
from groupvit_jax.eval.class_names import parse_class_names
from groupvit_jax.eval.draw import hex_colour
from groupvit_jax.prediction import Prediction
from groupvit_jax.predictor import EncodedImage, Predictor

_SCREEN_SIDE = 1280  # pixels: a larger overlay only takes longer to arrive


class Upload(NamedTuple):
  """A visitor's file."""

  path: str
  name: str  # that the visitor knows it by


class View(NamedTuple):
  """The image on a visitor's page."""

  upload: Upload
  encoded: EncodedImage  # its image and groups no larger than a screen
  prediction: Prediction | None  # the last one; None without class names, or when they had a mistake


class Viewer:
  """Encodes an image once, and segments it into any classes that people type.

  Attributes:
    num_stages: grouping stages of the model.
    compiled: whether an image was encoded already; the first one waits for the compiler.
  """

  def __init__(self, predictor: Predictor, *, num_stages: int, max_pixels: int):
    """Wraps a predictor; images of more than `max_pixels` are refused."""
    self.num_stages, self.compiled = num_stages, False
    self._predictor, self._max_pixels = predictor, max_pixels

  def segment(self, upload: Upload | None, text: str, threshold: float, before: View | None) -> View | None:
    """Segments an image.

    Args:
      upload: the image; None when there is none.
      text: class names between commas; 'dog|puppy' is one class. Without any, the image is encoded alone.
      threshold: score below which a pixel is background; with 0 there is no background.
      before: the last view; the encoder does not run again for the same image.

    Returns:
      The view, its label map as large as the image; None without an image.

    Raises:
      ValueError: the image cannot be read or is too large, or the class names have a mistake. Each is a sentence for
        the person at the page.
    """
    if upload is None:
      return None
    class_names = [name for name in text.split(',') if name.strip()]
    if class_names:
      parse_class_names(class_names)
    encoded = before.encoded if before is not None and before.upload.path == upload.path else self._encode(upload)
    self.compiled = True
    if not class_names:
      return View(upload, encoded, None)
    return View(upload, encoded, self._predictor.segment(encoded, class_names, threshold=threshold or None))

  def _encode(self, upload: Upload) -> EncodedImage:
    path, name = upload
    size = _stated_size(path)
    if size[0] * size[1] > self._max_pixels:
      raise UserError(
        f'{name} has {size[0]} x {size[1]} pixels; this page takes up to '
        f'{self._max_pixels / 1e6:g} million: make it smaller.'
      )
    try:
      encoded = self._predictor.encode([path])[0]
    except ValueError as error:
      raise UserError(str(error).replace(path, name)) from error  # visitors do not see where uploads lie
    # Groups do not depend on the classes. Computed now, they need the large image no more.
    scale = min(1, _SCREEN_SIDE / max(encoded.image.shape[:2]))
    size = tuple(max(1, round(side * scale)) for side in encoded.image.shape[:2])
    maps = tuple(_pick(groups, size) for groups in encoded.group_maps())
    image = cv2.resize(encoded.image, size[::-1], interpolation=cv2.INTER_AREA)
    return encoded._replace(image=image, group_maps=lambda: maps)


def for_screen(prediction: Prediction) -> Prediction:
  """The same prediction with a label map as large as its image, which is no larger than a screen."""
  size = prediction.image.shape[:2]
  return dataclasses.replace(
    prediction, labels=_pick(prediction.labels, size), pixel_scores=_pick(prediction.pixel_scores, size)
  )


def legend(shown: Prediction, prediction: Prediction) -> str:
  """HTML: colour, name, area and best score of each class, largest area first, and the absent classes.

  With it comes the label map of `shown`, as a grey image that is not displayed: page.js names the class under the
  pointer by it.
  """
  rows, absent = [], []
  for row in prediction.to_json()['classes']:
    name = html.escape(row['name'])
    if not row['pixels']:
      absent.append(name)
      continue
    colour, score = hex_colour(prediction.palette[row['label']]), row['score']
    rows.append(
      f'<tr data-label="{row["label"]}"><td><span style="display:inline-block;width:1em;height:1em;'
      f'background:{colour}"></span> <span class="name">{name}</span></td>'
      f'<td>{row["area"]:.1%}</td><td>{"" if score is None else f"{score:.2f}"}</td></tr>'
    )
  table = '<table><thead><tr><th>class</th><th>area</th><th>best score</th></tr></thead><tbody>'
  rest = f'<p>not found: {", ".join(absent)}</p>' if absent else ''
  labels = io.BytesIO()
  Image.fromarray(shown.labels).save(labels, 'PNG')
  source = f'data:image/png;base64,{base64.b64encode(labels.getvalue()).decode()}'
  label_map = f'<img id="label-map" hidden alt="" src="{source}">'
  return f'<div id="legend">{table}{"".join(rows)}</tbody></table>{rest}{label_map}</div>'


def _pick(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """An array [H, W] at another size, of pixels that it has."""
  return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST)


def _stated_size(path: str) -> tuple[int, int]:
  """(W, H) in the file's header, before anything is decoded; (0, 0) of a file that the predictor will refuse."""
  try:
    with Image.open(path) as image:
      return image.size
  except Exception:  # which one depends on the format and on where the damage is
    return 0, 0
