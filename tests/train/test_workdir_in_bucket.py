"""Runs whose workdir is a bucket: logs, which cannot grow there, checkpoints, whole runs, and what is refused.

What checkpoints do there they do on a disk as well.
"""

import json
import os
import pathlib
import re
import signal
import time

import fsspec
import numpy as np
import pytest

from groupvit_jax import cli, storage
from groupvit_jax.errors import Unavailable
from groupvit_jax.train import log as run_log
from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.checkpoint import Checkpoints
from groupvit_jax.train.log import RunLog
from tests import folder_bucket, gcs
from tests.folder_bucket import FolderBucket
from tests.running.test_processes import finish, start, start_two
from tests.tiny import tiny_config
from tests.train.test_checkpoint import abstract, raw, save_steps, state  # noqa: F401

RUN = 's3://bucket/run'
# Without it a step does not count.
COMPLETE = {'gs': 'commit_success.txt', 's3': 'complete', 'disk': '_CHECKPOINT_METADATA'}


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> pathlib.Path:
  """Where the objects of s3://bucket are, as files."""
  folder_bucket.use(monkeypatch, tmp_path)
  monkeypatch.setattr(storage, 'RETRY_DELAYS', (0.0, 0.0))
  return tmp_path / 'bucket'


@pytest.fixture(params=['gs', 's3', 'disk'])
def run(request, tmp_path) -> str:
  """The URL or path of a workdir that is not there yet."""
  if request.param == 'disk':
    # In a container the number repeats, which a killed process may have left.
    (tmp_path / 'run' / 'checkpoints' / f'.writable-{os.getpid()}').mkdir(parents=True)
    return str(tmp_path / 'run')
  if request.param == 's3':
    request.getfixturevalue('bucket')
    return RUN
  name = f'bucket-{os.getpid()}-{time.monotonic_ns()}'
  gcs.create_bucket(name)
  workdir_lib.check_location(f'gs://{name}/run')
  return f'gs://{name}/run'


def objects(run: str) -> dict[str, str]:
  """Path below the workdir -> URL."""
  system, root = fsspec.core.url_to_fs(run)
  system.invalidate_cache()
  return {path.split(f'{root}/')[1]: system.unstrip_protocol(path) for path in system.find(root)}


def complete(run: str) -> list[int]:
  """Steps that count."""
  pattern = re.compile(rf'checkpoints/(\d+)/{COMPLETE.get(run[:2], COMPLETE["disk"])}')
  return sorted(int(match[1]) for match in map(pattern.fullmatch, objects(run)) if match)


def log_steps(*steps: int) -> None:
  log = RunLog(RUN, first_step=steps[0] - 1, total_steps=9, batch_size=8)
  for step in steps:
    log.metrics(step, {'x': step})
  log.close()


def logged(run: str) -> list[dict[str, float]]:
  system, root = fsspec.core.url_to_fs(run)
  return [json.loads(line) for line in system.cat_file(f'{root}/metrics.jsonl').decode().splitlines()]


def test_a_log_continues_where_files_cannot_grow(bucket):
  log_steps(1, 2, 3)
  log_steps(3, 4)
  assert [line['x'] for line in logged(RUN)] == [1, 2, 3, 4]
  assert list((bucket / 'run/tensorboard').glob('events*'))


def test_a_failed_upload_of_the_log_ends_a_run_only_before_a_checkpoint(bucket, monkeypatch):
  def fail(self, path, value, **options):
    raise OSError('the store is down')

  monkeypatch.setattr(run_log, '_SECONDS_BETWEEN_UPLOADS', 0)
  log, pipe = RunLog(RUN, first_step=0, total_steps=9, batch_size=8), FolderBucket.pipe_file
  log.metrics(1, {'x': 1})
  monkeypatch.setattr(FolderBucket, 'pipe_file', fail)
  log.metrics(2, {'x': 2})
  with pytest.raises(Unavailable, match=f'cannot write {RUN}/.* after 3 attempts: the store is down'):
    with log.paused():
      pass
  assert [line['x'] for line in logged(RUN)] == [1]
  monkeypatch.setattr(FolderBucket, 'pipe_file', pipe)
  log.metrics(3, {'x': 3})
  assert [line['x'] for line in logged(RUN)] == [1, 2, 3]
  log.close()


def test_checkpoints_round_trip_and_the_newest_stay(state, run):  # noqa: F811
  checkpoints = Checkpoints(run, keep=2)
  assert checkpoints.restore(abstract()) is None
  for step in (1, 2, 3):
    checkpoints.save(state.replace(step=state.step + step), tiny_config())
  checkpoints.wait()
  assert checkpoints.steps() == complete(run) == [2, 3]
  assert {path.split('/')[1] for path in objects(run)} == {'2', '3'}
  restored = Checkpoints(run, keep=2).restore(abstract(model=2))
  assert restored.step == 3 and restored.state.params['text']['block0']['mlp']['fc1']['kernel'].sharding.spec[1]
  for saved, read in zip(raw(state.replace(step=state.step + 3)), raw(restored.state), strict=True):
    np.testing.assert_array_equal(saved, read)
  variables = Checkpoints(run, keep=2, read_only=True).restore_variables(abstract().variables).state
  for saved, read in zip(raw(state.variables), raw(variables), strict=True):
    np.testing.assert_array_equal(saved, read)


@pytest.mark.parametrize('run', ['gs', 's3'], indirect=True)
def test_an_incomplete_step_does_not_count_and_is_written_again(state, run):  # noqa: F811
  save_steps(run, state, 1, 2)
  system, root = fsspec.core.url_to_fs(run)
  system.rm(f'{root}/checkpoints/2/{COMPLETE[run[:2]]}')
  system.pipe_file(f'{root}/checkpoints/2/rest', b'x')
  checkpoints = Checkpoints(run, keep=2)
  assert checkpoints.steps() == [1] == [checkpoints.restore(abstract()).step]
  checkpoints.save(state.replace(step=state.step + 2), tiny_config())
  checkpoints.wait()
  assert complete(run) == [1, 2] and 'checkpoints/2/rest' not in objects(run)


def test_a_damaged_checkpoint_is_passed_over_and_kept(state, run):  # noqa: F811
  save_steps(run, state, 1, 2)
  system, root = fsspec.core.url_to_fs(run)
  for path, url in objects(run).items():
    if re.fullmatch('checkpoints/2/state/(.*/)?d/.*', path):
      system.pipe_file(url, system.cat_file(url)[:100]) if '://' in run else system.rm(url)
  system.makedirs(f'{root}/checkpoints/damaged-2', exist_ok=True)
  system.pipe_file(f'{root}/checkpoints/damaged-2/left', b'x')  # of an interrupted start
  checkpoints = Checkpoints(run, keep=5)
  restored = checkpoints.restore(abstract())
  assert (restored.step, restored.skipped) == (1, (2,))
  kept = {path for path in objects(run) if path.startswith('checkpoints/damaged-2/')}
  assert len(kept) > 5 and 'checkpoints/damaged-2/left' not in kept
  checkpoints.save(state.replace(step=state.step + 2), tiny_config())  # the step can be written again
  checkpoints.wait()
  assert complete(run) == [1, 2] == checkpoints.steps()


def test_a_store_that_is_down_is_one_line_and_harms_no_checkpoint(state, bucket, monkeypatch):  # noqa: F811
  save_steps(RUN, state, 1)
  put, left = FolderBucket.put_file, [3]

  def fail(self, lpath, rpath, **options):
    left[0] -= 1
    if left[0] < 0:
      raise OSError('the store is down')
    put(self, lpath, rpath, **options)

  monkeypatch.setattr(FolderBucket, 'put_file', fail)
  checkpoints = Checkpoints(RUN, keep=2)
  message = f'cannot save a checkpoint in {RUN}/checkpoints: after 3 attempts: the store is down; .* untouched'
  with pytest.raises(Unavailable, match=message) as error:
    checkpoints.save(state.replace(step=state.step + 2), tiny_config())
    checkpoints.wait()
  assert cli.fail(error.value) == cli.EXIT_UNAVAILABLE  # the same command may succeed later
  assert (bucket / 'run/checkpoints/2').exists() and complete(RUN) == [1]


def test_a_request_that_fails_once_is_retried(state, bucket, monkeypatch):  # noqa: F811
  failed = []

  def fail_once(name):
    original = getattr(FolderBucket, name)

    def request(self, *args, **options):
      if name not in failed:
        failed.append(name)
        raise OSError('the store is busy')
      return original(self, *args, **options)

    monkeypatch.setattr(FolderBucket, name, request)

  save_steps(RUN, state, 1)
  for name in ('find', 'put_file', 'pipe_file', 'rm', 'get_file'):
    fail_once(name)
  checkpoints = Checkpoints(RUN, keep=1)
  checkpoints.save(state.replace(step=state.step + 2), tiny_config())
  checkpoints.wait()
  assert complete(RUN) == [2] == [checkpoints.restore(abstract()).step] and len(failed) == 5


@pytest.mark.parametrize('run', ['gs', 's3'], indirect=True)
def test_a_run_is_killed_while_it_saves_and_finished(run, tmp_path, monkeypatch):
  """Of two processes that divide the parameters the first, in the second save; then one process runs to the end."""
  temporary = tmp_path / 'tmp'
  temporary.mkdir()
  monkeypatch.setenv('TMPDIR', str(temporary))
  staged, flags = f'bucket:{tmp_path}', [f'--workdir={run}', '--config.total_steps=8']
  first = {'staged': f'{staged},signal:save:{signal.SIGKILL:d}:2'}
  two = start_two(*flags, '--config.mesh.fsdp=2', '--peer_timeout=20', devices=1, staged=staged, first=first)
  (code, text), (other, its_text) = finish(two)
  assert code == -signal.SIGKILL and other in (cli.EXIT_PEER_LOST, -signal.SIGABRT), text + its_text
  last = complete(run)[-1]
  ((code, text),) = finish([start(*flags, devices=2, staged=staged)])
  assert code == 0 and f'resumes after step {last}' in text, text
  assert complete(run)[-1] == 8 and len(complete(run)) == 2
  assert not list(temporary.glob('groupvit-*-0'))  # what the killed one left included
  assert [line['step'] for line in logged(run) if 'train/loss' in line] == list(range(1, 9))


def test_where_a_run_cannot_be_kept(monkeypatch):
  with pytest.raises(ValueError, match='--workdir=az://bucket/run: a run is kept on a disk, or in a bucket, gs://'):
    workdir_lib.check_location('az://bucket/run')
  with pytest.raises(ValueError, match='--workdir is empty'):
    workdir_lib.check_location('')
  monkeypatch.setattr(workdir_lib.importlib.util, 'find_spec', lambda name: None)
  for path, package in (('gs://bucket/run', 'gcsfs'), ('s3://bucket/run', 's3fs')):
    with pytest.raises(ValueError, match=f'--workdir={path} needs {package}: pip install {package}'):
      workdir_lib.check_location(path)
