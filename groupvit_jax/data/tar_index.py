"""Where the samples of a webdataset tar lie: its headers, read once.

A sample is the members that share a name up to the first dot: `000123.jpg`, `000123.txt`,
`000123.json`. What is kept of it is where its picture and its caption start and end.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from groupvit_jax.errors import UserError

IMAGE_KINDS = frozenset({'jpg', 'jpeg', 'png', 'webp'})
BLOCK = 512  # tar's unit: every member starts at a multiple of it

_LARGEST_MEMBER = 2**32 - 1
_ROW = (('image_block', '<u4'), ('image_size', '<u4'), ('text_block', '<u4'), ('text_size', '<u4'))

Read = Callable[[int, int], bytes]


class Member(NamedTuple):
  """A file in a tar: its name, its first block and its size in bytes."""

  name: str
  block: int
  size: int


def index_tar(read: Read, size: int, window: int, text_kind: str) -> np.ndarray:
  """Finds the samples of a tar.

  Args:
    read: (start, size) to the bytes there.
    size: of the tar, in bytes.
    window: bytes read at a time.
    text_kind: extension of the members that hold captions.

  Returns:
    A record per sample, in the tar's order: `image_block`, `image_size`, `text_block`,
    `text_size` (uint32; blocks of 512 bytes, sizes in bytes, block 0 where a member is missing)
    and `key` (UTF-8 bytes, as wide as the longest). Samples without a picture and without a
    caption are left out.

  Raises:
    ValueError: it is no tar, it is cut short, or it holds a file twice.
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
    if not row[column]:  # of a sample's pictures, the first
      row[column : column + 2] = block, length
  keys = [key.encode('utf-8', 'surrogateescape') for key in samples]
  width = max(map(len, keys), default=1)
  rows = np.zeros(len(keys), [*_ROW, ('key', f'S{max(width, 1)}')])
  if keys:
    for column, (field, _) in enumerate(_ROW):
      rows[field] = [row[column] for row in samples.values()]
    rows['key'] = keys
  return rows


def tar_members(read: Read, size: int, window: int) -> Iterator[Member]:
  """Yields the regular files of a tar (ustar, GNU or pax), skipping over what they hold.

  Args:
    read: (start, size) to the bytes there.
    size: of the tar, in bytes.
    window: bytes read at a time: what lies close to a header is not asked for twice.

  Raises:
    ValueError: it is no tar, or it is cut short.
  """
  buffer = _Buffer(read, size, window)
  at, ended, override = 0, False, {}
  while at + BLOCK <= size:
    header = buffer.get(at, BLOCK)
    ended = not any(header)
    if ended:  # the end; or what separates two tars written one after the other
      at += BLOCK
      continue
    _check(header, at)
    kind = header[156:157]
    length = int(override.get('size', _number(header[124:136])))
    if kind in b'123456':  # links, folders, devices: whatever size they state, nothing follows
      length = 0
    start = at + BLOCK
    at = start + -(-length // BLOCK) * BLOCK
    if start + length > size:
      raise UserError(f'is cut short: it ends at byte {size}, inside a file')
    if kind in b'xL':
      override |= _override(kind, buffer.get(start, length))
    elif kind in b'\x0007':
      yield Member(override.get('path') or _name(header), start // BLOCK, length)
    if kind not in b'xLKg':
      override = {}
  if at != size or not ended:  # every tar ends with zeros
    raise UserError(f'is cut short: it ends at byte {size}, without the mark that ends a tar')


class _Buffer:
  """Reads a window at a time."""

  def __init__(self, read: Read, size: int, window: int):
    self._read, self._size, self._window = read, size, window
    self._start, self._data = 0, b''

  def get(self, start: int, length: int) -> bytes:
    if not (self._start <= start and start + length <= self._start + len(self._data)):
      wanted = min(max(self._window, length), self._size - start)
      self._start, self._data = start, self._read(start, wanted) if wanted else b''
    return self._data[start - self._start : start - self._start + length]


def _check(header: bytes, at: int) -> None:
  """Raises ValueError unless the header's checksum (of all but itself, counted as blanks) holds."""
  try:
    if _number(header[148:156]) == sum(header) - sum(header[148:156]) + 8 * ord(' '):
      return
  except ValueError:
    pass
  raise UserError(f'is not a tar, or is damaged: byte {at} starts no header')


def _number(field: bytes) -> int:
  """An octal number, or, above 8 GiB, GNU's binary one."""
  if field[0] & 0x80:
    return int.from_bytes(field[1:], 'big')
  return int(field.strip(b'\0 ') or b'0', 8)


def _name(header: bytes) -> str:
  name = header[:100].split(b'\0', 1)[0]
  prefix = header[345:500].split(b'\0', 1)[0] if header[257:263] == b'ustar\0' else b''
  return (prefix + b'/' + name if prefix else name).decode('utf-8', 'surrogateescape')


def _override(kind: bytes, data: bytes) -> dict[str, str]:
  """What an extended header says of the next file: pax records 'LENGTH key=value', or a name."""
  if kind == b'L':
    return {'path': data.rstrip(b'\0').decode('utf-8', 'surrogateescape')}
  found = {}
  while data:
    length = int(data.split(b' ', 1)[0])
    key, _, value = data[: length - 1].split(b' ', 1)[1].partition(b'=')
    found[key.decode()] = value.decode('utf-8', 'surrogateescape')
    data = data[length:]
  return {key: value for key, value in found.items() if key in ('path', 'size')}


def _split_name(name: str) -> tuple[str, str]:
  """'a/b.c.JPG' -> ('a/b', 'c.jpg'), as webdataset splits it."""
  folder, _, base = name.rpartition('/')
  stem, _, kind = base.partition('.')
  return (f'{folder}/{stem}' if folder else stem), kind.lower()
