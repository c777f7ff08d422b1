"""A folder that appears whole or not at all."""

from collections.abc import Iterator
import contextlib
import os

from etils import epath


def check_free(flag: str, path: epath.PathLike) -> None:
  """Raises ValueError when something is at the path already, unless it is an empty folder.

  Args:
    flag: that named the path, for the message.
    path: of the folder to make.
  """
  path = epath.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ValueError(f'{path} exists already and is left alone; name another {flag}')


@contextlib.contextmanager
def new_folder(flag: str, path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a folder to fill, which takes its name only at the end; after an error nothing is left of it.

  Args:
    flag: that named the path, for messages.
    path: must not exist, or be an empty folder.

  Raises:
    ValueError: something is there already.
  """
  check_free(flag, path)
  path = epath.Path(path)
  partial = path.with_name(f'{path.name}.partial-{os.getpid()}')
  partial.mkdir(parents=True)
  try:
    yield partial
    if path.exists():
      path.rmdir()
    partial.rename(path)
  finally:
    if partial.exists():
      partial.rmtree()
