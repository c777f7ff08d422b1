"""What was found in one picture: label maps, groups, scores, heat maps, overlays."""

from collections.abc import Callable
import dataclasses
from typing import Any

import cv2
import numpy as np
from PIL import Image

from groupvit_jax.errors import UserError
from groupvit_jax.eval import draw
from groupvit_jax.eval.window_encoder import EncodedWindows


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What was found in one picture. Label c stands for `classes[c]`.

  Attributes:
    key: name of the picture: its path, or its place in the list.
    image: uint8 [H, W, 3].
    classes: C names.
    background: whether the first of them is what no word fits well enough.
    palette: their colours.
    labels: uint8 [H, W].
    pixel_scores: float32 [H, W], of those labels.
    scores: [C], of the segment that fits a class best, in any window; nan for the background.
    group_maps: makes `groups` when they are first asked for, which takes one more pass of the encoder.
    windows: the K windows that were looked at.
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

  @property
  def areas(self) -> np.ndarray:
    """Share of the picture that each class covers, [C]."""
    return np.bincount(self.labels.ravel(), minlength=len(self.classes)) / self.labels.size

  @property
  def groups(self) -> tuple[np.ndarray, ...]:
    """Per grouping stage uint8 [H, W], of the picture seen whole; the final segments are last."""
    return self.group_maps()

  @property
  def segments(self) -> np.ndarray:
    """The final segments, uint8 [H, W]."""
    return self.groups[-1]

  def heat_map(self, name: str) -> np.ndarray:
    """How well a class fits each pixel: its score in [0, 1], float32 [H, W]; the largest one labels.

    Raises:
      ValueError: no such class was looked for.
    """
    words = self.classes[self.background :]
    if name not in words:
      raise UserError(f'{name!r} was not looked for; there are {", ".join(words)}')
    scores = self.class_scores[:, :, words.index(name)]
    image = self.windows.image
    total, covers = np.zeros((2, *image.resized), np.float32)
    for top, left, segments, score in zip(image.tops, image.lefts, self.windows.segments, scores):
      here = np.s_[top : top + segments.shape[0], left : left + segments.shape[1]]
      total[here] += score[segments]
      covers[here] += 1
    return cv2.resize(total / covers, image.original[::-1], interpolation=cv2.INTER_LINEAR)

  def mask(self) -> Image.Image:
    """The label map as an indexed picture with the classes' colours."""
    return draw.mask_image(self.labels, self.palette)

  def overlay(self, opacity: float = draw.OPACITY) -> np.ndarray:
    """The picture under the classes' colours and names, uint8 [H', W', 3]; small ones are enlarged."""
    labels = self.labels
    if self.background:  # shows the picture as it is
      labels = np.where(labels == 0, np.uint8(draw.IGNORE_LABEL), labels)
    return draw.draw_overlay(self.image, labels, self.palette, self.classes, opacity=opacity)

  def group_overlay(self, stage: int = -1) -> np.ndarray:
    """The picture under a stage's groups, uint8 [H', W', 3]; 0 is the first, -1 the final one."""
    return draw.draw_groups(self.image, self.groups[stage])

  def to_json(self) -> dict[str, Any]:
    """Areas and scores of the classes, largest area first."""
    rows = [
      {
        'label': label,
        'name': name,
        'area': float(area),
        'pixels': int((self.labels == label).sum()),
        'score': None if np.isnan(score) else float(score),
      }
      for label, (name, area, score) in enumerate(zip(self.classes, self.areas, self.scores))
    ]
    height, width = self.labels.shape
    return {
      'picture': self.key,
      'height': height,
      'width': width,
      'classes': sorted(rows, key=lambda row: -row['area']),
    }
