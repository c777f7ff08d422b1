"""The lock of a folder that a command writes into: a second command is refused; a killed one's lock ends by itself.

On a disk the kernel holds it (flock) and frees it with the process. In a bucket it is a lease: its holder renews an
object every `_RENEWAL_S` seconds, and others take over what was not renewed for `_LEASE_S` seconds by their own clock,
or at once where its process is gone from this machine.
"""

from collections.abc import Callable, Iterator
import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from typing import TextIO

from absl import logging
import fsspec
import jax

from groupvit_jax import storage
from groupvit_jax.errors import Unavailable, UserError
from groupvit_jax.running import processes

NAME = '.lock'  # in the folder: a file, or in a bucket the prefix of numbered objects, of which the last one counts

_RENEWAL_S, _LEASE_S = 10.0, 40.0
_LOOK_S = 0.5  # between two looks at a lease that may have ended
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def hold(folder: str, flag: str) -> Iterator[Callable[[], None]]:
  """Holds a folder's lock while the context lasts; process 0 does so for all processes of a run.

  Args:
    folder: in a bucket, or on a disk, where it is created, and deleted again if it stays empty.
    flag: that named it, for errors.

  Yields:
    A function that raises UserError once another command has taken the lease over.

  Raises:
    UserError: another command holds the lock, in every process of the run. Nothing was changed.
    OSError: the folder cannot be written.
  """
  with contextlib.ExitStack() as stack:
    refusal, check = None, lambda: None
    if jax.process_index() == 0:
      try:
        check = stack.enter_context((_flock if storage.is_local(folder) else _lease)(folder, flag))
      except _InUse as error:
        refusal = str(error)
    processes.barrier('lock')  # a collective does not wait as long
    if refusal := processes.all_gather_objects(refusal)[0]:
      raise UserError(refusal)
    yield check


class _InUse(UserError):
  """Another command holds the lock."""

  def __init__(self, folder: str, flag: str, holder: str):
    super().__init__(f'{flag}={folder} is in use by {_who(holder)}; wait for it, end it, or name another {flag}')


@contextlib.contextmanager
def _flock(folder: str, flag: str) -> Iterator[Callable[[], None]]:
  path = pathlib.Path(folder) / NAME
  if path.parent.exists() and not path.parent.is_dir():
    raise UserError(f'{flag}={folder} is a file; name a folder')
  is_new = not path.parent.exists() or os.listdir(path.parent) == [NAME]
  with storage.writing(folder):
    file = _open_locked(path, flag)
    file.truncate(0)
    file.write(_describe_this_process())
    file.flush()
  try:
    yield lambda: None
  finally:
    path.unlink(missing_ok=True)  # before it is unlocked: afterwards it may be another's
    file.close()
    if is_new:
      with contextlib.suppress(OSError):  # it holds results
        path.parent.rmdir()


def _open_locked(path: pathlib.Path, flag: str) -> TextIO:
  """Opens and locks a file; child processes do not inherit it."""
  while True:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open('a+')
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise _InUse(str(path.parent), flag, file.read()) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      logging.warning('%s: this disk has no locks; start no second command with that %s', path.parent, flag)
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), path.stat()):
        return file
    file.close()  # whoever held it deleted it in between


@contextlib.contextmanager
def _lease(folder: str, flag: str) -> Iterator[Callable[[], None]]:
  store, holder = _Leases(folder), _describe_this_process()
  try:
    number = _take(store, folder, flag, holder)
  except Unavailable as error:
    raise Unavailable(f'cannot lock {folder} {error}') from error
  ended, successors = threading.Event(), []

  def renew() -> None:
    beats = 0
    while not ended.wait(_RENEWAL_S):
      beats += 1
      try:
        if newest := store.newest(after=number):
          successors.append(newest[1])
          return
        store.write(number, f'{holder}\n{beats}')
      except OSError as error:  # where a checkpoint cannot be saved either, that ends the run
        logging.warning('cannot renew the lock of %s: %s; tried again later', folder, error)

  def check() -> None:
    if successors:
      raise UserError(
        f'{flag}={folder} was taken over by {_who(successors[0])}, because this process did not renew its lock for '
        f'{_LEASE_S:.0f} s; nothing more is written'
      )

  thread = threading.Thread(target=renew, name='lease', daemon=True)
  thread.start()
  try:
    yield check
  finally:
    ended.set()
    thread.join()
    with contextlib.suppress(OSError):  # it ends by itself
      store.delete_up_to(number)


def _take(store: '_Leases', folder: str, flag: str, holder: str) -> int:
  """Waits for the end of a killed command's lease, and creates the next one; its number."""
  watched, since = None, 0.0
  while True:
    number, content = store.newest() or (0, '')
    is_alive = _is_alive(content) if content else False
    if is_alive or watched is not None and watched[0] == number and watched[1] != content:
      raise _InUse(folder, flag, content)
    if is_alive is None:
      if watched != (number, content):
        logging.warning('%s was in use by %s; waits for up to %.0f s to see if it is', folder, _who(content), _LEASE_S)
        watched, since = (number, content), time.monotonic()
      if time.monotonic() - since < _LEASE_S:
        time.sleep(_LOOK_S)
        continue
    if store.create(number + 1, holder):
      store.delete_up_to(number)
      return number + 1


class _Leases:
  """The numbered objects of a folder's lock."""

  def __init__(self, folder: str):
    self._system, self._root = fsspec.core.url_to_fs(f'{folder}/{NAME}')

  def newest(self, after: int = 0) -> tuple[int, str] | None:
    """Number and content of the last one above `after`, if there is one."""
    number = max(self._numbers(), default=0)
    content = self._read(number) if number > after else None
    return None if content is None else (number, content)

  def create(self, number: int, content: str) -> bool:
    """Creates an object where there is none; whether this call did."""
    try:
      self._system.pipe_file(self._path(number), content.encode(), mode='create')
    except Exception as error:  # every store has one of its own for an object that exists
      logging.debug('%s', error)
    return storage.with_retries(self._read, number) == content

  def write(self, number: int, content: str) -> None:
    """Replaces an object."""
    storage.with_retries(self._system.pipe_file, self._path(number), content.encode())

  def delete_up_to(self, number: int) -> None:
    """Deletes the objects up to a number."""
    for old in sorted(each for each in self._numbers() if each <= number):
      with contextlib.suppress(FileNotFoundError):
        storage.with_retries(self._system.rm_file, self._path(old))

  def _numbers(self) -> list[int]:
    self._system.invalidate_cache()
    try:
      names = storage.with_retries(self._system.find, self._root)
    except FileNotFoundError:
      return []
    return [int(number) for number in (name.rsplit('/', 1)[-1] for name in names) if number.isdigit()]

  def _read(self, number: int) -> str | None:
    try:
      return self._system.cat_file(self._path(number)).decode()
    except FileNotFoundError:  # deleted by now
      return None

  def _path(self, number: int) -> str:
    return f'{self._root}/{number:06}'


def _describe_this_process() -> str:
  """A line of JSON, other at each call: the command, where it runs and since when."""
  now = datetime.datetime.now(datetime.UTC)
  return json.dumps(
    {
      'command': pathlib.Path(sys.argv[0]).name,
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'since': f'{now:%Y-%m-%d %H:%M:%S} UTC',
      'machine': _machine(),
      'started': _start_time(os.getpid()),
      'id': secrets.token_hex(8),
    }
  )


def _who(holder: str) -> str:
  """A phrase for the line of `_describe_this_process`."""
  try:
    return '{command} on {host} (process {pid}) since {since}'.format(**json.loads(holder.partition('\n')[0]))
  except (ValueError, KeyError):  # it is being written
    return 'another command'


def _is_alive(holder: str) -> bool | None:
  """Whether a process of this machine is running; None of those of other machines."""
  described = json.loads(holder.partition('\n')[0])
  if described['machine'] is None or described['machine'] != _machine():
    return None
  return _start_time(described['pid']) == described['started']


def _machine() -> str | None:
  """This boot and namespace of process numbers; None where the system does not say."""
  try:
    return f'{pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return None


def _start_time(pid: int) -> str | None:
  """When a process started, in ticks since the boot; None if it has ended."""
  try:
    state, *fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  except OSError:
    return None
  return None if state == 'Z' else fields[18]
