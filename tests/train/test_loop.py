"""Whole runs: they learn, they go on exactly where they were, and they say what is wrong.

One device: the steps compile in a third of the time. Several go on exactly in test_ema.py and test_processes.py.
"""

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from groupvit_jax import cli, config_entries
from groupvit_jax.eval.evaluator import Evaluator
from groupvit_jax.train import loop, optim, restored_run
from groupvit_jax.train.checkpoint import Checkpoints
from tests.board import read_board
from tests.runs import logged, read_log, ROOT, run_command
from tests.tiny import tiny_config
from tests.train.test_checkpoint import no_room_for
from tests.trained import trained_workdir

scores = functools.partial(logged, metric='eval/validation/oracle_miou')


pytestmark = pytest.mark.usefixtures('one_device', 'ordinary_signal_stack')


@pytest.fixture(scope='module')
def uninterrupted() -> pathlib.Path:
  """The workdir of a run that nobody disturbed."""
  return trained_workdir()


def test_logs_every_step(uninterrupted):
  first = next(line for line in read_log(uninterrupted) if 'train/loss' in line)
  names = 'caption_loss multi_label_loss grad_norm learning_rate images_per_s logit_scale multi_label_logit_scale '
  names += 'stage1/entropy stage1/segments_in_use stage1/largest_segment skipped text_tokens text_turns'
  for name in names.split():
    assert np.isfinite(first[f'train/{name}']), name
  assert first['train/loss'] == pytest.approx(first['train/caption_loss'] + first['train/multi_label_loss'], rel=1e-5)
  assert sorted(logged(uninterrupted)) == [1, 2, 3, 4, 5, 6]
  assert list((uninterrupted / 'tensorboard').glob('events*'))


def test_a_finished_run_says_so_and_what_comes_next(uninterrupted, tmp_path, capsys):
  shutil.copytree(uninterrupted, tmp_path / 'run')
  assert loop.train(tiny_config(), tmp_path / 'run') == 0
  lines = capsys.readouterr().err.splitlines()
  assert lines[-1] == (
    f'the run is done already, at step 6; next: python -m groupvit_jax eval --workdir={tmp_path}/run '
    f'--output={tmp_path}/run/eval'
  )
  assert any('records made on demand; vocabulary' in line for line in lines)
  count = sum(leaf.size for leaf in jax.tree.leaves(restored_run.restore(uninterrupted).variables['params']))
  total = next(n for n, line in enumerate(lines) if line.split() == ['parameters', f'{count:,}'])
  assert max(map(len, lines[: total + 1])) <= 100


@pytest.mark.parametrize('owner, phase', [(Evaluator, 'evaluate'), (Checkpoints, 'save'), (Checkpoints, 'wait')])
def test_sigterm_in_every_phase_loses_nothing(owner, phase, uninterrupted, tmp_path, monkeypatch):
  """The signal comes when the phase first begins; the phase itself is the real one.

  Then the run goes on bit for bit: batches, prompts, stochastic depth and Gumbel noise included.
  """
  real, calls, saved = getattr(owner, phase), [], []

  def signalled(*args, **kwargs):
    calls.append(phase)
    if len(calls) == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    if phase == 'evaluate':
      assert saved[-1] in (3, 6)  # its own step: a kill would lose nothing either
    return real(*args, **kwargs)

  if phase == 'evaluate':
    save = Checkpoints.save
    monkeypatch.setattr(
      Checkpoints, 'save', lambda self, state, config: (saved.append(int(state.step)), save(self, state, config))
    )

  monkeypatch.setattr(owner, phase, signalled)
  code = loop.train(tiny_config(), tmp_path)
  assert code == (0 if phase == 'wait' else cli.EXIT_PREEMPTED)  # nothing is left to do after the last save
  assert not list((tmp_path / 'checkpoints').glob('*tmp*'))
  if phase == 'evaluate':
    assert not scores(tmp_path)
  if phase == 'save':  # of step 2; the signal is heeded after the step that follows
    assert max(logged(tmp_path)) == 3 and (tmp_path / 'checkpoints' / '3').exists()
  assert loop.train(tiny_config(), tmp_path) == 0
  assert logged(tmp_path) == logged(uninterrupted)
  assert scores(tmp_path) == scores(uninterrupted) and sorted(scores(tmp_path)) == [3, 6]


def test_sigterm_while_restoring_damages_nothing(uninterrupted, tmp_path, monkeypatch):
  """It finds the main thread among code that takes any exception for a damaged file."""
  workdir = shutil.copytree(uninterrupted, tmp_path / 'run')
  kept = sorted(path.name for path in (workdir / 'checkpoints').iterdir())
  assert len(kept) == 2
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'restore', lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    assert loop.train(tiny_config(), workdir) == cli.EXIT_PREEMPTED
  assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == kept


def command(workdir: pathlib.Path) -> list[str]:
  """train.py on tiny_config(), through the front door."""
  return [sys.executable, 'train.py', '--config=tests/tiny_run.py', f'--workdir={workdir}']


def test_killed_at_any_moment_goes_on_exactly(uninterrupted, tmp_path):
  """kill -9, wherever it hits; then to the end."""
  one_device = os.environ | {'JAX_NUM_CPU_DEVICES': '1'}
  process = subprocess.Popen(command(tmp_path), cwd=ROOT, env=one_device, stderr=subprocess.DEVNULL)
  while process.poll() is None and len(logged(tmp_path)) < 3:
    time.sleep(0.005)
  process.kill()
  process.wait()
  subprocess.run(command(tmp_path), cwd=ROOT, env=one_device, check=True, stderr=subprocess.DEVNULL)
  assert logged(tmp_path) == logged(uninterrupted)


def test_a_save_that_fails_ends_the_run_before_the_next_one(tmp_path, monkeypatch, caplog, capfd):
  save = Checkpoints.save
  with contextlib.ExitStack() as stack, pytest.raises(OSError, match='cannot save a checkpoint in .*File too large'):

    def save_on_a_full_disk(*args):
      stack.enter_context(no_room_for(64 * 1024))
      save(*args)
      time.sleep(1)  # longer than it takes to fail in the background

    monkeypatch.setattr(Checkpoints, 'save', save_on_a_full_disk)
    loop.train(tiny_config(), tmp_path)
  assert max(logged(tmp_path)) < 4  # when the next one is due
  # The reason is said once. What other tests left unfinished in this process, asyncio says at any time.
  assert not [record for record in caplog.records if record.name != 'asyncio']
  assert 'Traceback' not in capfd.readouterr().err


def test_a_folder_that_may_not_be_written_ends_the_run_before_its_first_step(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'checkpoints').chmod(0o500)
  as_anyone = ['setpriv', '--bounding-set=-dac_override'] if os.geteuid() == 0 else []
  done = subprocess.run([*as_anyone, *command(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == cli.EXIT_USAGE, done.stderr
  last = done.stderr.splitlines()[-1]
  assert 'cannot save a checkpoint in' in last and 'Permission denied' in last
  assert not (tmp_path / 'metrics.jsonl').exists()


def test_non_finite_updates_are_skipped_counted_and_end_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(loop, 'MAX_SKIPPED_IN_A_ROW', 3)
  monkeypatch.setattr(config_entries, 'check', lambda *_: None)  # it refuses such a rate
  config = tiny_config()
  config.optim.peak_lr = 1e38
  config.total_steps, config.log_every, config.eval.every_steps = 40, 30, 0
  with pytest.raises(ValueError, match='not finite in 3 steps in a row .* lower optim.peak_lr'):
    loop.train(config, tmp_path)
  last = read_log(tmp_path)[-1]
  assert last['step'] < 30 and last['train/skipped'] == 3 and last['train/loss'] is None
  rate = optim.build_schedule(config.optim, 40, 8)(last['step'] - 3 - 1)  # of the last update that was made
  assert last['train/learning_rate'] == pytest.approx(float(rate))
  assert read_board(tmp_path / 'tensorboard')['train/skipped'] == (last['step'], 3)


def test_a_mistake_ends_in_one_line_and_writes_nothing(tmp_path):
  workdir, incomplete = tmp_path / 'run', tmp_path / 'incomplete.py'
  incomplete.write_text(
    'from configs import quickstart\n\n\ndef get_config():\n  config = quickstart.get_config()\n'
    '  del config.data.num_prompts\n  return config\n'
  )
  given = ['train.py', f'--config={incomplete}', f'--workdir={workdir}']
  done = run_command(*given)
  assert done.returncode == cli.EXIT_USAGE, done.stderr
  message = "the config has no entry 'num_prompts': give it one; configs/quickstart.py shows"
  assert message in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr
  assert not workdir.exists()


def test_loss_falls(tmp_path):
  """Well below log 16 = 2.77, which telling nothing apart costs."""
  config = tiny_config()
  config.total_steps, config.batch_size, config.log_every = 120, 16, 10
  config.checkpoint.every_steps = config.eval.every_steps = 1000
  config.data.num_prompts, config.model.vision.drop_path, config.optim.peak_lr = 0, 0.0, 2e-3 * 4096 / 16
  loop.train(config, tmp_path)
  values = list(logged(tmp_path).values())
  assert np.mean(values[-6:]) < 2.5, values
