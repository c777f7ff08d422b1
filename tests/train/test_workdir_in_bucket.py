"""Runs whose workdir is a bucket: logs, which cannot grow there, checkpoints, whole runs, and what is refused."""

import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from groupvit_jax import cli, storage
from groupvit_jax.errors import Unavailable
from groupvit_jax.train import log as run_log
from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.checkpoint import Checkpoints
from groupvit_jax.train.log import RunLog
from tests import folder_bucket
from tests.folder_bucket import FolderBucket
from tests.running.test_processes import finish, ROOT, start, start_two
from tests.tiny import tiny_config
from tests.train.test_checkpoint import abstract, raw, save_steps, state  # noqa: F401

RUN = 's3://bucket/run'


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> pathlib.Path:
  """Where the objects of s3://bucket are, as files."""
  folder_bucket.use(monkeypatch, tmp_path)
  monkeypatch.setattr(storage, '_systems', {})
  monkeypatch.setattr(storage, 'RETRY_DELAYS', (0.0, 0.0))
  return tmp_path / 'bucket'


def log_steps(*steps: int) -> None:
  log = RunLog(RUN, first_step=steps[0] - 1, total_steps=9, batch_size=8)
  for step in steps:
    log.figures(step, {'x': step})
  log.close()


def logged(bucket: pathlib.Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in (bucket / 'run/metrics.jsonl').read_text().splitlines()]


def test_a_log_goes_on_where_files_cannot_grow(bucket):
  log_steps(1, 2, 3)
  log_steps(3, 4)
  assert [line['x'] for line in logged(bucket)] == [1, 2, 3, 4]
  assert list((bucket / 'run/tensorboard').glob('events*'))


def test_a_log_that_cannot_be_uploaded_ends_a_run_only_before_a_checkpoint(bucket, monkeypatch):
  def fail(self, path, value, **options):
    raise OSError('the store is down')

  monkeypatch.setattr(run_log, '_SECONDS_BETWEEN_UPLOADS', 0)
  log, pipe = RunLog(RUN, first_step=0, total_steps=9, batch_size=8), FolderBucket.pipe_file
  log.figures(1, {'x': 1})
  monkeypatch.setattr(FolderBucket, 'pipe_file', fail)
  log.figures(2, {'x': 2})
  with pytest.raises(Unavailable, match=f'cannot write {RUN}/.* after 3 attempts: the store is down'):
    with log.paused():
      pass
  assert [line['x'] for line in logged(bucket)] == [1]
  monkeypatch.setattr(FolderBucket, 'pipe_file', pipe)
  log.figures(3, {'x': 3})
  assert [line['x'] for line in logged(bucket)] == [1, 2, 3]
  log.close()


def complete(bucket: pathlib.Path) -> list[int]:
  """Steps that count."""
  return sorted(int(path.parent.name) for path in bucket.glob('run/checkpoints/[0-9]*/complete'))


def test_checkpoints_round_trip_and_the_newest_stay(state, bucket):  # noqa: F811
  checkpoints = Checkpoints(RUN, keep=2)
  assert checkpoints.restore(abstract()) is None
  for step in (1, 2, 3):
    checkpoints.save(state.replace(step=state.step + step), tiny_config())
  checkpoints.wait()
  assert checkpoints.steps() == complete(bucket) == [2, 3]
  assert {path.name for path in (bucket / 'run/checkpoints').iterdir()} == {'2', '3'}
  restored = Checkpoints(RUN, keep=2).restore(abstract(model=2))
  assert restored.step == 3 and restored.state.params['text']['block0']['mlp']['fc1']['kernel'].sharding.spec[1]
  for saved, read in zip(raw(state.replace(step=state.step + 3)), raw(restored.state), strict=True):
    np.testing.assert_array_equal(saved, read)
  variables = Checkpoints(RUN, keep=2, read_only=True).restore_variables(abstract().variables).state
  for saved, read in zip(raw(state.variables), raw(variables), strict=True):
    np.testing.assert_array_equal(saved, read)


def test_what_is_not_complete_does_not_count_and_is_cleared_away(state, bucket, monkeypatch):  # noqa: F811
  save_steps(RUN, state, 1)
  put, left = FolderBucket.put_file, [3]

  def fail(self, lpath, rpath, **options):
    left[0] -= 1
    if left[0] < 0:
      raise OSError('the store is down')
    put(self, lpath, rpath, **options)

  monkeypatch.setattr(FolderBucket, 'put_file', fail)
  checkpoints = Checkpoints(RUN, keep=2)
  said = f'cannot save a checkpoint in {RUN}/checkpoints: after 3 attempts: the store is down; .* untouched'
  with pytest.raises(Unavailable, match=said) as error:
    checkpoints.save(state.replace(step=state.step + 2), tiny_config())
    checkpoints.wait()
  assert cli.fail(error.value) == 1  # and not what says that the same command would end in the same way
  assert (bucket / 'run/checkpoints/2').exists() and complete(bucket) == [1]
  monkeypatch.setattr(FolderBucket, 'put_file', put)
  checkpoints = Checkpoints(RUN, keep=2)
  assert checkpoints.restore(abstract()).step == 1
  checkpoints.save(state.replace(step=state.step + 3), tiny_config())
  checkpoints.wait()
  assert complete(bucket) == [1, 3] and not (bucket / 'run/checkpoints/2').exists()


def test_what_fails_once_is_tried_again(state, bucket, monkeypatch):  # noqa: F811
  """Each kind of request fails when it is made first."""
  failed = []

  def once(name):
    original = getattr(FolderBucket, name)

    def request(self, *args, **options):
      if name not in failed:
        failed.append(name)
        raise OSError('the store is busy')
      return original(self, *args, **options)

    monkeypatch.setattr(FolderBucket, name, request)

  save_steps(RUN, state, 1)
  for name in ('find', 'put_file', 'pipe_file', 'rm_file', 'get_file'):
    once(name)
  checkpoints = Checkpoints(RUN, keep=1)
  checkpoints.save(state.replace(step=state.step + 2), tiny_config())
  checkpoints.wait()
  assert complete(bucket) == [2] == [checkpoints.restore(abstract()).step] and len(failed) == 5


def test_a_damaged_checkpoint_is_passed_over_and_kept(state, bucket):  # noqa: F811
  save_steps(RUN, state, 1, 2)
  for path in (bucket / 'run/checkpoints/2/state').glob('**/d/*'):
    path.write_bytes(path.read_bytes()[:100])
  left = bucket / 'run/checkpoints/damaged-2/left'  # by a start that was interrupted here
  left.parent.mkdir()
  left.touch()
  checkpoints = Checkpoints(RUN, keep=5)
  restored = checkpoints.restore(abstract())
  assert (restored.step, restored.skipped) == (1, (2,))
  assert (bucket / 'run/checkpoints/damaged-2/state').is_dir() and not left.exists()
  checkpoints.save(state.replace(step=state.step + 2), tiny_config())  # the step can be written again
  checkpoints.wait()
  assert complete(bucket) == [1, 2] == checkpoints.steps()


def test_a_run_is_stopped_killed_and_finished(bucket, monkeypatch):
  """By two processes that divide the parameters, until a signal; by one, killed while it saves; by one to the end."""
  temporary = bucket.parent / 'tmp'
  temporary.mkdir()
  monkeypatch.setenv('TMPDIR', str(temporary))
  staged, flags = f'bucket:{bucket.parent}', [f'--workdir={RUN}', '--config.total_steps=8']
  stopped = start_two(
    *flags,
    '--config.mesh.fsdp=2',
    devices=1,
    staged=staged,
    second={'staged': f'{staged},signal:save:{signal.SIGTERM:d}'},
  )
  for code, text in finish(stopped):
    assert code == cli.EXIT_PREEMPTED, text
  assert complete(bucket)[-1] == 3 and not list(temporary.glob('groupvit-*'))
  ((code, text),) = finish([start(*flags, devices=2, staged=f'{staged},signal:save:{signal.SIGKILL:d}')])
  assert code == -signal.SIGKILL and 'goes on after step 3' in text, text
  last = complete(bucket)[-1]
  ((code, text),) = finish([start(*flags, devices=2, staged=staged)])
  assert code == 0 and f'goes on after step {last}' in text, text
  assert complete(bucket)[-1] == 8 and len(complete(bucket)) == 2
  assert not list(temporary.glob('groupvit-*'))  # what the killed one left included
  steps = [line['step'] for line in logged(bucket) if 'train/loss' in line]
  assert steps == list(range(1, 9))


def test_no_such_place_is_one_line_for_every_command(monkeypatch):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')  # so that the run keeps its programs there
  for command in (['train.py', '--config=tests/tiny_run.py'], ['eval.py']):
    done = subprocess.run(
      [sys.executable, *command, '--workdir=az://bucket/run'], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode == cli.EXIT_USAGE, done.stderr
    assert done.stderr.splitlines()[-1].startswith('error: --workdir=az://bucket/run: a run is kept on a disk, or')


def test_where_a_run_cannot_be_kept(monkeypatch):
  with pytest.raises(ValueError, match='--workdir=az://bucket/run: a run is kept on a disk, or in a bucket, gs://'):
    workdir_lib.claim('az://bucket/run', tiny_config())
  monkeypatch.setattr(workdir_lib.importlib.util, 'find_spec', lambda name: None)
  for path, package in (('gs://bucket/run', 'gcsfs'), ('s3://bucket/run', 's3fs')):
    with pytest.raises(ValueError, match=f'--workdir={path} needs {package}: pip install {package}'):
      workdir_lib.claim(path, tiny_config())
