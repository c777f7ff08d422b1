"""TFDS data sets in ArrayRecord files, read in any order, without TensorFlow and without decoding.

ArrayRecord's reader knows local files alone: a benchmark in a bucket is copied to the cache folder before it is read.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import os

from etils import epath

from groupvit_jax import storage
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.errors import UserError

_REQUESTS, _CHUNK = 8, 2**25  # files that are copied at a time, and bytes of one request


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """Random access to the image-text records of one split; picklable, opened when needed."""

  path: str  # folder of the data set's version, with `dataset_info.json` in it
  split: str  # as TFDS names it
  image: str  # name of the feature that holds the image; its bytes are not decoded
  caption: str  # name of the feature that holds the caption
  length: int  # records
  num_shards: int  # files
  digest: str  # of names, features and sizes

  def __reduce__(self):
    return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, number: int) -> dict[str, object]:
    """A record: 'image' the encoded image, 'text' the caption, 'key' as 'FOLDER/SPLIT[NUMBER]'. Raises BadRecord."""
    record = self._records[number]
    key = f'{self.path}/{self.split}[{number}]'
    if not record[self.image]:
      raise BadRecord('image_missing', key)
    try:
      text = record[self.caption].decode('utf-8').strip()
    except UnicodeDecodeError as error:
      raise BadRecord('caption_unreadable', key) from error
    return {'image': record[self.image], 'text': text, 'key': key}

  @functools.cached_property
  def _records(self) -> Sequence[dict[str, bytes]]:
    tfds = _import_tfds()
    builder = tfds.builder_from_directory(self.path)
    return builder.as_data_source(split=self.split, decoders={self.image: tfds.decode.SkipDecoding()})


def open_tfds(path: str, split: str, image: str, caption: str, what: str) -> TfdsSource:
  """Opens the records of a split, as TFDS names it ('train[:1%]'), of a data set's version, local or in `gs://`.

  `image` and `caption` are the names of their features; `what` names the set in errors.
  """
  tfds = _import_tfds()
  try:
    builder = tfds.builder_from_directory(path)
    info = builder.info.splits[split]
  except Exception as error:  # which one depends on what is wrong with the folder
    raise UserError(f'{what}: there is no TFDS dataset with a split {split!r} in {path} ({_line(error)})') from error
  features = builder.info.features
  for name, kind in ((image, tfds.features.Image), (caption, tfds.features.Text)):
    if name not in features or not isinstance(features[name], kind):
      raise UserError(f'{what}: the dataset has no {kind.__name__} feature {name!r}; it has ' + ', '.join(features))
  if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise UserError(
      f"{what}: {path} holds {builder.info.file_format.value} files; prepare it with file_format='array_record'"
    )
  missing = [file for file in info.filepaths if not file.exists()]
  if missing:
    raise UserError(
      f'{what}: {len(missing)} of {len(info.filepaths)} files are missing, first {missing[0]}; copy them again'
    )
  metadata = [builder.info.full_name, split, sorted(features), list(getattr(info, 'shard_lengths', ()))]
  digest = hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:16]
  return TfdsSource(str(path), split, image, caption, info.num_examples, len(info.filepaths), digest)


def open_records(path: epath.PathLike, split: str, encoded: Sequence[str]) -> Sequence[dict[str, object]]:
  """All features of the records of a split, in a data set's version on a disk; `encoded` ones are left as bytes."""
  tfds = _import_tfds()
  try:
    builder = tfds.builder_from_directory(str(path))
    missing = [file.name for file in builder.info.splits[split].filepaths if not file.exists()]
    if missing:
      raise FileNotFoundError(f'there is no {missing[0]}')
    return builder.as_data_source(split=split, decoders={name: tfds.decode.SkipDecoding() for name in encoded})
  except Exception as error:  # which one depends on what is wrong with the folder
    raise UserError(
      f'{path} is no whole TFDS data set in ArrayRecord files ({_line(error)}); delete it and build it again'
    ) from error


def newest_version(data_dir: epath.PathLike, name: str) -> epath.Path | None:
  """A local folder with the newest version of a data set; None where there is none.

  Args:
    data_dir: the folder of all TFDS data sets: local, or a store that `fsspec` can list. A remote set is copied to
      the cache folder; files that have not changed since the last copy stay as they are.
    name: of the data set.
  """
  if not storage.is_local(str(data_dir)):
    found = storage.list_files(f'{str(data_dir).rstrip("/")}/{name}/*/dataset_info.json')
    newest = max((path.removesuffix('/dataset_info.json') for path in found), key=_version, default=None)
    return newest and _copy(newest)
  folder = epath.Path(data_dir) / name
  versions = [path for path in (folder.iterdir() if folder.is_dir() else ()) if (path / 'dataset_info.json').exists()]
  return max(versions, key=_version, default=None)


def _version(path: epath.PathLike) -> list[int]:
  return [int(part) for part in str(path).rsplit('/', 1)[-1].split('.')]


def _copy(folder: str) -> epath.Path:
  """A local copy of a remote folder of files."""
  *_, name, version = folder.split('/')
  local = storage.cache_folder() / 'datasets' / hashlib.sha256(folder.encode()).hexdigest()[:12] / name / version

  def fetch(shard: storage.Shard) -> None:
    tag = f'{shard.size} {shard.version}'
    file, note = local / shard.name, local / 'versions' / shard.name
    if file.exists() and note.exists() and note.read_text() == tag:
      return
    local.mkdir(parents=True, exist_ok=True)
    partial = local / f'.{shard.name}.{os.uname().nodename}-{os.getpid()}'  # several processes may copy at once
    with partial.open('wb') as copy:
      for start in range(0, shard.size, _CHUNK):
        copy.write(storage.read_range(shard.path, start, min(_CHUNK, shard.size - start)))
    partial.replace(file)
    storage.write_atomic(str(note), tag.encode())

  storage.map_threads(fetch, storage.find_shards([f'{folder}/*'], folder), _REQUESTS)
  return epath.Path(local)


def _import_tfds():
  """The library, which takes a second to import: only for those who use it."""
  import tensorflow_datasets

  return tensorflow_datasets


def _line(error: Exception) -> str:
  return ' '.join(str(error).split())[:200]
