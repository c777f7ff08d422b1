"""From a ConfigDict to a source of image-text pairs."""

from collections.abc import Iterator
import concurrent.futures
import hashlib

import ml_collections

from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.mixture import DataSet, Mixture
from groupvit_jax.data.scenes.scenes import Scenes
from groupvit_jax.data.sets import open_sets
from groupvit_jax.errors import UserError

_CAPTION_THREADS, _CHUNK = 32, 1024  # each thread waits for one read


def build_source(config: ml_collections.ConfigDict, image_size: tuple[int, int]) -> Mixture:
  """Builds the training data a config's `data` part names: 'scenes', or the 'sets' it describes.

  Raises:
    ValueError: there is no such source, it cannot be read, or cannot make pictures of `image_size`.
  """
  if config.source == 'sets':
    return open_sets(config)
  if config.source != 'scenes':
    raise UserError(f"data.source={config.source!r}: use 'scenes' or 'sets'")
  scenes = build_scenes(config.scenes, image_size, split='train')
  digest = hashlib.sha256(repr(scenes).encode()).hexdigest()[:16]
  return Mixture((DataSet('scenes', scenes, digest, num_shards=0, weight=0.0),))


def sample_captions(source: Mixture, count: int) -> Iterator[str]:
  """Yields usable captions, spread evenly over all records, without reading pictures where a set allows that.

  Args:
    source: the data.
    count: how many records are looked at; all of them if there are fewer.
  """
  count = min(count, len(source))
  stored = any(part.num_shards for part in source.sets)  # what is made on demand is alike everywhere
  stride = len(source) / count if stored else 1

  def read(number: int) -> str | None:
    try:
      return source.caption_of(int(number * stride))
    except BadRecord:
      return None

  with concurrent.futures.ThreadPoolExecutor(_CAPTION_THREADS) as pool:
    for start in range(0, count, _CHUNK):  # the pool would otherwise read ahead without end
      yield from filter(None, pool.map(read, range(start, min(start + _CHUNK, count))))


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
    raise UserError(f'model.vision.image_size={image_size}: scenes are square; use equal height and width')
  length = 2**40 if split == 'train' else config.num_heldout
  return Scenes(
    size=image_size[0],
    things=config.things,
    stuff=config.stuff,
    seed=config.seed,
    length=length,
    split=split,
    min_things=config.min_things,
    max_things=config.max_things,
    partial_captions=config.partial_captions,
  )
