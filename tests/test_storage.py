"""Patterns of paths that would fill memory, or take hours."""

import os
import signal
import subprocess
import sys
import time

import pytest

from groupvit_jax.errors import UserError
from groupvit_jax.storage import atomic_folder, find_shards


def test_a_path_among_many_that_is_named_twice_is_found_at_once():
  began = time.monotonic()
  with pytest.raises(UserError, match='name /nowhere/99999.tar twice'):
    find_shards(['/nowhere/{0..99999}.tar', '/nowhere/99999.tar'], 'data.sets.a')
  assert time.monotonic() - began < 5


KILLED = """
import os, sys
from groupvit_jax.storage import atomic_folder
with atomic_folder('--output', sys.argv[1]) as folder:
  (folder / 'half').touch()
  os.kill(os.getpid(), int(sys.argv[2]))
"""


def test_a_killed_export_leaves_nothing_under_its_name_and_the_next_one_clears_up(tmp_path):
  for number in (signal.SIGKILL, signal.SIGTERM):
    process = subprocess.Popen([sys.executable, '-c', KILLED, tmp_path / 'out', str(number.value)])
    assert process.wait(timeout=60) == -number
    (left,) = tmp_path.iterdir()  # of this one alone
    assert left.name == f'out.partial-{os.uname().nodename}-{process.pid}'
  interrupted = [sys.executable, '-c', KILLED, tmp_path / 'out', str(signal.SIGINT.value)]
  assert b'KeyboardInterrupt' in subprocess.run(interrupted, stderr=subprocess.PIPE, timeout=60).stderr
  assert not list(tmp_path.iterdir())
  (tmp_path / f'out.partial-{os.uname().nodename}-{os.getpid()}').mkdir()  # in a container the number repeats
  another = tmp_path / f'out.partial-{os.uname().nodename}-{os.getppid()}'
  another.mkdir()
  with atomic_folder('--output', tmp_path / 'out') as folder:
    (folder / 'whole').touch()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['out', another.name]
