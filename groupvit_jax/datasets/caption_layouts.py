"""Where the official downloads of image-text sets put their pictures and captions.

Each function takes the folder of a download and lists its parts, each of which becomes one file of the TFDS data set.
A part yields what to keep of each record, or the fault for which it is left out. Pictures are not decoded.
"""

import bz2
from collections.abc import Callable, Iterator
import functools
import json
import pathlib
import re
from typing import BinaryIO, NamedTuple
import urllib.parse
import zipfile

from groupvit_jax.data import shards
from groupvit_jax.data.faults import Fault
from groupvit_jax.data.webdataset import open_webdataset, WebDataset

Record = dict[str, object]  # 'image' and texts by the name of their feature
Layout = Callable[[str, pathlib.Path], list['Part']]

_HASH = re.compile(r'[0-9a-f]{32}')
_TAG = re.compile(r'<[^<>]+>')
SCRATCH = 'captions'  # folder for captions, sorted, while a set is built
# Columns of YFCC100M's metadata, and of OpenAI's list of the subset: line, photo, hash, and so on.
_PHOTO, _HASHES, _TITLE, _DESCRIPTION = 1, 2, 8, 9


class Part(NamedTuple):
  """What one file is made of.

  Attributes:
    name: of the input.
    size: of the input; tells another input of the same name.
    read: gives the records, in any process.
  """

  name: str
  size: int
  read: Callable[[], Iterator[Record | Fault]]


def tars(manual_dir: str, scratch: pathlib.Path) -> list[Part]:
  """What img2dataset wrote of CC3M or CC12M: `*.tar` with `KEY.jpg` and `KEY.txt`, local or remote."""
  del scratch
  pattern = f'{manual_dir.rstrip("/")}/*.tar'
  found = shards.find_shards([pattern], 'tars')
  source = open_webdataset([pattern], 'txt', '', 'tars')
  ends = [sum(source.index.counts[:n + 1]) for n in range(len(found))]
  return [Part(shard.name, shard.size, functools.partial(_read_tar, source, start, end))
          for shard, start, end in zip(found, [0, *ends], ends)]


def yfcc14m(manual_dir: str, scratch: pathlib.Path) -> list[Part]:
  """YFCC100M's zips and the captions of its 14 M subset.

  - `**/*.zip` with `.../HASH.jpg`
  - `yfcc100m_dataset*`: the metadata, 25 columns separated by tabs; whole, or the rows of the subset
  - `yfcc100m_subset_data.tsv*`: OpenAI's list of line, photo and hash; may be missing if the metadata are the subset's

  Tables may be compressed by bzip2. A caption is title and description, without their percent signs and tags.
  """
  folder = _folder(manual_dir)
  zips = sorted(folder.glob('**/*.zip'))
  if not zips:
    raise ValueError(f'there are no zips in {folder}; fetch those of YFCC100M, 000.zip to fff.zip')
  table, subset = _find(folder, 'yfcc100m_dataset*'), _find(folder, 'yfcc100m_subset_data.tsv*')
  if table is None:
    raise ValueError(f'there is no table {folder}/yfcc100m_dataset, which holds the captions')
  captions = scratch / SCRATCH
  if not captions.exists():
    _sort_captions(table, subset, captions)
  return [Part(str(path.relative_to(folder)), path.stat().st_size, functools.partial(_read_zip, path, captions))
          for path in zips]


def redcaps12m(manual_dir: str, scratch: pathlib.Path) -> list[Part]:
  """What `redcaps download-imgs` left: `annotations/SUBREDDIT_YEAR.json` and `images/SUBREDDIT/IMAGE_ID.jpg`."""
  del scratch
  folder = _folder(manual_dir)
  files = sorted((folder / 'annotations').glob('*.json'))
  if not files:
    raise ValueError(f'there are no annotations in {folder}/annotations; unpack those of RedCaps 1.0 there')
  if not (folder / 'images').is_dir():
    raise ValueError(f'there is no folder {folder}/images; `redcaps download-imgs --save-to` makes it')
  return [Part(path.name, path.stat().st_size, functools.partial(_read_redcaps, path, folder / 'images'))
          for path in files]


def clean(text: str) -> str:
  """A title or description of YFCC100M as people wrote it: unquoted, without tags, on one line."""
  return ' '.join(_TAG.sub(' ', urllib.parse.unquote_plus(text)).split())


def _read_tar(source: WebDataset, start: int, end: int) -> Iterator[Record | Fault]:
  for number in range(start, end):
    try:
      record = source[number]
    except Fault as fault:
      yield fault
      continue
    yield {'image': record['image'], 'caption': record['text'], 'key': record['key']}


def _read_zip(path: pathlib.Path, captions: pathlib.Path) -> Iterator[Record | Fault]:
  known: dict[str, dict[str, tuple[str, str]]] = {}
  try:
    with zipfile.ZipFile(path) as archive:
      for member in archive.infolist():
        key = pathlib.PurePosixPath(member.filename).stem
        if not _HASH.fullmatch(key):
          continue
        if key[:2] not in known:
          known[key[:2]] = _read_captions(captions / key[:2])
        if key in known[key[:2]]:
          title, description = known[key[:2]][key]
          caption = '. '.join(filter(None, (title, description)))
          yield {'image': archive.read(member), 'caption': caption, 'key': key, 'title': title,
                 'description': description}
  except zipfile.BadZipFile as error:
    raise ValueError(f'{path} is damaged ({error}); fetch it again') from error


def _read_redcaps(path: pathlib.Path, images: pathlib.Path) -> Iterator[Record | Fault]:
  try:
    annotations = json.loads(path.read_bytes())['annotations']
  except (ValueError, KeyError) as error:
    raise ValueError(f'{path} holds no annotations of RedCaps; fetch it again') from error
  for one in annotations:
    file = images / one['subreddit'] / f'{one["image_id"]}.jpg'
    try:
      yield {'image': file.read_bytes(), 'caption': one['caption'], 'key': f'{one["subreddit"]}/{one["image_id"]}'}
    except FileNotFoundError:
      yield Fault('image_missing', str(file))


def _sort_captions(table: pathlib.Path, subset: pathlib.Path | None, folder: pathlib.Path) -> None:
  """Sorts the subset's captions by the first two digits of their pictures' hashes, in files a process can hold."""
  wanted = None if subset is None else {line.split(b'\t')[_PHOTO] for line in _lines(subset, _HASHES)}
  partial = folder.with_name(f'{folder.name}.partial')
  partial.mkdir(parents=True, exist_ok=True)
  files: dict[bytes, BinaryIO] = {}
  try:
    for line in _lines(table, _DESCRIPTION):
      cells = line.rstrip(b'\r\n').split(b'\t')
      if wanted is not None and cells[_PHOTO] not in wanted:
        continue
      prefix = cells[_HASHES][:2]
      if prefix not in files:
        files[prefix] = (partial / prefix.decode()).open('wb')
      files[prefix].write(b'\t'.join((cells[_HASHES], cells[_TITLE], cells[_DESCRIPTION])) + b'\n')
  finally:
    for file in files.values():
      file.close()
  partial.rename(folder)


def _lines(path: pathlib.Path, column: int) -> Iterator[bytes]:
  """Lines of a table that has a column of this number."""
  with (bz2.open if path.suffix == '.bz2' else open)(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      found = line.count(b'\t') + 1
      if found <= column:
        raise ValueError(f'{path} line {number} has {found} columns, not {column + 1} or more; fetch it again')
      yield line


def _read_captions(path: pathlib.Path) -> dict[str, tuple[str, str]]:
  """Hash -> title and description."""
  if not path.exists():
    return {}
  rows = (line.split('\t') for line in path.read_text('utf-8', 'replace').split('\n') if line)
  return {key: (clean(title), clean(description)) for key, title, description in rows}


def _folder(manual_dir: str) -> pathlib.Path:
  folder = pathlib.Path(manual_dir).expanduser()
  if not folder.is_dir():
    raise ValueError(f'there is no folder --manual_dir={manual_dir}; put the download there')
  return folder


def _find(folder: pathlib.Path, pattern: str) -> pathlib.Path | None:
  return next(iter(sorted(folder.glob(pattern))), None)
