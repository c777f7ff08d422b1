"""Training data of a config: embedded scenes, one's own pairs, or sets of pairs in webdataset tars and TFDS folders."""

from collections.abc import Iterator, Mapping
import concurrent.futures
import dataclasses
import hashlib
import os

import ml_collections

from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.mixture import DataSet, Mixture
from groupvit_jax.data.pairs import open_pairs, TABLES
from groupvit_jax.data.scenes.scenes import Scenes
from groupvit_jax.data.tars import open_webdataset
from groupvit_jax.data.tfds import open_tfds
from groupvit_jax.errors import UserError
from groupvit_jax.storage import is_local

_CAPTION_THREADS, _CHUNK = 32, 1024  # each thread waits for one read

# What a set of each format is described by, besides `format`, `weight` and `expected`.
_FIELDS = {'webdataset': ('path', 'caption'), 'tfds': ('path', 'split', 'image', 'caption')}
_COMMON = ('format', 'weight', 'expected')


def build_source(config: ml_collections.ConfigDict, image_size: tuple[int, int]) -> Mixture:
  """Builds the training data that a config's `data` part names.

  Args:
    config: `source` is 'scenes', with `scenes` (see `build_scenes`); 'pairs', with the `path` of tars, a folder or a
      table (see `pairs.open_pairs`), `index_dir` and `clean_captions`; or 'sets', with `sets`, a dict from name to a
      set's description, `index_dir` and `clean_captions`. Sets are counted in the order of their names. A set has a
      `format`, a `weight` (see `mixture`), the number of samples `expected` (0 if unknown; for the audit), and

      - 'webdataset': `path`, a pattern of tars or several (see `storage.find_shards`), and `caption`: 'txt', 'cls' or
        'json:FIELD';
      - 'tfds': `path`, the folder of a prepared TFDS data set in ArrayRecord files, its `split`, and the names of its
        features `image` and `caption`.
    image_size: (H, W) of the model.
  """
  if config.source == 'sets':
    if not config.get('sets'):
      raise UserError("data.sets is empty; name the sets to train on, or use data.source='scenes'")
    sets = (_open_set(name, config.sets[name], config.index_dir) for name in sorted(config.sets))
    return Mixture(tuple(dataclasses.replace(part, clean=config.clean_captions) for part in sets))
  if config.source == 'pairs':
    return Mixture((dataclasses.replace(_open_pairs(config.path, config.index_dir), clean=config.clean_captions),))
  scenes = build_scenes(config.scenes, image_size, split='train')
  digest = hashlib.sha256(repr(scenes).encode()).hexdigest()[:16]
  return Mixture((DataSet('scenes', scenes, digest, num_shards=0, weight=0.0),))


def build_scenes(config: ml_collections.ConfigDict, image_size: tuple[int, int], split: str) -> Scenes:
  """Builds embedded scenes of a config's `data.scenes`: endless for split 'train', `num_heldout` of them otherwise."""
  if image_size[0] != image_size[1]:
    raise UserError(f'model.vision.image_size={image_size}: scenes are square; use equal height and width')
  return Scenes(
    size=image_size[0],
    things=config.things,
    stuff=config.stuff,
    seed=config.seed,
    length=2**40 if split == 'train' else config.num_heldout,
    split=split,
    min_things=config.min_things,
    max_things=config.max_things,
  )


def sample_captions(source: Mixture, count: int) -> Iterator[str]:
  """Yields usable captions of up to `count` records, spread evenly, without reading images where a set allows that."""
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


def _open_pairs(path: str, index_dir: str) -> DataSet:
  what = 'data.path'
  if not path:
    raise UserError(
      f"{what} is empty; name tars as in --config.data.path='pairs/*.tar', a folder of images with .txt captions, or a "
      'table (.csv, .jsonl, .parquet) with columns path and caption'
    )
  if path.endswith(TABLES) or os.path.isdir(path):
    pairs = open_pairs(path, what)
    return DataSet('pairs', pairs, pairs.digest, num_shards=1, weight=0.0)
  if is_local(path) and not path.endswith('.tar') and not set('*{') & set(path):
    raise UserError(f'{what}: there is no folder {path}, and it names no table and no tars')
  source = open_webdataset((path,), 'txt', index_dir, what)
  return DataSet('pairs', source, source.index.digest, len(source.shards), weight=0.0)


def _open_set(name: str, config: Mapping[str, object], index_dir: str) -> DataSet:
  what = f'data.sets.{name}'
  if config.get('format') not in _FIELDS:
    raise UserError(f'{what}.format={config.get("format")!r}: use ' + ' or '.join(map(repr, _FIELDS)))
  fields = {*_FIELDS[config['format']], *_COMMON}
  if odd := sorted(fields ^ set(config)):
    verb = 'is missing' if odd[0] in fields else 'is unknown'
    raise UserError(f'{what}.{odd[0]} {verb}; a {config["format"]} set has {", ".join(sorted(fields))}')
  if config['format'] == 'tfds':
    source = open_tfds(config['path'], config['split'], config['image'], config['caption'], what)
    return DataSet(name, source, source.digest, source.num_shards, config['weight'])
  patterns = (config['path'],) if isinstance(config['path'], str) else tuple(config['path'])
  source = open_webdataset(patterns, config['caption'], index_dir, what)
  return DataSet(name, source, source.index.digest, len(source.shards), config['weight'])
