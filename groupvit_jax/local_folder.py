"""Folders on this host's disk for what is copied to a bucket, or from one."""

import atexit
import hashlib
import os
import pathlib
import shutil
import tempfile

import jax


def make(purpose: str, url: str | None = None) -> pathlib.Path:
  """Makes an empty temporary folder, which is gone when the process has ended in order.

  Args:
    purpose: a word for its name.
    url: what it is a copy of, when one process at a time has it: what one that was killed left is removed, so
      that a run that is killed again and again does not fill the disk.
  """
  if url is None:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f'groupvit-{purpose}-'))
  else:
    name = hashlib.sha256(f'{url} {os.getuid()}'.encode()).hexdigest()[:16]  # hosts are shared, names are not
    folder = pathlib.Path(tempfile.gettempdir()) / f'groupvit-{purpose}-{name}-{jax.process_index()}'
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return folder
