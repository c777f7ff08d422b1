"""Prediction: the label map, groups, scores and heat maps of one image, and drawings of them."""

from collections.abc import Callable
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import cv2
import numpy as np
from PIL import Image

from groupvit_jax import storage
from groupvit_jax.errors import UserError
from groupvit_jax.eval import draw
from groupvit_jax.eval.output_folder import encode_png
from groupvit_jax.eval.window_encoder import EncodedWindows
from groupvit_jax.model.metrics import ignore_label

_LONGEST_NAME = 200  # bytes of an image's name in its files' names, which disks limit to 255


@dataclasses.dataclass(frozen=True, repr=False)
class Prediction:
  """The segmentation of one image. Label c stands for `classes[c]`.

      prediction = predictor('dog.jpg', ['dog|puppy', 'grass'])
      prediction.labels, prediction.heat_map('dog')  # uint8 and float32 [H, W]
      prediction.save('out')

  A notebook shows the classes over the image, with a legend.

  Attributes:
    key: name of the image: its path, or its number in the list.
    image: uint8 [H, W, 3].
    classes: C names.
    background: whether the first of them is the background: pixels that fit no class well enough.
    palette: their colours.
    labels: uint8 [H, W].
    pixel_scores: float32 [H, W], of those labels.
    group_maps: computes `groups` at the first call, which takes one more pass of the encoder.
    windows: the K encoded windows.
    class_scores: float32 [K, S, C], of their segments; without the background.
  """

  key: str
  image: np.ndarray
  classes: tuple[str, ...]
  background: bool
  palette: tuple[tuple[int, int, int], ...]
  labels: np.ndarray
  pixel_scores: np.ndarray
  group_maps: Callable[[], tuple[np.ndarray, ...]]
  windows: EncodedWindows
  class_scores: np.ndarray

  def __repr__(self) -> str:
    height, width = self.labels.shape
    shares = sorted(zip(self.areas, self.classes), reverse=True)
    found = ', '.join(f'{name} {area:.0%}' for area, name in shares if area)
    return f'Prediction({self.key!r}, {height} x {width}: {found})'

  def _repr_png_(self) -> bytes:
    """The overlay and a legend, which notebooks show."""
    return encode_png(self.drawing())

  @property
  def areas(self) -> np.ndarray:
    """Share of the image that each class covers, [C]."""
    return np.bincount(self.labels.ravel(), minlength=len(self.classes)) / self.labels.size

  @functools.cached_property
  def scores(self) -> np.ndarray:
    """The highest score of each class at any pixel, [C]; nan for the background."""
    best = [self._mean_scores(index).max() for index in range(self.class_scores.shape[-1])]
    return np.array([np.nan] * self.background + best, np.float32)

  @property
  def groups(self) -> tuple[np.ndarray, ...]:
    """Per grouping stage uint8 [H, W], of the whole image in one window; the final segments are last."""
    return self.group_maps()

  @property
  def segments(self) -> np.ndarray:
    """The final segments, uint8 [H, W]."""
    return self.groups[-1]

  def heat_map(self, name: str) -> np.ndarray:
    """The score in [0, 1] of a class at each pixel, float32 [H, W]; a pixel's label is the class of the highest."""
    names = self.classes[self.background :]
    if name not in names:
      raise UserError(f'{name!r} was not looked for; there are {", ".join(names)}')
    return cv2.resize(
      self._mean_scores(names.index(name)), self.windows.image.original[::-1], interpolation=cv2.INTER_LINEAR
    )

  def mask(self) -> Image.Image:
    """The label map as an indexed image in the classes' colours."""
    return draw.mask_image(self.labels, self.palette)

  def overlay(self, opacity: float = draw.OPACITY) -> np.ndarray:
    """The image under the classes' colours and names, uint8 [H', W', 3]; small ones are enlarged."""
    labels = self.labels
    if self.background:  # shows the image as it is
      labels = np.where(labels == 0, np.uint8(ignore_label(np.uint8)), labels)
    return draw.draw_overlay(self.image, labels, self.palette, self.classes, opacity=opacity)

  def drawing(self) -> Image.Image:
    """The overlay above a legend of the classes that the image holds, the largest first."""
    overlay = self.overlay()
    found = [label for label in np.argsort(-self.areas, kind='stable') if self.areas[label]]
    entries = [(self.palette[label], f'{self.classes[label]} {self.areas[label]:.0%}') for label in found]
    legend = draw.draw_legend(entries, overlay.shape[1])
    return Image.fromarray(np.concatenate([overlay, np.asarray(legend)]))

  def show(self) -> None:
    """Opens the overlay and a legend in the system's viewer."""
    self.drawing().show()

  def save(self, folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Writes NAME.mask.png (indexed, label values), NAME.overlay.png, NAME.final_groups.png, NAME.first_groups.png and
    NAME.json (areas and scores) into a folder, which is created; files of the same names are replaced.

    NAME is the image's own without the suffix, unless `name` is given.
    """
    name = file_name(self.key) if name is None else name
    images = {
      'mask': self.mask(),
      'overlay': self.overlay(),
      'final_groups': self.group_overlay(-1),
      'first_groups': self.group_overlay(0),
    }
    text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + '\n'
    files = {f'{kind}.png': encode_png(image) for kind, image in images.items()} | {'json': text.encode()}
    for suffix, data in files.items():
      storage.write_atomic(os.path.join(folder, f'{name}.{suffix}'), data)

  def group_overlay(self, stage: int = -1) -> np.ndarray:
    """The image under a stage's groups, uint8 [H', W', 3]; 0 is the first, -1 the final one."""
    return draw.draw_groups(self.image, self.groups[stage])

  def to_json(self) -> dict[str, Any]:
    """Areas and scores of the classes, largest area first.

    `area` is the share of pixels whose label is the class; `score` is the highest at any pixel. A class with a score
    and no area is surpassed by another one at each pixel.
    """
    pixels = np.bincount(self.labels.ravel(), minlength=len(self.classes))
    columns = zip(self.classes, self.areas, pixels, self.scores)
    rows = [
      dict(label=label, name=name, area=float(area), pixels=int(count), score=None if np.isnan(score) else float(score))
      for label, (name, area, count, score) in enumerate(columns)
    ]
    height, width = self.labels.shape
    return dict(picture=self.key, height=height, width=width, classes=sorted(rows, key=lambda row: -row['area']))

  def _mean_scores(self, index: int) -> np.ndarray:
    """The score of a class other than the background, averaged over windows: float32, as large as the cut image."""
    image = self.windows.image
    total, covers = np.zeros((2, *image.resized), np.float32)
    scores, (windows,) = self.class_scores[:, :, index], self.windows.segments.values()
    for top, left, segments, score in zip(image.tops, image.lefts, windows, scores):
      here = np.s_[top : top + segments.shape[0], left : left + segments.shape[1]]
      total[here] += score[segments] if segments.ndim == 2 else segments @ score
      covers[here] += 1
    return total / covers


def file_name(key: str) -> str:
  """The name of an image's files: its own without the suffix, cut to 200 bytes."""
  return os.fsencode(pathlib.Path(key).stem)[:_LONGEST_NAME].decode(errors='ignore')
