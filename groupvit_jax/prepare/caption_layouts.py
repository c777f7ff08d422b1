"""Official layouts of image-text data sets: the records of a download, in parts.

Each function takes the folder of a download and lists its parts; each becomes one file of the TFDS data set. A part
yields its records, or the reason why one is left out. Images are not decoded.
"""

import bz2
from collections.abc import Callable, Iterator
import contextlib
import functools
import json
import pathlib
import re
import sqlite3
from typing import NamedTuple, TextIO
import urllib.parse
import zipfile

import numpy as np
import tqdm

from groupvit_jax import storage
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.tars import open_webdataset, WebDataset
from groupvit_jax.errors import UserError

Record = dict[str, object]  # 'image' and texts by the name of their feature

_HASH_NAME = re.compile(r'[0-9a-f]{32}')
_TAG = re.compile(r'<[^<>]+>')
SCRATCH = 'captions'  # folder for captions, sorted, while a set is built
# Columns of YFCC100M's metadata, and of OpenAI's list of the subset: line, photo, hash, and so on.
_PHOTO, _HASH, _TITLE, _DESCRIPTION = 1, 2, 8, 9


class Part(NamedTuple):
  """An input file that becomes one file of the data set."""

  name: str
  size: int  # tells another input of the same name
  read: Callable[[], Iterator[Record | BadRecord]]


Layout = Callable[[str, pathlib.Path], list[Part]]


def tars(manual_dir: str, scratch: pathlib.Path) -> list[Part]:
  """CC3M or CC12M from img2dataset: `*.tar` with `KEY.jpg` and `KEY.txt`, local or remote."""
  del scratch
  pattern = f'{manual_dir.rstrip("/")}/*.tar'
  found = storage.find_shards([pattern], 'tars')
  source = open_webdataset([pattern], 'txt', '', 'tars')
  ends = [sum(source.index.counts[: n + 1]) for n in range(len(found))]
  return [
    Part(shard.name, shard.size, functools.partial(_read_tar, source, start, end))
    for shard, start, end in zip(found, [0, *ends], ends)
  ]


def yfcc14m(manual_dir: str, scratch: pathlib.Path) -> list[Part]:
  """YFCC100M's zips and the captions of its 14 M subset.

  - `**/*.zip` with `.../HASH.jpg`
  - `yfcc100m_subset_data.tsv`: OpenAI's list of line, photo and hash
  - `yfcc100m_dataset.sql`: the metadata, an SQLite file; or `yfcc100m_dataset*`, 25 columns separated by tabs, which
    may be the rows of the subset alone: then the list may be missing

  Texts may be compressed by bzip2. A caption is title and description, without their percent signs and tags.
  """
  folder = _folder(manual_dir)
  zips = sorted(folder.glob('**/*.zip'))
  if not zips:
    raise UserError(f'there are no zips in {folder}; fetch those of YFCC100M, 000.zip to fff.zip')
  table, subset = _find(folder, 'yfcc100m_dataset*'), _find(folder, 'yfcc100m_subset_data.tsv*')
  if table is None:
    raise UserError(f'there is no {folder}/yfcc100m_dataset.sql, which holds the captions')
  captions = scratch / SCRATCH
  if not captions.exists():
    _sort_captions(table, subset, captions)
  return [
    Part(str(path.relative_to(folder)), path.stat().st_size, functools.partial(_read_zip, path, captions))
    for path in zips
  ]


def redcaps12m(manual_dir: str, scratch: pathlib.Path) -> list[Part]:
  """RedCaps from `redcaps download-imgs`: `annotations/SUBREDDIT_YEAR.json` and `images/SUBREDDIT/IMAGE_ID.jpg`."""
  del scratch
  folder = _folder(manual_dir)
  files = sorted((folder / 'annotations').glob('*.json'))
  if not files:
    raise UserError(f'there are no annotations in {folder}/annotations; unpack those of RedCaps 1.0 there')
  if not (folder / 'images').is_dir():
    raise UserError(f'there is no folder {folder}/images; `redcaps download-imgs --save-to` makes it')
  return [
    Part(path.name, path.stat().st_size, functools.partial(_read_redcaps, path, folder / 'images')) for path in files
  ]


def clean(text: str) -> str:
  """A title or description of YFCC100M as people wrote it: unquoted, without tags, on one line."""
  return ' '.join(_TAG.sub(' ', urllib.parse.unquote_plus(text, errors='replace')).split())


def _read_tar(source: WebDataset, start: int, end: int) -> Iterator[Record | BadRecord]:
  for number in range(start, end):
    try:
      record = source[number]
    except BadRecord as error:
      yield error
      continue
    yield {'image': record['image'], 'caption': record['text'], 'key': record['key']}


def _read_zip(path: pathlib.Path, captions: pathlib.Path) -> Iterator[Record | BadRecord]:
  known: dict[str, dict[str, tuple[str, str]]] = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for member in archive.infolist():
        key = pathlib.PurePosixPath(member.filename).stem
        if not _HASH_NAME.fullmatch(key):
          continue
        if key[:2] not in known:
          known[key[:2]] = _read_captions(captions / key[:2])
        if key in known[key[:2]]:
          title, description = known[key[:2]][key]
          caption = '. '.join(filter(None, (title, description)))
          texts = {'caption': caption, 'key': key, 'title': title, 'description': description}
          yield {'image': archive.read(member)} | texts
  except zipfile.BadZipFile as error:
    raise UserError(f'{path} is damaged ({error}); fetch it again') from error


def _read_redcaps(path: pathlib.Path, images: pathlib.Path) -> Iterator[Record | BadRecord]:
  try:
    annotations = json.loads(path.read_bytes())['annotations']
  except (ValueError, KeyError) as error:
    raise UserError(f'{path} holds no annotations of RedCaps; fetch it again') from error
  for one in annotations:
    file = images / one['subreddit'] / f'{one["image_id"]}.jpg'
    try:
      yield {'image': file.read_bytes(), 'caption': one['caption'], 'key': f'{one["subreddit"]}/{one["image_id"]}'}
    except FileNotFoundError:
      yield BadRecord('image_missing', str(file))


def _sort_captions(table: pathlib.Path, subset: pathlib.Path | None, folder: pathlib.Path) -> None:
  """Sorts the subset's captions by the first two digits of their images' hashes, in files a process can hold."""
  if subset is None and table.suffix == '.sql':
    raise UserError(f'{table} holds no hashes: fetch yfcc100m_subset_data.tsv into {table.parent}')
  wanted = None if subset is None else _read_subset(subset)
  partial = folder.with_name(f'{folder.name}.partial')
  partial.mkdir(parents=True, exist_ok=True)
  files: dict[str, TextIO] = {}
  try:
    rows = _read_sql(table) if table.suffix == '.sql' else _read_table(table)
    for photo, key, *texts in tqdm.tqdm(rows, f'captions in {table.name}', unit=' rows', unit_scale=True):
      if wanted is not None:
        at = np.searchsorted(wanted['photo'], int(photo))
        if at == len(wanted) or wanted['photo'][at] != int(photo):
          continue
        key = wanted['hash'][at].decode()
      if key[:2] not in files:
        files[key[:2]] = (partial / key[:2]).open('w', encoding='utf-8')
      files[key[:2]].write('\t'.join((key, *map(clean, texts))) + '\n')
  finally:
    for file in files.values():
      file.close()
  partial.rename(folder)


def _read_subset(path: pathlib.Path) -> np.ndarray:
  """Photos and their hashes, sorted by photo."""
  rows = ((int(cells[_PHOTO]), cells[_HASH]) for cells in _lines(path, _HASH))
  found = np.fromiter(rows, [('photo', 'i8'), ('hash', 'S32')])
  found.sort(order='photo')
  return found


def _read_table(path: pathlib.Path) -> Iterator[tuple[str, ...]]:
  """Photo, hash, title and description of each row."""
  for cells in _lines(path, _DESCRIPTION):
    yield tuple(cells[column] for column in (_PHOTO, _HASH, _TITLE, _DESCRIPTION))


def _read_sql(path: pathlib.Path) -> Iterator[tuple[str, ...]]:
  """Photo, nothing, title and description of each row."""
  with contextlib.closing(sqlite3.connect(f'{path.absolute().as_uri()}?mode=ro', uri=True)) as database:
    try:
      for photo, title, description in database.execute('SELECT photoid, title, description FROM yfcc100m_dataset'):
        yield photo, '', title or '', description or ''
    except sqlite3.DatabaseError as error:
      raise UserError(f'{path} is not the metadata of YFCC100M ({error}); fetch it again') from error


def _lines(path: pathlib.Path, column: int) -> Iterator[list[str]]:
  """Cells of the rows of a table that has a column of this number."""
  opened = bz2.open if path.suffix == '.bz2' else open
  with opened(path, 'rt', encoding='utf-8', errors='replace', newline='\n') as file:
    for number, line in enumerate(file, 1):
      cells = line.rstrip('\r\n').split('\t')
      if len(cells) <= column:
        raise UserError(f'{path} line {number} has {len(cells)} columns, not {column + 1} or more; fetch it again')
      yield cells


def _read_captions(path: pathlib.Path) -> dict[str, tuple[str, str]]:
  """Hash -> title and description."""
  if not path.exists():
    return {}
  rows = (line.split('\t') for line in path.read_text('utf-8').split('\n') if line)
  return {key: (title, description) for key, title, description in rows}


def _folder(manual_dir: str) -> pathlib.Path:
  folder = pathlib.Path(manual_dir).expanduser()
  if not folder.is_dir():
    raise UserError(f'there is no folder --manual_dir={manual_dir}; put the download there')
  return folder


def _find(folder: pathlib.Path, pattern: str) -> pathlib.Path | None:
  return next(iter(sorted(folder.glob(pattern))), None)
