"""Image-text pairs as people keep them: a folder of images with .txt captions, or a table of paths and captions."""

from collections.abc import Iterator, Sequence
import csv
import functools
import hashlib
import json
import os
import pathlib

import numpy as np

from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.tars import IMAGE_KINDS
from groupvit_jax.errors import UserError
from groupvit_jax.storage import is_local

TABLES = ('.csv', '.jsonl', '.parquet')
_COLUMNS = ('path', 'caption')
_LONGEST = 2**20  # bytes of a caption; more is a mistake
_END = '\0'  # of a path in memory, which can hold none


class Pairs:
  """Random access to pairs; captions of a folder are read when they are needed."""

  def __init__(self, folder: str, paths: Sequence[str], captions: Sequence[str] | None):
    """Holds pairs in two arrays, which processes share; captions are None where each image has a .txt."""
    rows = [path if captions is None else path + _END + captions[row] for row, path in enumerate(paths)]
    encoded = [row.encode('utf-8', 'surrogatepass') for row in rows]  # paths may not be UTF-8
    self.folder, self._in_files = folder, captions is None
    self._text, self._ends = b''.join(encoded), np.cumsum([0, *map(len, encoded)])

  def __len__(self) -> int:
    return len(self._ends) - 1

  def __getitem__(self, index: int) -> dict[str, object]:
    """Reads a pair: 'image' the encoded image, 'text' the caption, 'key' the path. Raises BadRecord."""
    path, _ = self._row(index)
    return {'image': _read(self.folder, path, 'image_missing'), 'text': self.caption_of(index), 'key': path}

  def caption_of(self, index: int) -> str:
    """Reads a caption. Raises BadRecord if there is none or it is not text."""
    path, caption = self._row(index)
    data = caption.encode('utf-8', 'surrogatepass')
    if self._in_files:
      data = _read(self.folder, os.path.splitext(path)[0] + '.txt', 'caption_missing')
    try:
      if len(data) > _LONGEST:
        raise ValueError('too long')
      return data.decode('utf-8').strip()
    except ValueError as error:
      raise BadRecord('caption_unreadable', path) from error

  @functools.cached_property
  def digest(self) -> str:
    """Changes when a path or a caption of a table does."""
    return hashlib.sha256(self._text + self._ends.tobytes()).hexdigest()[:16]

  def _row(self, index: int) -> tuple[str, str]:
    if not 0 <= index < len(self):
      raise IndexError(f'pair {index} of {len(self)}')
    row = self._text[self._ends[index] : self._ends[index + 1]].decode('utf-8', 'surrogatepass')
    path, _, caption = row.partition(_END)
    return path, caption


def open_pairs(path: str, what: str) -> Pairs:
  """Opens a folder, with those in it; or a CSV, JSONL or Parquet file with columns `path` and `caption`.

  Paths are relative to the table's folder. `what` is the entry that named it, for errors.
  """
  if not is_local(path):
    raise UserError(f'{what}={path!r}: folders and tables are read from disks; pack the pairs into tars for a bucket')
  return _open_table(pathlib.Path(path), what) if path.endswith(TABLES) else _open_folder(pathlib.Path(path), what)


def _open_folder(folder: pathlib.Path, what: str) -> Pairs:
  paths = sorted(
    os.path.relpath(os.path.join(parent, name), folder)
    for parent, _, names in os.walk(folder)
    for name in names
    if name.rpartition('.')[2].lower() in IMAGE_KINDS
  )
  if not paths:
    hint = "; for tars name a pattern, as in 'pairs/*.tar'" if any(folder.glob('*.tar')) else ''
    raise UserError(f'{what}={str(folder)!r} holds no image of {", ".join(sorted(IMAGE_KINDS))}{hint}')
  if not any((folder / path).with_suffix('.txt').exists() for path in paths[:1000]):
    raise UserError(
      f'{what}={str(folder)!r}: {paths[0]} has no caption beside it; write it into a .txt of the same name'
    )
  return Pairs(str(folder), paths, None)


def _open_table(table: pathlib.Path, what: str) -> Pairs:
  name = f'{what}={str(table)!r}'
  if not table.is_file():
    raise UserError(f'{name}: there is no such file')
  try:
    rows = [(path, caption) for path, caption in _ROWS[table.suffix](table)]
  except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
    if isinstance(error, UserError):
      raise
    reason = f'no column {error}' if isinstance(error, KeyError) else ' '.join(str(error).split())
    raise UserError(f'{name} cannot be read ({reason}); it is a table with columns path and caption') from error
  if not rows:
    raise UserError(f'{name} has no rows')
  if odd := [row for row, pair in enumerate(rows) if not all(isinstance(x, str) for x in pair) or _END in pair[0]]:
    raise UserError(f'{name}: row {odd[0] + 1} has no path or no caption that is text: {rows[odd[0]]!r}; correct it')
  if not any((table.parent / path).exists() for path, _ in rows[:1000]):
    raise UserError(f'{name}: there is no {table.parent / rows[0][0]}; paths are relative to the folder of the table')
  return Pairs(str(table.parent), *zip(*rows))


def _read_csv(table: pathlib.Path) -> Iterator[tuple[str, str]]:
  with table.open(newline='', encoding='utf-8-sig') as file:
    for row in csv.DictReader(file, strict=True):
      yield tuple(row[name] for name in _COLUMNS)


def _read_jsonl(table: pathlib.Path) -> Iterator[tuple[str, str]]:
  with table.open(encoding='utf-8') as file:
    for line in filter(str.strip, file):
      row = json.loads(line)
      yield tuple(row[name] for name in _COLUMNS)


def _read_parquet(table: pathlib.Path) -> Iterator[tuple[str, str]]:
  from pyarrow import parquet  # half a second

  columns = parquet.read_table(table, columns=list(_COLUMNS))
  return zip(*(columns[name].to_pylist() for name in _COLUMNS))


_ROWS = dict(zip(TABLES, (_read_csv, _read_jsonl, _read_parquet)))


def _read(folder: str, path: str, cause: str) -> bytes:
  try:
    return pathlib.Path(folder, path).read_bytes()
  except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
    raise BadRecord(cause, path) from error
