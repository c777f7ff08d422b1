"""A folder that appears whole or not at all."""

from collections.abc import Iterator
import contextlib
import os

from etils import epath
import safetensors

from groupvit_jax.errors import ResourceError, UserError


def check_local(path: epath.PathLike) -> None:
  """Raises ValueError for a place in a bucket: weights are read and written by libraries that know disks alone."""
  if '://' in str(path):
    raise UserError(
      f'{path} is in a bucket, and weights are read from and written to disks; copy the folder, as in '
      'gcloud storage cp --recursive'
    )


def check_free(flag: str, path: epath.PathLike) -> None:
  """Raises ValueError when something is at the path already, unless it is an empty folder, or the path is in a bucket.

  Args:
    flag: that named the path, for the message.
    path: of the folder to make.
  """
  check_local(path)
  path = epath.Path(path)
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f'{path} exists already and is left alone; name another {flag}')


@contextlib.contextmanager
def new_folder(flag: str, path: epath.PathLike) -> Iterator[epath.Path]:
  """Yields a folder to fill, which takes its name only at the end; after an error nothing is left of it.

  Args:
    flag: that named the path, for messages.
    path: must not exist, or be an empty folder.

  Raises:
    ValueError: something is there already.
    OSError: it cannot be written.
  """
  check_free(flag, path)
  path = epath.Path(path)
  partial = path.with_name(f'{path.name}.partial-{os.getpid()}')
  try:
    partial.mkdir(parents=True)
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
