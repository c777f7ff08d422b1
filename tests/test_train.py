"""Whole runs: they learn, they go on exactly where they were, and they say what is wrong.

One device: the steps compile in a third of the time. Several go on exactly in test_ema.py and test_distributed.py.
"""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from groupvit_jax import cli, sharding, train_loop
from groupvit_jax.checkpoint import Checkpoints
from groupvit_jax.evals.scene_eval import SceneEvaluator
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[1]


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Training losses by step, read as a person would."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {line['step']: line['train/loss'] for line in lines if 'train/loss' in line}


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Runs in this process use the first device alone."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    yield


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory) -> pathlib.Path:
  """The workdir of a run that nobody disturbed."""
  workdir = tmp_path_factory.mktemp('uninterrupted')
  assert train_loop.train(tiny_config(), workdir) == 0
  return workdir


def test_logs_every_step(uninterrupted):
  lines = [json.loads(line) for line in (uninterrupted / 'metrics.jsonl').read_text().splitlines()]
  first = next(line for line in lines if 'train/loss' in line)
  for name in ('caption_loss', 'multi_label_loss', 'grad_norm', 'learning_rate', 'images_per_s', 'logit_scale',
               'stage1/entropy', 'stage1/segments_in_use', 'stage1/largest_segment', 'skipped'):
    assert np.isfinite(first[f'train/{name}']), name
  assert first['train/loss'] == pytest.approx(first['train/caption_loss'] + first['train/multi_label_loss'], rel=1e-5)
  assert sorted(losses(uninterrupted)) == [1, 2, 3, 4, 5, 6]
  assert list((uninterrupted / 'tensorboard').glob('events*'))


def test_same_seed_same_losses_other_seed_others(uninterrupted, tmp_path):
  config = tiny_config()
  config.seed = 1
  train_loop.train(config, tmp_path)
  assert set(losses(tmp_path).values()).isdisjoint(losses(uninterrupted).values())


def test_sigterm_saves_and_the_run_goes_on_exactly(uninterrupted, tmp_path):
  """Bit for bit: batches, prompts, stochastic depth and Gumbel noise included."""
  threading.Thread(target=terminate_after, args=(tmp_path / 'metrics.jsonl', 2), daemon=True).start()
  assert train_loop.train(tiny_config(), tmp_path) == cli.EXIT_PREEMPTED
  stopped = max(losses(tmp_path))
  assert 2 <= stopped < 6
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir() if path.name == str(stopped)]
  assert train_loop.train(tiny_config(), tmp_path) == 0
  assert losses(tmp_path) == losses(uninterrupted)


def terminate_after(log: pathlib.Path, lines: int) -> None:
  """Sends this process SIGTERM once a log has so many lines."""
  while not log.exists() or log.read_text().count('\n') < lines:
    time.sleep(0.01)
  os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize('owner, phase', [
    (train_loop, 'set_up'), (train_loop, 'restore_or_init'), (SceneEvaluator, 'evaluate'), (Checkpoints, 'save'),
    (Checkpoints, 'wait')])
def test_sigterm_in_every_phase_loses_nothing(owner, phase, uninterrupted, tmp_path, monkeypatch):
  """The signal comes when the phase begins; the phase itself is the real one."""
  real = getattr(owner, phase)

  def signalled(*args, **kwargs):
    monkeypatch.setattr(owner, phase, real)
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*args, **kwargs)

  monkeypatch.setattr(owner, phase, signalled)
  code = train_loop.train(tiny_config(), tmp_path)
  assert code == (0 if phase == 'wait' else cli.EXIT_PREEMPTED)  # nothing is left to do after the last save
  assert not list((tmp_path / 'checkpoints').glob('*tmp*'))
  assert train_loop.train(tiny_config(), tmp_path) == 0
  assert losses(tmp_path) == losses(uninterrupted)


def command(workdir: pathlib.Path, *flags: str) -> list[str]:
  """train.py on tiny_config(), through the front door."""
  return [sys.executable, 'train.py', '--config=tests/tiny_run.py', f'--workdir={workdir}', *flags]


def test_killed_at_any_moment_goes_on_exactly(uninterrupted, tmp_path):
  """kill -9 three times, wherever it hits; then to the end."""
  one_device = os.environ | {'JAX_NUM_CPU_DEVICES': '1'}
  for lines in (1, 3, 5):
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, env=one_device, stderr=subprocess.DEVNULL)
    log = tmp_path / 'metrics.jsonl'
    while process.poll() is None and not (log.exists() and log.read_text().count('\n') >= lines):
      time.sleep(0.005)
    process.kill()
    process.wait()
  subprocess.run(command(tmp_path), cwd=ROOT, env=one_device, check=True, stderr=subprocess.DEVNULL)
  assert losses(tmp_path) == losses(uninterrupted)


def test_non_finite_updates_are_skipped_counted_and_end_the_run(tmp_path):
  config = tiny_config()
  config.optim.peak_lr = 1e38
  config.total_steps, config.max_skipped_in_a_row = 40, 3
  with pytest.raises(ValueError, match='not finite in 3 steps in a row .* lower optim.peak_lr'):
    train_loop.train(config, tmp_path)
  last = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
  assert last['train/skipped'] >= 3 and last['train/loss'] is None


def test_a_config_that_does_not_fit_the_run(uninterrupted):
  before = (uninterrupted / 'config.json').read_text()
  config = tiny_config()
  config.model.vision.width = 32
  with pytest.raises(ValueError, match=r'model\.vision\.width is 32 here and 16 there'):
    train_loop.train(config, uninterrupted)
  assert (uninterrupted / 'config.json').read_text() == before


@pytest.mark.parametrize('flags, message', [
    (['--config.batch_size=12'], 'batch_size=12 is not a positive multiple of the 8 devices'),
    (['--config.no_such_key=1'], 'no_such_key'),
    (['--config.model.dtype=float16'], "use 'float32' or 'bfloat16'"),
    (['--config.data.scenes.things=("dragonfly",)'], "unknown things 'dragonfly'"),
    (['--config={incomplete}'], "the config has no entry 'num_prompts': give it one; configs/quickstart.py shows"),
])
def test_a_mistake_ends_in_one_line_and_writes_nothing(flags, message, tmp_path):
  workdir, incomplete = tmp_path / 'run', tmp_path / 'incomplete.py'
  incomplete.write_text('from configs import quickstart\n\n\ndef get_config():\n  config = quickstart.get_config()\n'
                        '  del config.data.num_prompts\n  return config\n')
  flags = [flag.format(incomplete=incomplete) for flag in flags]
  done = subprocess.run(command(workdir, *flags), cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == cli.EXIT_USAGE, done.stderr
  assert message in done.stderr.splitlines()[-1] and 'Traceback' not in done.stderr
  assert not workdir.exists()


def test_loss_falls(tmp_path):
  """Well below log 16 = 2.77, which telling nothing apart costs."""
  config = tiny_config()
  config.total_steps, config.batch_size, config.log_every = 120, 16, 10
  config.checkpoint.every_steps = config.eval.every_steps = 1000
  config.data.num_prompts, config.model.vision.drop_path, config.optim.peak_lr = 0, 0.0, 2e-3 * 4096 / 16
  train_loop.train(config, tmp_path)
  values = list(losses(tmp_path).values())
  assert np.mean(values[-6:]) < 2.5, values
