"""Prepared TFDS data sets in ArrayRecord files, read in any order, without TensorFlow and without decoding.

ArrayRecord's reader knows local files alone: a set in a bucket is copied to the cache folder before it is read.
"""

from collections.abc import Sequence
import hashlib
import os

from etils import epath

from groupvit_jax import storage
from groupvit_jax.errors import UserError

_REQUESTS, _CHUNK = 8, 2**25  # files that are copied at a time, and bytes of one


def newest_version(data_dir: epath.PathLike, name: str) -> epath.Path | None:
  """The folder of the newest version of a data set in `data_dir`; None where there is none.

  Args:
    data_dir: where TFDS data sets are kept; `gs://`, `s3://` and whatever else `fsspec` can list as well.
    name: of the data set.

  Returns:
    A local folder: of a remote set its copy, of which files that have not changed since the last time stay as they are.

  Raises:
    ValueError: the store cannot be reached.
  """
  if not storage.is_local(str(data_dir)):
    found = storage.list_files(f'{str(data_dir).rstrip("/")}/{name}/*/dataset_info.json')
    newest = max((path.removesuffix('/dataset_info.json') for path in found), key=_version, default=None)
    return newest and _copy(newest)
  folder = epath.Path(data_dir) / name
  versions = [path for path in (folder.iterdir() if folder.is_dir() else ()) if (path / 'dataset_info.json').exists()]
  return max(versions, key=_version, default=None)


def open_records(path: epath.PathLike, split: str, encoded: Sequence[str]) -> Sequence[dict[str, object]]:
  """The records of a split.

  Args:
    path: folder of the data set's version, on a disk.
    split: which one.
    encoded: names of the features that are left as the bytes of a file.

  Raises:
    ValueError: it is no data set with that split in ArrayRecord files, or a file is missing.
  """
  import tensorflow_datasets as tfds  # it takes a second to import

  try:
    builder = tfds.builder_from_directory(str(path))
    missing = [file.name for file in builder.info.splits[split].filepaths if not file.exists()]
    records = builder.as_data_source(split=split, decoders={name: tfds.decode.SkipDecoding() for name in encoded})
  except Exception as error:  # which one depends on what is wrong with the folder
    raise UserError(_not_whole(path, str(error))) from error
  if missing:
    raise UserError(_not_whole(path, f'there is no {missing[0]}'))
  return records


def _version(path: epath.PathLike) -> list[int]:
  return [int(part) for part in str(path).rsplit('/', 1)[-1].split('.')]


def _copy(folder: str) -> epath.Path:
  """A local copy of a remote folder of files."""
  *_, name, version = folder.split('/')
  place = storage.cache_folder() / 'datasets' / hashlib.sha256(folder.encode()).hexdigest()[:12] / name / version

  def fetch(shard: storage.Shard) -> None:
    tag = f'{shard.size} {shard.version}'
    file, note = place / shard.name, place / 'versions' / shard.name
    if file.exists() and note.exists() and note.read_text() == tag:
      return
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f'.{shard.name}.{os.uname().nodename}-{os.getpid()}'  # several processes may copy at once
    with partial.open('wb') as copy:
      for start in range(0, shard.size, _CHUNK):
        copy.write(storage.read(shard.path, start, min(_CHUNK, shard.size - start)))
    partial.replace(file)
    storage.write_atomic(str(note), tag.encode())

  storage.map_threads(fetch, storage.find_shards([f'{folder}/*'], folder), _REQUESTS)
  return epath.Path(place)


def _not_whole(path: epath.PathLike, reason: str) -> str:
  line = ' '.join(reason.split())[:200]
  return f'{path} is no whole TFDS data set in ArrayRecord files ({line}); delete it and build it again'
