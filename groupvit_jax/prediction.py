"""Prediction: the label map, groups, scores and heat maps of one image, and drawings of them."""

from collections.abc import Callable
import dataclasses
import io
from typing import Any

import cv2
import numpy as np
from PIL import Image

from groupvit_jax.errors import UserError
from groupvit_jax.eval import draw
from groupvit_jax.eval.window_encoder import EncodedWindows


@dataclasses.dataclass(frozen=True, repr=False)
class Prediction:
  """The segmentation of one image. Label c stands for `classes[c]`.

  Attributes:
    key: name of the image: its path, or its number in the list.
    image: uint8 [H, W, 3].
    classes: C names.
    background: whether the first of them is the background: pixels that fit no class well enough.
    palette: their colours.
    labels: uint8 [H, W].
    pixel_scores: float32 [H, W], of those labels.
    scores: [C], of the segment that fits a class best, in any window; nan for the background.
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
  scores: np.ndarray
  group_maps: Callable[[], tuple[np.ndarray, ...]]
  windows: EncodedWindows
  class_scores: np.ndarray

  def __repr__(self) -> str:
    height, width = self.labels.shape
    shares = sorted(zip(self.areas, self.classes), reverse=True)
    found = ', '.join(f'{name} {area:.0%}' for area, name in shares if area)
    return f'Prediction({self.key!r}, {height} x {width}: {found})'

  def _repr_png_(self) -> bytes:
    """The overlay, which notebooks show."""
    data = io.BytesIO()
    Image.fromarray(self.overlay()).save(data, 'PNG')
    return data.getvalue()

  @property
  def areas(self) -> np.ndarray:
    """Share of the image that each class covers, [C]."""
    return np.bincount(self.labels.ravel(), minlength=len(self.classes)) / self.labels.size

  @property
  def groups(self) -> tuple[np.ndarray, ...]:
    """Per grouping stage uint8 [H, W], of the whole image in one window; the final segments are last."""
    return self.group_maps()

  @property
  def segments(self) -> np.ndarray:
    """The final segments, uint8 [H, W]."""
    return self.groups[-1]

  def heat_map(self, name: str) -> np.ndarray:
    """The score in [0, 1] of a class at each pixel, float32 [H, W]; a pixel's label is the class that scores highest.

    Raises:
      ValueError: the image was not segmented into such a class.
    """
    names = self.classes[self.background :]
    if name not in names:
      raise UserError(f'{name!r} was not looked for; there are {", ".join(names)}')
    scores = self.class_scores[:, :, names.index(name)]
    image = self.windows.image
    total, covers = np.zeros((2, *image.resized), np.float32)
    for top, left, segments, score in zip(image.tops, image.lefts, self.windows.segments, scores):
      here = np.s_[top : top + segments.shape[0], left : left + segments.shape[1]]
      total[here] += score[segments] if segments.ndim == 2 else segments @ score
      covers[here] += 1
    return cv2.resize(total / covers, image.original[::-1], interpolation=cv2.INTER_LINEAR)

  def mask(self) -> Image.Image:
    """The label map as an indexed image in the classes' colours."""
    return draw.mask_image(self.labels, self.palette)

  def overlay(self, opacity: float = draw.OPACITY) -> np.ndarray:
    """The image under the classes' colours and names, uint8 [H', W', 3]; small ones are enlarged."""
    labels = self.labels
    if self.background:  # shows the image as it is
      labels = np.where(labels == 0, np.uint8(draw.IGNORE_LABEL), labels)
    return draw.draw_overlay(self.image, labels, self.palette, self.classes, opacity=opacity)

  def group_overlay(self, stage: int = -1) -> np.ndarray:
    """The image under a stage's groups, uint8 [H', W', 3]; 0 is the first, -1 the final one."""
    return draw.draw_groups(self.image, self.groups[stage])

  def to_json(self) -> dict[str, Any]:
    """Areas and scores of the classes, largest area first.

    `area` is the share of pixels whose label is the class; `score` is of the one segment that fits it best. A high
    score with no area means that another class fits that segment better.
    """
    pixels = np.bincount(self.labels.ravel(), minlength=len(self.classes))
    columns = zip(self.classes, self.areas, pixels, self.scores)
    rows = [
      dict(label=label, name=name, area=float(area), pixels=int(count), score=None if np.isnan(score) else float(score))
      for label, (name, area, count, score) in enumerate(columns)
    ]
    height, width = self.labels.shape
    return dict(picture=self.key, height=height, width=width, classes=sorted(rows, key=lambda row: -row['area']))
