"""Signals to whole commands that are not training: nothing half-written stays, and the same command works again."""

import pathlib
import signal
import subprocess
import sys
import time

from PIL import Image
import pytest

from tests.photos import photo
from tests.trained import trained_workdir

ROOT = pathlib.Path(__file__).parents[2]


def interrupt(command: list[str], begun, number: signal.Signals) -> tuple[int, str]:
  """Starts a command, sends a signal once `begun()` holds, and returns its exit code and stderr."""
  process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
  for _ in range(600):
    if begun():
      break
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.1)
  process.send_signal(number)
  _, stderr = process.communicate(timeout=60)
  return process.returncode, stderr


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_an_evaluation_and_an_export(number, tmp_path):
  for index in range(24):
    Image.fromarray(photo(100, 150, seed=index)).save(tmp_path / f'{index}.png')
  out, exported = tmp_path / 'out', tmp_path / 'exported'
  segment = [
    'eval.py',
    f'--workdir={trained_workdir()}',
    f'--images={tmp_path}/*.png',
    '--classes=dog,cat',
    f'--output={out}',
  ]
  export = [
    '-m',
    'groupvit_jax.commands.export',
    f'--workdir={trained_workdir()}',
    '--format=stablehlo',
    f'--output={exported}',
  ]
  code, stderr = interrupt(segment, lambda: list(out.rglob('*.png')), number)
  assert code == (130 if number == signal.SIGINT else -number) and 'Traceback' not in stderr, stderr
  assert all(Image.open(path).load() for path in out.rglob('*.png'))
  code, stderr = interrupt(export, lambda: list(tmp_path.glob('exported.partial-*')), number)
  assert code == (130 if number == signal.SIGINT else -number) and 'Traceback' not in stderr, stderr
  assert not exported.exists()
  if number == signal.SIGTERM:
    done = subprocess.run([sys.executable, *segment], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and len(list(out.rglob('*.json'))) >= 24, done.stderr
