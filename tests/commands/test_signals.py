"""Signals to whole commands that are not training: nothing half-written stays, and the same command works again."""

import signal
import subprocess
import sys
import time

from PIL import Image

from tests.photos import photo
from tests.runs import ROOT, run_command
from tests.trained import trained_workdir


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


def test_an_evaluation_and_an_export(tmp_path):
  """Ended by SIGTERM, after which the same command works, and by Ctrl-C."""
  for index in range(24):
    Image.fromarray(photo(100, 150, seed=index)).save(tmp_path / f'{index}.png')
  out, exported, workdir = tmp_path / 'out', tmp_path / 'exported', f'--workdir={trained_workdir()}'
  segment = ['eval.py', workdir, f'--images={tmp_path}/*.png', '--classes=dog,cat', f'--output={out}']
  export = ['-m', 'groupvit_jax.commands.export', workdir, '--format=stablehlo', f'--output={exported}']
  code, stderr = interrupt(segment, lambda: list(out.rglob('*.png')), signal.SIGTERM)
  assert code == -signal.SIGTERM and 'Traceback' not in stderr, stderr
  assert all(Image.open(path).load() for path in out.rglob('*.png'))
  code, stderr = interrupt(export, lambda: list(tmp_path.glob('exported.partial-*')), signal.SIGINT)
  assert code == 130 and 'Traceback' not in stderr, stderr
  assert not exported.exists()
  done = run_command(*segment)
  assert done.returncode == 0 and len(list(out.rglob('*.json'))) >= 24, done.stderr
