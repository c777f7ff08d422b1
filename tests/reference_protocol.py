"""Protocol `groupvit`, slowly: one picture, one window, one step at a time, in numpy float64.

Written from the description of the method alone. It shares OpenCV's resize of the uint8 picture
with the package, which is what the protocol is defined by, and is given what encodes a window:
features and assignments are the model's, in its precision. What they are compared with on their
own, `transformers`, is in test_parity.py.
"""

from typing import NamedTuple

import cv2
import numpy as np

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class Sizes(NamedTuple):
  short_side: int = 448
  max_long_side: int = 2048
  window: int = 448
  stride: int = 224
  patch: int = 16


class Encoded(NamedTuple):
  """Of one window: pooled feature [E], segments [S, E] (projected), per stage assignment [S, N]."""

  pooled: np.ndarray
  segments: np.ndarray
  assignments: list


def softmax(x):
  e = np.exp(x - x.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def unit(x):
  return x / np.sqrt((x**2).sum(axis=-1, keepdims=True))


def bilinear(x, height, width):
  """Half-pixel bilinear resize of [h, w, channels]."""
  for axis, size in enumerate((height, width)):
    n = x.shape[axis]
    centre = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.floor(centre).astype(int)
    high = np.minimum(low + 1, n - 1)
    t = (centre - low).reshape([-1 if a == axis else 1 for a in range(3)])
    x = x.take(low, axis) * (1 - t) + x.take(high, axis) * t
  return x


def resize(image, sizes):
  height, width = image.shape[:2]
  scale = sizes.short_side / min(height, width)
  if scale * max(height, width) > sizes.max_long_side:
    scale = sizes.max_long_side / max(height, width)
  rows, columns = int(height * scale + 0.5), int(width * scale + 0.5)
  return cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)


def starts(length, sizes):
  """Offsets along an axis: every stride, the last one moved back so that it ends at the border."""
  if length <= sizes.window:
    return [0]
  found = [0]
  while found[-1] + sizes.window < length:
    found.append(min(found[-1] + sizes.stride, length - sizes.window))
  return found


def window_scores(window, encode, text, log_temperature, threshold, patch):
  """Scores [h, w, C] of a window; with a threshold the background is prepended."""
  height, width = window.shape[:2]
  out = encode((window / 255 - MEAN) / STD)
  affinity = np.asarray(out.assignments[0], np.float64).T
  for assignment in out.assignments[1:]:
    affinity = affinity @ np.asarray(assignment, np.float64).T
  grid = affinity.reshape(height // patch, width // patch, -1)
  segment = bilinear(grid, height, width).argmax(axis=-1)

  scale = min(np.exp(log_temperature), 100)
  text = unit(np.asarray(text, np.float64))
  logits = scale * unit(np.asarray(out.segments, np.float64)) @ text.T
  pooled = softmax(scale * unit(np.asarray(out.pooled, np.float64)) @ text.T)
  filtered = np.full_like(logits, -np.inf)
  for c in np.argsort(-pooled)[: min(5, len(text))]:
    filtered[:, c] = logits[:, c]
  p = softmax(filtered) * softmax(logits)
  scores = p[segment]
  if threshold is not None:
    background = scores.max(axis=-1) < min(threshold, p.max())
    scores = np.concatenate([background[:, :, None], scores], axis=-1)
  return scores


def label_picture(image, encode, text, log_temperature, threshold=None, sizes=Sizes()):
  """Label map [H, W] and the margin between the two best scores of each pixel."""
  resized = resize(image, sizes)
  height, width = resized.shape[:2]
  total, count = 0, np.zeros((height, width, 1))
  for top in starts(height, sizes):
    for left in starts(width, sizes):
      rows, columns = slice(top, top + sizes.window), slice(left, left + sizes.window)
      scores = window_scores(resized[rows, columns], encode, text, log_temperature, threshold, sizes.patch)
      if isinstance(total, int):
        total = np.zeros((height, width, scores.shape[-1]))
      total[rows, columns] += scores
      count[rows, columns] += 1
  assert (count > 0).all()
  scores = bilinear(total / count, *image.shape[:2])
  best = np.sort(scores, axis=-1)
  return softmax(scores.astype(np.float32)).argmax(axis=-1), best[..., -1] - best[..., -2]
