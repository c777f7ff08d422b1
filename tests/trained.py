"""One tiny trained run for all tests of a process that read one and change nothing in it."""

import atexit
import functools
import pathlib
import shutil
import tempfile

from groupvit_jax.train import loop
from tests.tiny import tiny_config


@functools.cache
def trained_workdir() -> pathlib.Path:
  """The workdir of a finished `tiny_config` run, with checkpoints 4 and 6."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix='groupvit-trained-'))
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  assert loop.train(tiny_config(), folder) == 0
  return folder
