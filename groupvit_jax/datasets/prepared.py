"""Prepared TFDS data sets in ArrayRecord files, read in any order, without TensorFlow and without decoding."""

from collections.abc import Sequence

from etils import epath


def newest_version(data_dir: epath.PathLike, name: str) -> epath.Path | None:
  """The folder of the newest version of a data set in `data_dir`; None where there is none."""
  folder = epath.Path(data_dir) / name
  versions = [path for path in (folder.iterdir() if folder.is_dir() else ()) if (path / 'dataset_info.json').exists()]
  return max(versions, key=lambda path: [int(part) for part in path.name.split('.')], default=None)


def open_records(path: epath.PathLike, split: str, encoded: Sequence[str]) -> Sequence[dict[str, object]]:
  """The records of a split.

  Args:
    path: folder of the data set's version, local or in a bucket.
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
    raise ValueError(_not_whole(path, str(error))) from error
  if missing:
    raise ValueError(_not_whole(path, f'there is no {missing[0]}'))
  return records


def _not_whole(path: epath.PathLike, reason: str) -> str:
  line = ' '.join(reason.split())[:200]
  return f'{path} is no whole TFDS data set in ArrayRecord files ({line}); delete it and build it again'
