"""Each grouping stage's groups of whole pictures, as the paper's figures show them.

A label map averages overlapping windows, whose groups do not correspond. Here the model sees the whole
picture at once, resized to one window; a picture of a window's size has the groups of its label map.

Shape letters: B pictures, H W pixels, N tokens, S groups of a stage.
"""

from collections.abc import Sequence
import functools

import cv2
import jax
from jax.sharding import NamedSharding
import numpy as np

from groupvit_jax.model import segmentation
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.pixels import normalize_images
from groupvit_jax.running import sharding


@functools.partial(jax.jit, static_argnames=('model', 'place'))
def _affinities(
  variables: dict, images: jax.Array, *, model: ImageTextModel, place: NamedSharding
) -> tuple[jax.Array, ...]:
  """Per grouping stage [B, N, S], of images uint8 [B, H, W, 3]."""
  out = model.apply(variables, normalize_images(images), method='encode_segments')
  stages = range(1, len(out.assignments) + 1)
  affinities = tuple(segmentation.token_affinity(out.assignments[:i]) for i in stages)
  return jax.lax.with_sharding_constraint(affinities, place)


def group_maps(
  model: ImageTextModel, variables: dict, images: Sequence[np.ndarray], window: int, mesh: jax.sharding.Mesh
) -> list[tuple[np.ndarray, ...]]:
  """The group of each pixel, per stage.

  Args:
    model: the model.
    variables: of the model, on the mesh.
    images: B pictures, uint8 [H, W, 3], of any sizes; the same on every host.
    window: side of the square that pictures are resized to. Compiled once per B and window.
    mesh: the devices.

  Returns:
    For each picture, per grouping stage, uint8 [H, W]; the final segments come last.
  """
  squares = [cv2.resize(i, (window, window), interpolation=_method(i, window)) for i in images]
  place = sharding.replicated(mesh)
  stages = _affinities(variables, np.stack(squares), model=model, place=place)
  stages = [np.asarray(stage) for stage in stages]
  side = window // model.vision.patch_size
  return [
    tuple(_upsample(stage[index].reshape(side, side, -1), image.shape[:2]) for stage in stages)
    for index, image in enumerate(images)
  ]


def _method(image: np.ndarray, window: int) -> int:
  """Area averaging where a picture shrinks: bilinear would skip pixels."""
  return cv2.INTER_AREA if min(image.shape[:2]) > window else cv2.INTER_LINEAR


def _upsample(affinity: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Argmax of [rows, columns, S], bilinear at `size`, one group at a time: pictures may be large."""
  best = np.full(size, -np.inf, np.float32)
  groups = np.zeros(size, np.uint8)
  for index in range(affinity.shape[-1]):
    plane = np.ascontiguousarray(affinity[:, :, index])
    plane = cv2.resize(plane, size[::-1], interpolation=cv2.INTER_LINEAR)
    groups[plane > best] = index
    np.maximum(best, plane, out=best)
  return groups
