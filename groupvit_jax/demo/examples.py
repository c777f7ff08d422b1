"""Example images for the page: scenes made here, and photographs that come with scikit-image."""

from collections.abc import Iterator
import importlib.resources
import importlib.util
import pathlib
from typing import NamedTuple

import ml_collections
from PIL import Image

from groupvit_jax.data.scenes.scenes import Scenes
from groupvit_jax.data.sources import build_scenes

_NUM_SCENES = 4
# For a run that was not trained on scenes.
_THINGS, _STUFF = ('dog', 'panda', 'banana', 'rocket'), ('grass', 'sky', 'sand', 'water')

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
  """Scenes that the run has not seen, written to a folder, and photographs where scikit-image is installed.

  Args:
    config: of the run.
    folder: exists.
  """
  return [*_scenes(config, folder), *_photographs()]


def _scenes(config: ml_collections.ConfigDict, folder: pathlib.Path) -> Iterator[Example]:
  size = tuple(config.model.vision.image_size)
  if 'source' in config.data and config.data.source == 'scenes':
    scenes = build_scenes(config.data.scenes, size, 'test')
  else:
    scenes = Scenes(size=min(size), things=_THINGS, stuff=_STUFF, seed=0, length=_NUM_SCENES, split='test')
  for index in range(min(_NUM_SCENES, len(scenes))):
    path = folder / f'scene{index}.png'
    Image.fromarray(scenes[index]['image']).save(path)
    yield Example(str(path), ', '.join(scenes.classes))


def _photographs() -> Iterator[Example]:
  if importlib.util.find_spec('skimage') is None:
    return
  folder = importlib.resources.files('skimage') / 'data'
  for name, words in _PHOTOGRAPHS.items():
    if (folder / name).is_file():  # which of them come with it depends on the version
      yield Example(str(folder / name), words)
