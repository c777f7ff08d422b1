"""Webdataset tars, read in any order through an index of their samples.

A sample is the members that share a name up to the first dot: `000123.jpg`, `000123.txt`. The index is built once: a
file per shard (beside the shard, or in a cache folder, under a name that holds the shard's size and version) and from
those one file per set in the cache folder, which every process maps into memory: 16 bytes and a key per sample. All
index files may be deleted at any time.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import sys
import tarfile
from typing import NamedTuple

import numpy as np
import tqdm

from groupvit_jax import storage
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.errors import UserError

IMAGE_KINDS = frozenset({'jpg', 'jpeg', 'png', 'webp'})

_FORMAT = 1  # of the index files
_BLOCK = 512  # tar's unit: every member starts at a multiple of it
_LARGEST_MEMBER = 2**32 - 1
_ROW = (('image_block', '<u4'), ('image_size', '<u4'), ('text_block', '<u4'), ('text_size', '<u4'))
_THREADS = 16  # shards indexed at a time
# Local headers are sought one by one; of remote shards, everything is streamed past.
_LOCAL_WINDOW, _REMOTE_WINDOW = 2**14, 2**23
_GAP = 2**18  # two members further apart than this are read apart
# The cause of a bad record if a part is missing, if it is absurdly large, and how many bytes are absurd.
_LIMITS = {'image': ('image_missing', 'image_huge', 2**28), 'text': ('caption_missing', 'caption_unreadable', 2**20)}

Read = Callable[[int, int], bytes]  # (start, size) to the bytes there


class Member(NamedTuple):
  """A file in a tar: its name, its first block and its size in bytes."""

  name: str
  block: int
  size: int


class Index(NamedTuple):
  """The index of a set."""

  path: str  # of the file that holds a record per sample, in order; see `index_tar`
  counts: tuple[int, ...]  # samples of each shard
  digest: str  # of names and extents of the samples, wherever the shards lie and whenever they were written


@dataclasses.dataclass(frozen=True)
class WebDataset:
  """Random access to the samples of webdataset tars; picklable, the index mapped when needed."""

  shards: tuple[str, ...]  # paths
  index: Index
  caption: str  # where captions come from: 'txt', 'cls' or 'json:FIELD'

  def __reduce__(self):
    return type(self), (self.shards, self.index, self.caption)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, number: int) -> dict[str, object]:
    """Reads a sample in one request: 'image' the encoded image, 'text' the caption, 'key' as 'FOLDER/SHARD/KEY'.

    Raises BadRecord where a part is missing or the caption is not text, OSError where the shard cannot be read.
    """
    path, row, key = self._find(number)
    image, text = _read_both(path, _extent(row, 'image', key), _extent(row, 'text', key))
    return {'image': image, 'text': self._decode_caption(text, key), 'key': key}

  def caption_of(self, number: int) -> str:
    """Reads a caption without its image. Raises BadRecord if there is none or it is not text."""
    path, row, key = self._find(number)
    return self._decode_caption(storage.read_range(path, *_extent(row, 'text', key)), key)

  def keys(self) -> np.ndarray:
    """Every sample's key within its shard, bytes [samples]; mapped, not loaded."""
    return self._rows['key']

  @functools.cached_property
  def _rows(self) -> np.ndarray:
    try:
      rows = np.load(self.index.path, mmap_mode='r')
    except (ValueError, OSError, EOFError) as error:
      raise UserError(f'{self.index.path} cannot be read: {error}; delete it') from error
    if len(rows) != len(self):
      raise UserError(f'{self.index.path} holds {len(rows)} samples, not {len(self)}; delete it')
    return rows

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    return np.cumsum(self.index.counts)

  def _find(self, number: int) -> tuple[str, np.void, str]:
    if not 0 <= number < len(self):
      raise IndexError(f'sample {number} of {len(self)}')
    path = self.shards[np.searchsorted(self._ends, number, side='right')]
    row = self._rows[number]
    key = row['key'].decode('utf-8', 'backslashreplace')
    return path, row, '/'.join([*path.split('/')[-2:], key])

  def _decode_caption(self, data: bytes, key: str) -> str:
    try:
      text = data.decode('utf-8')
      if self.caption.startswith('json:'):
        text = json.loads(text).get(self.caption[len('json:') :]) or ''
    except (ValueError, AttributeError) as error:
      raise BadRecord('caption_unreadable', key) from error
    if not isinstance(text, str):
      raise BadRecord('caption_unreadable', key)
    return text.strip()


def open_webdataset(patterns: Sequence[str], caption: str, index_dir: str, what: str) -> WebDataset:
  """Finds the shards of a set and their index, building what is missing.

  Args:
    patterns: paths of tars; see `storage.find_shards`.
    caption: 'txt', 'cls' or 'json:FIELD'.
    index_dir: folder for the index of each shard; '' for beside local shards where that folder can be written,
      otherwise in the cache folder.
    what: names the set in errors.
  """
  kind = caption.split(':', 1)[0]
  if kind not in ('txt', 'cls', 'json') or (kind == 'json') != (len(caption) > len('json:')):
    raise UserError(f"{what}: caption={caption!r}: use 'txt', 'cls' or 'json:FIELD'")
  shards = storage.find_shards(patterns, what)
  source = WebDataset(tuple(shard.path for shard in shards), _find_index(shards, kind, index_dir, what), caption)
  source.keys()  # an index that does not fit shows here, not in a worker
  return source


def index_tar(read: Read, size: int, window: int, text_kind: str) -> np.ndarray:
  """Finds the samples of a tar.

  Args:
    read: (start, size) to the bytes there.
    size: of the tar, in bytes.
    window: bytes read at a time.
    text_kind: extension of the members that hold captions.

  Returns:
    A record per sample, in the tar's order: `image_block`, `image_size`, `text_block`, `text_size` (uint32; blocks of
    512 bytes, sizes in bytes, block 0 where a member is missing) and `key` (UTF-8 bytes, as wide as the longest).
    Samples without an image and without a caption are left out.

  Raises:
    UserError: it is no tar, it is cut short, or it holds a file twice.
  """
  samples: dict[str, list[int]] = {}
  seen: set[tuple[str, str]] = set()
  for name, block, length in tar_members(read, size, window):
    key, kind = _split_name(name)
    if kind not in IMAGE_KINDS and kind != text_kind:
      continue
    if (key, kind) in seen:
      raise UserError(f'holds {name} twice')
    if length > _LARGEST_MEMBER:
      raise UserError(f'holds {name} of {length} bytes; a sample may have {_LARGEST_MEMBER}')
    seen.add((key, kind))
    row = samples.setdefault(key, [0, 0, 0, 0])
    column = 2 if kind == text_kind else 0
    if not row[column]:  # of a sample's images, the first
      row[column : column + 2] = block, length
  keys = [key.encode('utf-8', 'surrogateescape') for key in samples]
  dtype = [*_ROW, ('key', f'S{max(map(len, keys), default=0) or 1}')]
  return np.array([(*row, key) for row, key in zip(samples.values(), keys)], dtype)


def tar_members(read: Read, size: int, window: int) -> Iterator[Member]:
  """Yields the regular files of a tar, or of several written one after the other, skipping their contents.

  `tarfile` ends without a word at a damaged header and at the first end mark; here the first is an error, and what
  follows the second is read.
  """
  file = _WindowedFile(read, size, window)
  at, ended = 0, False
  while at + _BLOCK <= size:
    file.seek(at)
    ended = not any(file.read(_BLOCK))
    if ended:
      at += _BLOCK
      continue
    file.seek(at)
    start = at
    try:
      tar = tarfile.open(fileobj=file, mode='r:')
      while (member := tar.next()) is not None:
        at = tar.offset
        if at > size:
          raise UserError(f'is cut short: it ends at byte {size}, inside a file')
        if member.isreg() and not member.issparse():
          yield Member(member.name, member.offset_data // _BLOCK, member.size)
        tar.members.clear()  # they would fill the memory
    except tarfile.TarError:
      start = at
    if at == start and not file.ended:
      raise UserError(f'is not a tar, or is damaged: byte {at} starts no header')
    if file.ended:
      break
  if at != size or not ended:  # every tar ends with zeros
    raise UserError(f'is cut short: it ends at byte {size}, without the mark that ends a tar')


class _WindowedFile:
  """A file for `tarfile` that reads a window at a time.

  Attributes:
    ended: whether anything beyond the file's end was asked for.
  """

  def __init__(self, read: Read, size: int, window: int):
    self._read, self._size, self._window = read, size, window
    self._at, self._start, self._data = 0, 0, b''
    self.ended = False

  def seek(self, at: int) -> None:
    self._at = at

  def tell(self) -> int:
    return self._at

  def read(self, length: int) -> bytes:
    if self._at + length > self._size:
      self.ended, length = True, max(self._size - self._at, 0)
    offset = self._at - self._start
    if length and not 0 <= offset <= len(self._data) - length:
      self._start, offset = self._at, 0
      self._data = self._read(self._at, min(max(self._window, length), self._size - self._at))
    self._at += length
    return self._data[offset : offset + length]


def _find_index(shards: Sequence[storage.Shard], kind: str, index_dir: str, what: str) -> Index:
  """The index of some shards; `kind` is the extension of the members that hold captions."""
  stamps = [_stamp(shard, kind) for shard in shards]
  merged = storage.cache_folder() / f'{hashlib.sha256("".join(stamps).encode()).hexdigest()[:32]}.npy'
  summary = merged.with_suffix('.json')
  if not (summary.exists() and merged.exists()):
    parts = _index_shards(shards, stamps, kind, index_dir, what)
    counts, digest = _merge(parts, merged)
    storage.write_atomic(str(summary), json.dumps({'counts': counts, 'digest': digest}).encode())
  known = json.loads(summary.read_text())
  return Index(str(merged), tuple(known['counts']), known['digest'])


def _index_shards(
  shards: Sequence[storage.Shard], stamps: Sequence[str], kind: str, index_dir: str, what: str
) -> list[np.ndarray]:
  """The index of each shard, from its file or else from the shard; many at a time."""

  def load_or_build(pair: tuple[storage.Shard, str]) -> np.ndarray:
    shard, stamp = pair
    path = f'{_index_folder(shard.path.rpartition("/")[0], index_dir)}/{stamp}.npy'
    rows = _load(path, shard)
    if rows is None:
      rows = _index_shard(shard, kind)
      buffer = io.BytesIO()
      np.save(buffer, rows)
      storage.write_atomic(path, buffer.getvalue())
    bar.update()
    return rows

  print(f'{what}: looking up the index of {len(shards):,} shards', file=sys.stderr)
  with tqdm.tqdm(total=len(shards), unit='shard', disable=None) as bar:  # None: where it is not a terminal
    return storage.map_threads(load_or_build, list(zip(shards, stamps, strict=True)), _THREADS)


def _index_shard(shard: storage.Shard, kind: str) -> np.ndarray:
  window = _LOCAL_WINDOW if storage.is_local(shard.path) else _REMOTE_WINDOW
  try:
    rows = index_tar(functools.partial(storage.read_range, shard.path), shard.size, window, kind)
  except ValueError as error:
    raise UserError(f'{shard.path} {error}; fetch it again, or leave it out') from error
  if not len(rows):
    raise UserError(f'{shard.path} holds no samples (KEY.jpg and KEY.{kind})')
  for part, name in (('image', 'jpg, .jpeg, .png or .webp'), ('text', kind)):
    if not rows[f'{part}_block'].any():
      raise UserError(f"{shard.path} holds no .{name} files; is the set's caption={kind!r} right?")
  return rows


def _load(path: str, shard: storage.Shard) -> np.ndarray | None:
  """A shard's index file, or None where there is none or it does not fit the shard."""
  data = storage.read_if_exists(path)
  if data is None:
    return None
  try:
    rows = np.load(io.BytesIO(data))
    ends = [
      int((rows[f'{part}_block'].astype(np.int64) * _BLOCK + rows[f'{part}_size']).max()) for part in ('image', 'text')
    ]
  except (ValueError, EOFError, IndexError, OSError):
    return None
  return rows if max(ends) <= shard.size else None


def _merge(parts: Sequence[np.ndarray], path: pathlib.Path) -> tuple[list[int], str]:
  """Writes the shards' indexes as one; returns the counts and a digest."""
  counts = [len(rows) for rows in parts]
  dtype = max((rows.dtype for rows in parts), key=lambda dtype: dtype.itemsize)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{path.name}.{os.uname().nodename}-{os.getpid()}')
  merged = np.lib.format.open_memmap(partial, 'w+', dtype, (sum(counts),))
  digest, start = hashlib.sha256(), 0
  for rows in parts:
    merged[start : start + len(rows)] = rows
    digest.update(merged[start : start + len(rows)].tobytes())
    start += len(rows)
  merged.flush()
  partial.replace(path)
  return counts, digest.hexdigest()[:16]


def _index_folder(folder: str, index_dir: str) -> str:
  """The folder for the index of the shards in `folder`: see `open_webdataset`."""
  if index_dir:
    return os.path.expanduser(index_dir)
  if storage.is_local(folder) and os.access(folder or '.', os.W_OK):
    return f'{folder or "."}/.index'
  return str(storage.cache_folder())


def _stamp(shard: storage.Shard, kind: str) -> str:
  """A name for the index of this version of a shard, wherever the shard lies."""
  text = json.dumps([_FORMAT, shard.name, shard.size, shard.version, kind])
  return f'{shard.name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}'


def _split_name(name: str) -> tuple[str, str]:
  """'a/b.c.JPG' -> ('a/b', 'c.jpg'), as webdataset splits it."""
  folder, _, base = name.rpartition('/')
  stem, _, kind = base.partition('.')
  return (f'{folder}/{stem}' if folder else stem), kind.lower()


def _extent(row: np.void, part: str, key: str) -> tuple[int, int]:
  """First byte and size of a part of a sample. Raises BadRecord if it is missing, or absurdly large."""
  missing, absurd, largest = _LIMITS[part]
  size = int(row[f'{part}_size'])
  if not 0 < size <= largest:
    raise BadRecord(absurd if size else missing, key)
  return int(row[f'{part}_block']) * _BLOCK, size


def _read_both(path: str, image: tuple[int, int], text: tuple[int, int]) -> tuple[bytes, bytes]:
  """Two members of a shard, in one request where they lie close together."""
  start, end = min(image[0], text[0]), max(sum(image), sum(text))
  if end - start > image[1] + text[1] + _GAP:
    return storage.read_range(path, *image), storage.read_range(path, *text)
  data = storage.read_range(path, start, end - start)
  return tuple(data[at - start : at - start + size] for at, size in (image, text))
