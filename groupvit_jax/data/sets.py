"""From a ConfigDict to the sets of image-text pairs that it names."""

from collections.abc import Mapping

import ml_collections

from groupvit_jax.data.mixture import DataSet, Mixture
from groupvit_jax.data.tfds_source import open_tfds
from groupvit_jax.data.webdataset import open_webdataset
from groupvit_jax.errors import UserError

# What a set of each format is described by, besides `format`, `weight` and `expected`.
_FIELDS = {'webdataset': ('path', 'caption'), 'tfds': ('path', 'split', 'image', 'caption')}
_COMMON = ('format', 'weight', 'expected')


def open_sets(config: ml_collections.ConfigDict) -> Mixture:
  """Opens the sets of a config's `data` part, in the order of their names.

  Args:
    config: with `sets`, a dict from name to a set's description, and `index_dir`. A set has a
      `format`, a `weight` (see `mixture`), the number of samples `expected` (0 if unknown; for the
      audit), and

      - 'webdataset': `path`, a pattern of tars or several (see `shards.find_shards`), and
        `caption`: 'txt', 'cls' or 'json:FIELD';
      - 'tfds': `path`, the folder of a prepared TFDS dataset in ArrayRecord files, its `split`,
        and the names of its features `image` and `caption`.

  Raises:
    ValueError: a description has a mistake, or a set cannot be read.
  """
  if not config.get('sets'):
    raise UserError("data.sets is empty; name the sets to train on, or use data.source='scenes'")
  return Mixture(tuple(_open_set(name, config.sets[name], config.index_dir) for name in sorted(config.sets)))


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
