"""Example images for the page: scenes made here, and photographs that come with scikit-image."""

from collections.abc import Iterator
import importlib.resources
import pathlib
from typing import NamedTuple

import ml_collections
from PIL import Image

from groupvit_jax.data.sources import build_scenes

_NUM_SCENES = 4

# In the public domain (the first two by CC0, the third by SpaceX), with class names that fit.
_PHOTOGRAPHS = {
  'chelsea.png': 'cat, blanket',
  'coffee.png': 'coffee|cup, spoon, table',
  'rocket.jpg': 'rocket, sky, smoke, land',
}


class Example(NamedTuple):
  """An image, and class names to segment it into."""

  path: str
  words: str


def make_examples(config: ml_collections.ConfigDict, folder: pathlib.Path) -> list[Example]:
  """Images of the kind that a run was trained on: scenes that it has not seen, in the folder, or photographs."""
  trained_on_scenes = 'source' in config.data and config.data.source == 'scenes'
  return list(_scenes(config, folder) if trained_on_scenes else _photographs())


def _scenes(config: ml_collections.ConfigDict, folder: pathlib.Path) -> Iterator[Example]:
  scenes = build_scenes(config.data.scenes, tuple(config.model.vision.image_size), 'test')
  for index in range(min(_NUM_SCENES, len(scenes))):
    path = folder / f'scene{index}.png'
    Image.fromarray(scenes[index]['image']).save(path)
    yield Example(str(path), ', '.join(scenes.classes))


def _photographs() -> Iterator[Example]:
  folder = importlib.resources.files('skimage') / 'data'
  for name, words in _PHOTOGRAPHS.items():
    if (folder / name).is_file():  # which of them come with it depends on the version
      yield Example(str(folder / name), words)
