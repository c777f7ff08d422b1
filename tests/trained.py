"""One tiny trained run for all tests that read one and change nothing in it."""

from collections.abc import Iterator
import contextlib
import fcntl
import functools
import os
import pathlib
import tempfile

import jax
import pytest

from groupvit_jax.running import sharding
from groupvit_jax.train import loop
from tests.tiny import tiny_config


@contextlib.contextmanager
def on_devices(count: int) -> Iterator[None]:
  """Runs of this process use the first devices alone: on one, their programs compile in a third of the time."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:count]))
    yield


@functools.cache
def trained_workdir() -> pathlib.Path:
  """The workdir of a finished `tiny_config` run, with checkpoints 4 and 6, on one device: the step compiles sooner.

  Processes of one test run share it; `tests/conftest.py` deletes it.
  """
  folder = pathlib.Path(tempfile.gettempdir()) / os.environ['GROUPVIT_TRAINED']
  with folder.with_suffix('.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not folder.exists():
      with on_devices(1):
        assert loop.train(tiny_config(), folder.with_suffix('.partial')) == 0
      folder.with_suffix('.partial').rename(folder)
  return folder
