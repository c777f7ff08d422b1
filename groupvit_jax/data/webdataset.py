"""Webdataset tars as they are, read in any order: an index of their samples, one read per sample.

The index is built once: per shard (beside the shard, or in a cache folder, under a name that
holds the shard's size and version, so that one of a changed shard is never found), and from those
one file per set in the cache folder, which every process maps into memory: 16 bytes and a key per
sample, shared by all workers. All of it may be deleted at any time.
"""

from collections.abc import Sequence
import concurrent.futures
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import tqdm

from groupvit_jax import storage as shards_lib
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.tar_index import BLOCK, index_tar
from groupvit_jax.errors import UserError
from groupvit_jax.storage import Shard

_FORMAT = 1  # of the index files
_THREADS = 16  # shards indexed at a time
# Local headers are sought one by one; of remote shards, everything is streamed past.
_LOCAL_WINDOW, _REMOTE_WINDOW = 2**14, 2**23
_GAP = 2**18  # two members further apart than this are read apart
# What it is if a part is missing, if it is absurdly large, and how many bytes are absurd.
_LIMITS = {'image': ('image_missing', 'image_huge', 2**28), 'text': ('caption_missing', 'caption_unreadable', 2**20)}


class Index(NamedTuple):
  """The index of a set.

  Attributes:
    path: of the file that holds a record per sample, in order; see `index_tar`.
    counts: samples of each shard.
    digest: of what the index holds: the same wherever the shards lie and whenever they were
      written, as long as they hold the same files in the same places.
  """

  path: str
  counts: tuple[int, ...]
  digest: str


@dataclasses.dataclass(frozen=True)
class WebDataset:
  """Random access to the samples of webdataset tars; picklable, the index mapped when needed.

  Attributes:
    shards: paths.
    index: where the samples lie in them.
    caption: where captions come from: 'txt', 'cls' or 'json:FIELD'.
  """

  shards: tuple[str, ...]
  index: Index
  caption: str

  def __reduce__(self):
    return type(self), (self.shards, self.index, self.caption)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, number: int) -> dict[str, object]:
    """Reads a sample in one request.

    Returns:
      'image' the encoded picture, 'text' the caption, 'key' as 'FOLDER/SHARD/KEY'.

    Raises:
      BadRecord: a part is missing, or the caption is not text.
      OSError: the shard cannot be read.
    """
    path, row, key = self._find(number)
    image, text = _read_both(path, _extent(row, 'image', key), _extent(row, 'text', key))
    return {'image': image, 'text': self._caption(text, key), 'key': key}

  def caption_of(self, number: int) -> str:
    """Reads a caption without its picture. Raises BadRecord if there is none or it is not text."""
    path, row, key = self._find(number)
    return self._caption(shards_lib.read(path, *_extent(row, 'text', key)), key)

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

  def _caption(self, data: bytes, key: str) -> str:
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
  """Finds the shards of a set and their index, building what there is not.

  Args:
    patterns: paths of tars; see `shards.find_shards`.
    caption: 'txt', 'cls' or 'json:FIELD'.
    index_dir: where the index of each shard is kept; '' for beside local shards where that
      folder can be written, otherwise in the cache folder.
    what: names the set in messages.

  Raises:
    ValueError: a shard is missing, is no tar, is cut short, or has no samples of this kind.
  """
  kind = caption.split(':', 1)[0]
  if kind not in ('txt', 'cls', 'json') or (kind == 'json') != (len(caption) > len('json:')):
    raise UserError(f"{what}: caption={caption!r}: use 'txt', 'cls' or 'json:FIELD'")
  found = shards_lib.find_shards(patterns, what)
  index = build_index(found, kind, index_dir, what)
  source = WebDataset(tuple(shard.path for shard in found), index, caption)
  source.keys()  # an index that does not fit shows here, not in a worker
  return source


def build_index(found: Sequence[Shard], kind: str, index_dir: str, what: str) -> Index:
  """Finds the index of some shards, building what there is not; see `open_webdataset`.

  Args:
    found: the shards.
    kind: extension of the members that hold captions.
    index_dir: where the index of each shard is kept.
    what: names the set in messages.
  """
  stamps = [_stamp(shard, kind) for shard in found]
  merged = shards_lib.cache_folder() / f'{hashlib.sha256("".join(stamps).encode()).hexdigest()[:32]}.npy'
  facts = merged.with_suffix('.json')
  if not (facts.exists() and merged.exists()):
    parts = _index_shards(found, stamps, kind, index_dir, what)
    counts, digest = _merge(parts, merged)
    shards_lib.write_atomic(str(facts), json.dumps({'counts': counts, 'digest': digest}).encode())
  known = json.loads(facts.read_text())
  return Index(str(merged), tuple(known['counts']), known['digest'])


def _index_shards(
  found: Sequence[Shard], stamps: Sequence[str], kind: str, index_dir: str, what: str
) -> list[np.ndarray]:
  """The index of each shard, from its file or else from the shard; many at a time."""
  folders = {shard.path.rpartition('/')[0] for shard in found}
  homes = {folder: _index_folder(folder, index_dir) for folder in folders}
  print(f'{what}: looking up the index of {len(found):,} shards', file=sys.stderr)
  bar = tqdm.tqdm(total=len(found), unit='shard', disable=None)  # None: where it is not a terminal

  def load_or_build(shard: Shard, stamp: str) -> np.ndarray:
    path = f'{homes[shard.path.rpartition("/")[0]]}/{stamp}.npy'
    rows = _load(path, shard)
    if rows is None:
      rows = _index_shard(shard, kind)
      buffer = io.BytesIO()
      np.save(buffer, rows)
      shards_lib.write_atomic(path, buffer.getvalue())
    bar.update()
    return rows

  with bar, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    futures = [pool.submit(load_or_build, *pair) for pair in zip(found, stamps, strict=True)]
    try:
      return [future.result() for future in futures]
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _index_shard(shard: Shard, kind: str) -> np.ndarray:
  window = _LOCAL_WINDOW if shards_lib.is_local(shard.path) else _REMOTE_WINDOW
  try:
    rows = index_tar(functools.partial(shards_lib.read, shard.path), shard.size, window, kind)
  except ValueError as error:
    raise UserError(f'{shard.path} {error}; fetch it again, or leave it out') from error
  if not len(rows):
    raise UserError(f'{shard.path} holds no samples (KEY.jpg and KEY.{kind})')
  for part, name in (('image', 'jpg, .jpeg, .png or .webp'), ('text', kind)):
    if not rows[f'{part}_block'].any():
      raise UserError(f"{shard.path} holds no .{name} files; is the set's caption={kind!r} right?")
  return rows


def _load(path: str, shard: Shard) -> np.ndarray | None:
  """A shard's index file, or None where there is none or it does not fit the shard."""
  data = shards_lib.read_if_exists(path)
  if data is None:
    return None
  try:
    rows = np.load(io.BytesIO(data))
    ends = [
      int((rows[f'{part}_block'].astype(np.int64) * BLOCK + rows[f'{part}_size']).max()) for part in ('image', 'text')
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
  """Where the index of a folder's shards is kept."""
  if index_dir:
    return os.path.expanduser(index_dir)
  if shards_lib.is_local(folder) and os.access(folder or '.', os.W_OK):
    return f'{folder or "."}/.index'
  return str(shards_lib.cache_folder())


def _stamp(shard: Shard, kind: str) -> str:
  """A name for the index of this version of a shard, wherever the shard lies."""
  text = json.dumps([_FORMAT, shard.name, shard.size, shard.version, kind])
  return f'{shard.name}.{hashlib.sha256(text.encode()).hexdigest()[:16]}'


def _extent(row: np.void, part: str, key: str) -> tuple[int, int]:
  """First byte and size of a part of a sample. Raises BadRecord if it is missing, or absurdly large."""
  missing, absurd, largest = _LIMITS[part]
  size = int(row[f'{part}_size'])
  if not 0 < size <= largest:
    raise BadRecord(absurd if size else missing, key)
  return int(row[f'{part}_block']) * BLOCK, size


def _read_both(path: str, image: tuple[int, int], text: tuple[int, int]) -> tuple[bytes, bytes]:
  """Two members of a shard, in one request where they are neighbours."""
  start, end = min(image[0], text[0]), max(sum(image), sum(text))
  if end - start > image[1] + text[1] + _GAP:
    return shards_lib.read(path, *image), shards_lib.read(path, *text)
  data = shards_lib.read(path, start, end - start)
  return tuple(data[at - start : at - start + size] for at, size in (image, text))
