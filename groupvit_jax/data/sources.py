"""From a ConfigDict to a source of image-text pairs."""

import ml_collections

from groupvit_jax.data.pipeline import Source
from groupvit_jax.data.scenes import Scenes


def build_source(config: ml_collections.ConfigDict, image_size: tuple[int, int]) -> Source:
  """Builds the training source a config's `data` part names.

  Raises:
    ValueError: there is no such source, or it cannot make pictures of `image_size`.
  """
  if config.source != 'scenes':
    raise ValueError(f"data.source={config.source!r}: use 'scenes'")
  return build_scenes(config.scenes, image_size, split='train')


def build_scenes(config: ml_collections.ConfigDict, image_size: tuple[int, int], split: str) -> Scenes:
  """Builds embedded scenes: endless for training, `num_heldout` of them otherwise.

  Args:
    config: the `data.scenes` part of a config.
    image_size: (H, W) of the model; scenes are square.
    split: 'train', 'validation' or 'test'.

  Raises:
    ValueError: the model's pictures are not square, or the config asks for what the scenes do not offer.
  """
  if image_size[0] != image_size[1]:
    raise ValueError(f'model.vision.image_size={image_size}: scenes are square; use equal height and width')
  length = 2**40 if split == 'train' else config.num_heldout
  return Scenes(size=image_size[0], things=config.things, stuff=config.stuff, seed=config.seed, length=length,
                split=split, min_things=config.min_things, max_things=config.max_things,
                partial_captions=config.partial_captions)
