"""Image-text pairs of a prepared TFDS dataset in ArrayRecord files, without TensorFlow."""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json

from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TfdsSource:
  """Random access to the records of one split; picklable, opened when needed.

  Attributes:
    path: folder of the dataset's version, with `dataset_info.json` in it.
    split: which records, as TFDS names them.
    image: name of the feature that holds the picture; its bytes are not decoded.
    caption: name of the feature that holds the caption.
    length: number of records.
    num_shards: number of files.
    digest: of names, features and sizes.
  """

  path: str
  split: str
  image: str
  caption: str
  length: int
  num_shards: int
  digest: str

  def __reduce__(self):
    return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, number: int) -> dict[str, object]:
    """Reads a record.

    Returns:
      'image' the encoded picture, 'text' the caption, 'key' as 'SPLIT[NUMBER]'.

    Raises:
      BadRecord: the picture or the caption is empty, or the caption is not UTF-8.
    """
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
  """Opens a split of a prepared dataset.

  Args:
    path: folder of the dataset's version, local or `gs://`.
    split: as TFDS names it: 'train', 'train[:1%]'.
    image: name of the picture's feature.
    caption: name of the caption's feature.
    what: names the set in messages.

  Raises:
    ValueError: there is no such dataset, split or feature, or a file of it is missing.
  """
  tfds = _import_tfds()
  try:
    builder = tfds.builder_from_directory(path)
    info = builder.info.splits[split]
  except Exception as error:  # which one depends on what is wrong with the folder
    raise UserError(
      f'{what}: there is no TFDS dataset with a split {split!r} in {path} ({" ".join(str(error).split())[:200]})'
    ) from error
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
  facts = [builder.info.full_name, split, sorted(features), list(getattr(info, 'shard_lengths', ()))]
  digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
  return TfdsSource(str(path), split, image, caption, info.num_examples, len(info.filepaths), digest)


def _import_tfds():
  """The library, which takes a second to import: only for those who use it."""
  import tensorflow_datasets as tfds

  return tfds
