"""Pictures of VOC's sizes with label maps, and embeddings of 20 classes; the same in every process."""

import functools

import cv2
import numpy as np

WINDOW, STRIDE, THRESHOLD = 448, 224, 0.95
# (H, W) that most of VOC's pictures have; 448 on the short side gives 2, 2, 3 and 3 windows, in all of val 3.1.
SIZES = ((375, 500), (500, 375), (333, 500), (500, 333))


@functools.cache
def picture(index: int) -> tuple[np.ndarray, np.ndarray]:
  """uint8 [H, W, 3], detail at every scale, and labels 0..20, uint8 [H, W]."""
  rng = np.random.default_rng(index)
  height, width = SIZES[index % len(SIZES)]
  pixels, scale = np.zeros((height, width, 3), np.float32), 2
  while scale < 512:
    noise = rng.standard_normal((height // scale + 2, width // scale + 2, 3), np.float32)
    pixels += scale**0.5 * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    scale *= 2
  pixels -= pixels.min()
  labels = rng.integers(0, 21, (4, 4)).astype(np.uint8)
  return (255 * pixels / pixels.max()).astype(np.uint8), cv2.resize(labels, (width, height), interpolation=0)


def text_embeds() -> np.ndarray:
  """Unit vectors [20, 256], float32."""
  embeds = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float32)
  return embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)
