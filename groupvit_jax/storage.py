"""Files on disks and in buckets: shard patterns, byte ranges, retries, atomic writes and folders.

Local paths go to the system; `gs://`, `s3://`, `http(s)://` and whatever else `fsspec` knows go to it. Reads are
thread-safe and meant to run in many threads at once, which hides the latency of a remote store. Credentials and
endpoints are those of the store's library and of fsspec's configuration (`FSSPEC_S3_ENDPOINT_URL`, `FSSPEC_GS_TOKEN`).
"""

import atexit
import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import contextlib
import errno
import glob
import hashlib
import itertools
import math
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
from typing import NamedTuple, TypeVar

from etils import epath
import fsspec
import safetensors

from groupvit_jax.errors import ResourceError, Unavailable, UserError

# Seconds before a failed remote operation is tried again: rides out an overloaded server.
RETRY_DELAYS = (0.2, 0.5, 1.0, 2.0, 4.0)

_REQUESTS = 32  # in flight while shards are looked up
_CONNECT_S, _STALLED_S = 10, 60  # then a connection, or a read without a byte, is given up
_MOST_PATHS = 1_000_000  # that one pattern may stand for
_BRACES = re.compile(r'\{([^{}]*)\}')
_RANGE = re.compile(r'(\d+)\.\.(\d+)')
_lock = threading.Lock()
_systems: dict[str, fsspec.AbstractFileSystem] = {}
_T = TypeVar('_T')
_R = TypeVar('_R')


class Shard(NamedTuple):
  """A file of records."""

  path: str  # local, or with a protocol
  size: int  # in bytes
  version: str  # changes when the file does: its modification time or its store's tag

  @property
  def name(self) -> str:
    """The file's name without its folder."""
    return self.path.rsplit('/', 1)[-1]


def is_local(path: str) -> bool:
  """Whether a path names a file of this machine."""
  return '://' not in path


def check_local(path: epath.PathLike) -> None:
  """Raises UserError for weights in a bucket, which the libraries that read and write them cannot reach."""
  if not is_local(str(path)):
    raise UserError(
      f'{path} is in a bucket, and weights are read from and written to disks; copy the folder, as in '
      'gcloud storage cp --recursive'
    )


def cache_folder() -> pathlib.Path:
  """The folder for what can be built or fetched again: `$XDG_CACHE_HOME/groupvit_jax`, or below `~/.cache`."""
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(base) / 'groupvit_jax'


def expand_braces(pattern: str) -> list[str]:
  """The paths that a pattern stands for, in bash's order.

  `{0000..1243}` counts, with as many digits as its ends have; `{a,b}` lists; several multiply.
  """
  pieces = _BRACES.split(pattern)
  if any(brace in text for text in pieces[::2] for brace in '{}'):
    raise UserError(f'{pattern!r}: a brace is missing its partner')
  if (count := math.prod(_count_alternatives(piece) for piece in pieces[1::2])) > _MOST_PATHS:
    raise UserError(f'{pattern!r} stands for {count:,} paths; use {_MOST_PATHS:,} or fewer')
  choices = [_alternatives(piece, pattern) if n % 2 else [piece] for n, piece in enumerate(pieces)]
  return list(map(''.join, itertools.product(*choices)))


def find_shards(patterns: Iterable[str], what: str) -> list[Shard]:
  """Every shard of some patterns, in order; `what` names the set in errors.

  Patterns are paths with braces (see `expand_braces`) and, where the store can list, `*`.
  """
  paths = [path for pattern in patterns for path in _list_paths(os.path.expanduser(pattern), what)]
  if not paths:
    raise UserError(f'{what}: no shards; name some, as in /data/{{0000..0099}}.tar')
  if len(set(paths)) < len(paths):
    twice = collections.Counter(paths).most_common(1)[0][0]
    raise UserError(f'{what}: the patterns name {twice} twice')
  found = map_threads(_stat, paths, _REQUESTS)
  missing = [path for path, shard in zip(paths, found, strict=True) if shard is None]
  if missing:
    raise UserError(
      f'{what}: {len(missing)} of {len(paths)} shards are missing, first '
      f'{missing[0]}; fetch them, or leave them out of the pattern'
    )
  return found


def list_files(pattern: str) -> list[str]:
  """The files that a pattern with '*' stands for, in order. Raises UserError where a store cannot be reached."""
  if is_local(pattern):
    return sorted(glob.glob(pattern))
  with _reaching(pattern):
    system = _system(pattern)
    return sorted(map(system.unstrip_protocol, system.glob(pattern)))


def read_range(path: str, start: int, size: int) -> bytes:
  """Reads exactly `size` bytes from `start` in one request, or raises OSError; retries where a remote store fails."""
  if is_local(path):
    return _read_local(path, start, size)

  def fetch() -> bytes:
    data = _system(path).cat_file(path, start=start, end=start + size)
    if len(data) > size:
      raise PermissionError('the server ignores byte ranges; use one that serves them')
    if len(data) < size:
      raise ResourceError(f'the server sent {len(data)} of {size} bytes')
    return data

  with _remote_errors(f'cannot read {path}'):
    return with_retries(fetch)


def with_retries(operation: Callable[..., _R], *arguments: object) -> _R:
  """The result of an operation of a remote store, retried where it fails.

  Raises:
    FileNotFoundError, PermissionError: at once: another attempt would end the same way.
    Unavailable: the last attempt failed too.
  """
  for delay in (*RETRY_DELAYS, None):
    try:
      return operation(*arguments)
    except (FileNotFoundError, PermissionError):
      raise
    except Exception as error:  # every library behind fsspec has exceptions of its own
      if delay is None:
        raise Unavailable(f'after {len(RETRY_DELAYS) + 1} attempts: {describe(error)}') from error
    time.sleep(delay)


def read_if_exists(path: str) -> bytes | None:
  """The contents of a small file, or None when there is none."""
  try:
    return pathlib.Path(path).read_bytes() if is_local(path) else _system(path).cat_file(path)
  except FileNotFoundError:
    return None


def write_atomic(path: str, data: bytes) -> None:
  """Writes a file so that no reader, and no kill, ever sees half of it.

  Raises ResourceError where it cannot be written, Unavailable where a store fails again and again.
  """
  if not is_local(path):
    with _remote_errors(f'cannot write {path}'):
      return with_retries(_system(path).pipe_file, path, data)  # a store shows only whole objects
  file = pathlib.Path(path)
  partial = file.with_name(f'.{file.name}.{os.uname().nodename}-{os.getpid()}-{threading.get_ident()}')
  with writing(path):
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
      partial.write_bytes(data)
      partial.replace(file)
    except OSError:
      partial.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def writing(
  path: object, cure: str = 'make room there, or permit it, and give the same command again'
) -> Iterator[None]:
  """Raises OSError, with the path and the cure, where something cannot be written inside."""
  try:
    yield
  except OSError as error:
    raise ResourceError(f'cannot write {path}: {error.strerror or error}; {cure}') from error


def check_free(flag: str, path: epath.PathLike) -> None:
  """Raises UserError unless the folder of a flag can be created: it is local, and nothing or an empty one is there."""
  check_local(path)
  path = epath.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f'{path} exists already and is left alone; name another {flag}')


@contextlib.contextmanager
def atomic_folder(flag: str, path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a folder to fill, which is renamed to the path of a flag at the end; after an error nothing is left of it.

  After a kill the next call for the same path on this machine deletes what is left. Raises UserError where something
  is there already.
  """
  check_free(flag, path)
  path = epath.Path(path)
  prefix = f'{path.name}.partial-{os.uname().nodename}-'
  partial = path.with_name(f'{prefix}{os.getpid()}')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.iterdir():
      pid = left.name.removeprefix(prefix)
      if left.name == f'{prefix}{pid}' and pid.isdecimal() and not _is_another(pid):
        left.rmtree()
    partial.mkdir()
    yield partial
    if path.exists():
      path.rmdir()
    partial.rename(path)
  except (OSError, safetensors.SafetensorError) as error:
    raise ResourceError(
      f'cannot write {path}: {getattr(error, "strerror", None) or error}; make room, or name another {flag}'
    ) from error
  finally:
    if partial.exists():
      partial.rmtree()


def _is_another(pid: str) -> bool:
  """Whether another process of this number runs; in a container this one's may repeat."""
  try:
    os.kill(int(pid), 0)
  except OSError as error:
    return error.errno == errno.EPERM
  return pid != str(os.getpid())


def temporary_folder(purpose: str, url: str | None = None, process: int = 0) -> pathlib.Path:
  """Creates an empty temporary folder, which is deleted when the process ends in order.

  Args:
    purpose: a word for its name.
    url: what it is a copy of, when one process at a time has it: what a killed one left is deleted, so that a run
      that is killed again and again does not fill the disk.
    process: number of this process among those that keep copies of it.
  """
  if url is None:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f'groupvit-{purpose}-'))
  else:
    name = hashlib.sha256(f'{url} {os.getuid()}'.encode()).hexdigest()[:16]  # hosts are shared, names are not
    folder = pathlib.Path(tempfile.gettempdir()) / f'groupvit-{purpose}-{name}-{process}'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder


def map_threads(function: Callable[..., _R], items: Sequence[_T], threads: int) -> list[_R]:
  """Maps in threads, in order. The first error ends it without starting what is still queued."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    futures = [pool.submit(function, item) for item in items]
    try:
      return [future.result() for future in futures]
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def _count_alternatives(inside: str) -> int:
  bounds = _RANGE.fullmatch(inside)
  return max(int(bounds[2]) - int(bounds[1]), 0) + 1 if bounds else inside.count(',') + 1


def _alternatives(inside: str, pattern: str) -> list[str]:
  if bounds := _RANGE.fullmatch(inside):
    first, last = map(int, bounds.groups())
    if first > last:
      raise UserError(f'{pattern!r} counts down; write {{{bounds[2]}..{bounds[1]}}}')
    width = max(map(len, bounds.groups()))
    padded = any(text[0] == '0' and len(text) > 1 for text in bounds.groups())
    return [str(n).zfill(width if padded else 0) for n in range(first, last + 1)]
  if ',' not in inside:
    raise UserError(f'{pattern!r}: {{{inside}}} is neither a range as {{00..99}} nor a list')
  return inside.split(',')


def _list_paths(pattern: str, what: str) -> list[str]:
  """Paths of one pattern: braces, then '*'."""
  paths = []
  for path in expand_braces(pattern):
    found = list_files(path) if '*' in path else [path]
    if not found:
      raise UserError(f'{what}: nothing matches {path}')
    paths += found
  return paths


def _stat(path: str) -> Shard | None:
  """Size and version of a file, or None when there is none."""
  if is_local(path):
    try:
      stat = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
      return None
    if not pathlib.Path(path).is_file():
      raise UserError(f'{path} is not a file')
    return Shard(path, stat.st_size, str(stat.st_mtime_ns))
  with _reaching(path):
    info = _info(path)
  if info is None:
    return None
  if info.get('size') is None or info.get('partial') is False:
    raise UserError(f'{path}: the server does not serve byte ranges; use one that does')
  tags = (info.get(key) for key in ('ETag', 'etag', 'generation', 'Last-Modified', 'LastModified', 'mtime', 'updated'))
  return Shard(path, info['size'], str(next(filter(None, tags), '')))


def _info(path: str) -> dict[str, object] | None:
  try:
    return _system(path).info(path)
  except FileNotFoundError as error:
    # The HTTP file system calls every failure by this name; only a refusal by the server is one.
    if error.__cause__ is not None and getattr(error.__cause__, 'status', None) not in (404, 410):
      raise error.__cause__ from None
    return None


@contextlib.contextmanager
def _reaching(path: str) -> Iterator[None]:
  """Raises UserError with one line for whatever a remote operation raises inside."""
  try:
    yield
  except Exception as error:  # every library behind fsspec has exceptions of its own
    raise UserError(f'cannot reach {path}: {describe(error)}') from error


@contextlib.contextmanager
def _remote_errors(start: str) -> Iterator[None]:
  """Raises OSError with one line that begins with `start` where a remote read or write fails inside."""
  try:
    yield
  except Unavailable as error:
    raise Unavailable(f'{start} {error}') from error
  except OSError as error:
    raise ResourceError(f'{start}: {describe(error)}') from error


def _system(path: str) -> fsspec.AbstractFileSystem:
  """The file system of a path; one for each protocol and process, so that connections are shared."""
  protocol = path.split('://', 1)[0]
  with _lock:
    if protocol not in _systems:
      options = {}
      if protocol in ('http', 'https'):
        import aiohttp  # only here: without remote shards nobody needs it

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_STALLED_S)
        options = {'client_kwargs': {'timeout': timeout}}
      _systems[protocol] = fsspec.filesystem(protocol, **options)
    return _systems[protocol]


def _read_local(path: str, start: int, size: int) -> bytes:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    data = os.pread(descriptor, size, start)
  finally:
    os.close(descriptor)
  if len(data) != size:
    raise ResourceError(f'{path} ends before byte {start + size}; it was changed while it was in use')
  return data


def describe(error: BaseException) -> str:
  """One line about an error."""
  return ' '.join(str(error).split())[:300] or type(error).__name__
