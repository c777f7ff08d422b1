"""Worker processes: they outlive no run, and a signal meant for the run does not end them first."""

from collections.abc import Callable, Iterator
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.tars import samples, write_tar

ROOT = pathlib.Path(__file__).parents[2]
SHARED_MEMORY = pathlib.Path('/dev/shm')


def segments(run: int) -> set[str]:
  """The shared memory that a run's workers made."""
  return {path.name for path in SHARED_MEMORY.glob(f'groupvit-{run}-*')}


def group(leader: int) -> dict[int, str]:
  """Live processes of a group and their command lines."""
  found = {}
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      state, _, pgrp = (folder / 'stat').read_text().rpartition(')')[2].split()[:3]
      if int(pgrp) == leader and state != 'Z':
        found[int(folder.name)] = (folder / 'cmdline').read_text()
    except (FileNotFoundError, ProcessLookupError):
      continue
  return found


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.1)
  return condition()


@pytest.fixture
def reader(tmp_path) -> Iterator[subprocess.Popen]:
  """A process that reads with two workers, in a group of its own, after its first batch."""
  pattern = write_tar(tmp_path / 'a.tar', samples(range(64)) | {'00009.jpg': b'no picture'})
  process = subprocess.Popen(
    [sys.executable, '-m', 'tests.reader', pattern],
    cwd=ROOT,
    text=True,
    start_new_session=True,
    env=os.environ | {'XDG_CACHE_HOME': str(tmp_path)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  try:
    assert process.stdout.readline() == 'batch\n', process.communicate()[1]
    process.workers = [pid for pid, line in group(process.pid).items() if 'spawn_main' in line]
    assert len(process.workers) == 2 and wait_until(lambda: segments(process.pid), 20)
    yield process
    assert wait_until(lambda: not group(process.pid), 20), group(process.pid)
    assert not segments(process.pid)
  finally:
    if group(process.pid):
      os.killpg(process.pid, signal.SIGKILL)


def test_signals_to_all_processes_let_the_run_end_by_itself(reader):
  """What Ctrl-C and SLURM do."""
  for number in (signal.SIGINT, signal.SIGTERM):
    os.killpg(reader.pid, number)
  out, err = reader.communicate(timeout=60)
  assert reader.returncode == 0, err
  assert out.splitlines()[-3:] == ['batch', 'batch', 'ended']
  assert 'Traceback' not in err and 'leaked' not in err
  assert 'replaced a record:' in err and 'a.tar/00009: image_corrupt' in err


def test_workers_end_with_a_parent_that_was_killed(reader):
  reader.kill()
  reader.communicate(timeout=60)  # the pipes close when the last process of the group is gone


def test_a_worker_that_dies_ends_the_run_with_a_message(reader):
  time.sleep(3)  # by then it waits: killed while it opens shared memory, nobody would know of that memory
  os.kill(reader.workers[0], signal.SIGKILL)
  _, err = reader.communicate(timeout=60)
  assert reader.returncode == 1
  assert 'ResourceError: a data worker died (killed, or out of memory?)' in err and 'exit code -9' in err
