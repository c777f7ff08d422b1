"""Saving and restoring: bit for bit, whole or not at all; and the best checkpoint, which best.json names."""

import contextlib
import functools
import json
import logging
import pathlib
import resource
import signal
import sys

from etils import epath
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from groupvit_jax.running import sharding
from groupvit_jax.train import state as train_state
from groupvit_jax.train.checkpoint import BEST_FOLDER, BestCheckpoint, Checkpoints
from tests import folder_bucket
from tests.tiny import tiny_config, tiny_model

TEXT_SHAPE = (2, 6)
MODEL, TX = tiny_model(), optax.adamw(1e-3)


@pytest.fixture(scope='module')
def state() -> train_state.TrainState:
  return train_state.init_state(MODEL, TX, seed=3, text_shape=TEXT_SHAPE, mesh=sharding.make_mesh(fsdp=2))


@functools.cache
def abstract(**mesh) -> train_state.TrainState:
  return train_state.abstract_state(MODEL, TX, TEXT_SHAPE, sharding.make_mesh(**mesh))


def save_steps(folder: pathlib.Path, state: train_state.TrainState, *steps: int) -> None:
  checkpoints = Checkpoints(folder, keep=5)
  for step in steps:
    checkpoints.save(state.replace(step=state.step + step), tiny_config())
    checkpoints.wait()
  checkpoints.close()


def raw(tree) -> list[np.ndarray]:
  as_bits = lambda leaf: jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
  return [np.asarray(as_bits(leaf)) for leaf in jax.tree.leaves(tree)]


def damage(folder: pathlib.Path) -> None:
  """Cuts all files of array data in two."""
  for path in (folder / 'state').glob('**/d/*'):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_logs_and_stderr_lose_only_what_is_raised_anyway(state, tmp_path, monkeypatch, caplog, capsys):
  save_steps(tmp_path, state, 1)
  restore = ocp.CheckpointManager.restore
  seen = (('absl', logging.WARNING, '/orbax/manager.py', 'slow'), ('absl', logging.ERROR, '/groupvit_jax/a.py', 'ours'))
  seen += (('asyncio', logging.ERROR, '/asyncio/base_events.py', "never retrieved\nfuture: <Task coro=<a_user's()>"),)
  raised = (('absl', logging.ERROR, '/orbax/threads.py', 'a thread failed'),)
  raised += (('asyncio', logging.ERROR, '/asyncio/base_events.py', 'never retrieved\nfuture: <Task at /orbax/a.py>'),)

  def logging_restore(self, step, **kwargs):
    print('a data worker', file=sys.stderr)
    for name, level, path, message in seen + raised:
      logging.getLogger(name).handle(logging.LogRecord(name, level, path, 1, message, (), None))
    return restore(self, step, **kwargs)

  monkeypatch.setattr(ocp.CheckpointManager, 'restore', logging_restore)
  assert Checkpoints(tmp_path, keep=5).restore(abstract()).step == 1
  assert [record.getMessage() for record in caplog.records] == [message for *_, message in seen]
  assert 'a data worker' in capsys.readouterr().err


def test_what_fails_once_is_tried_again(state, tmp_path, monkeypatch):
  save_steps(tmp_path, state, 1, 2)
  restore, calls = ocp.CheckpointManager.restore, []

  def fail_once(self, step, **kwargs):
    calls.append(step)
    if len(calls) == 1:
      raise OSError('a disk that was busy')
    return restore(self, step, **kwargs)

  monkeypatch.setattr(ocp.CheckpointManager, 'restore', fail_once)
  restored = Checkpoints(tmp_path, keep=5).restore(abstract())
  assert (restored.step, restored.skipped, calls) == (2, (), [2, 2])
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['1', '2']


def test_no_cut_file_ever_gives_wrong_numbers(state, tmp_path):
  """Whichever file is cut, of every third one: the checkpoint is passed over, or what is read is what was saved."""
  save_steps(tmp_path, state, 1, 2)
  expected, outcomes = raw(state.replace(step=state.step + 2)), []
  one_device = sharding.make_mesh(devices=jax.devices()[:1])
  abstract = train_state.abstract_state(MODEL, TX, TEXT_SHAPE, one_device)
  for path in sorted(p for p in (tmp_path / 'checkpoints' / '2').rglob('*') if p.is_file())[::3]:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    restored = Checkpoints(tmp_path, keep=5, read_only=True).restore(abstract)
    path.write_bytes(data)
    outcomes.append(restored.step)
    if restored.step == 2:
      for saved, read in zip(expected, raw(restored.state), strict=True):
        np.testing.assert_array_equal(saved, read, err_msg=path.name)
  assert {1, 2} == set(outcomes)


def test_reading_only_moves_nothing(state, tmp_path):
  save_steps(tmp_path, state, 1, 2)
  damage(tmp_path / 'checkpoints' / '2')
  assert Checkpoints(tmp_path, keep=5, read_only=True).restore(abstract()).step == 1
  assert (tmp_path / 'checkpoints' / '2').is_dir()


def test_nothing_whole_is_an_error_and_nothing_at_all_is_none(state, tmp_path):
  assert Checkpoints(tmp_path / 'empty', keep=5).restore(abstract()) is None
  save_steps(tmp_path, state, 4)
  damage(tmp_path / 'checkpoints' / '4')
  with pytest.raises(ValueError, match=r'none of the checkpoints \[4\]'):
    Checkpoints(tmp_path, keep=5).restore(abstract())
  assert (tmp_path / 'checkpoints' / '4').is_dir()


@contextlib.contextmanager
def no_room_for(size: int):
  """Every file write beyond `size` bytes fails, as it does on a full disk."""
  previous = resource.getrlimit(resource.RLIMIT_FSIZE)
  handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, previous[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, previous)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint(state, tmp_path):
  save_steps(tmp_path, state, 1)
  checkpoints = Checkpoints(tmp_path, keep=1)
  with no_room_for(1000), pytest.raises(OSError, match='cannot save a checkpoint in .*untouched') as error:
    checkpoints.save(state.replace(step=state.step + 2), tiny_config())
    checkpoints.wait()
  assert '\n' not in str(error.value)
  restored = Checkpoints(tmp_path, keep=5).restore(abstract())
  assert restored.step == 1


@pytest.mark.parametrize('remote', [False, True])
def test_a_better_step_than_a_newer_one_is_kept(remote, state, tmp_path, monkeypatch):
  """As after going back behind a damaged checkpoint."""
  if remote:
    folder_bucket.use(monkeypatch, tmp_path)
  workdir = 's3://bucket/run' if remote else str(tmp_path / 'run')
  for step, value in ((500, 0.5), (450, 0.6)):
    with contextlib.closing(BestCheckpoint(workdir, 'eval/x/miou')) as best:  # of another start
      assert best.offer({'eval/x/miou': value}, state.replace(step=state.step + step), tiny_config(), {})
  with contextlib.closing(Checkpoints(workdir, keep=1, read_only=True, folder=BEST_FOLDER)) as kept:
    assert kept.steps() == [450] == [json.loads((epath.Path(workdir) / 'best.json').read_text())['step']]
