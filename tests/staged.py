"""A command where something is as it seldom is: python -m tests.staged SITUATION,... train.py --flag=value ..."""

from collections.abc import Mapping
import hashlib
import json
import os
import pathlib
import runpy
import sys
import time

import numpy as np

from tests import folder_bucket

PHASES = {
  'warm-up': ('groupvit_jax.train.run', 'jit_step'),
  'evaluation': ('groupvit_jax.eval.evaluator', 'Evaluator.evaluate'),
  'save': ('groupvit_jax.train.checkpoint', 'Checkpoints.save'),
}


def signal_in(phase: str, number: str, visit: str = '1') -> None:
  """This process sends itself a signal when it comes to a phase so often, and has noticed it before it goes on."""
  module, name = PHASES[phase]
  owner = __import__(module, fromlist=['_'])
  *outer, name = name.split('.')
  for part in outer:
    owner = getattr(owner, part)
  original, visits = getattr(owner, name), []

  def signalled(*args, **kwargs):
    visits.append(name)
    result = original(*args, **kwargs)
    if len(visits) == int(visit):
      os.kill(os.getpid(), int(number))
      time.sleep(3)  # JAX looks every second
    return result

  setattr(owner, name, signalled)


def row_digests(batch: Mapping[str, np.ndarray]) -> list[str]:
  """A digest of each row of a batch."""
  pairs = zip(batch['image'], batch['tokens'])
  return [hashlib.sha256(image.tobytes() + tokens.tobytes()).hexdigest()[:12] for image, tokens in pairs]


def note_rows(folder: str) -> None:
  """Writes down the digests of the rows that this process takes, a line of JSON for each step, in a file of its own."""
  from groupvit_jax.train import loop

  read = loop.read_batches

  def noted(run, first_batch):
    for step, batch in enumerate(read(run, first_batch), start=first_batch + 1):
      rows = row_digests(batch)
      with (pathlib.Path(folder) / f'{os.getpid()}.rows').open('a') as file:
        file.write(json.dumps([step, rows]) + '\n')
      yield batch

  loop.read_batches = noted


SITUATIONS = {'signal': signal_in, 'bucket': folder_bucket.install, 'rows': note_rows}


if __name__ == '__main__':
  for situation in sys.argv[1].split(','):
    name, *arguments = situation.split(':')
    SITUATIONS[name](*arguments)
  sys.argv = sys.argv[2:]
  sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
  runpy.run_path(sys.argv[0], run_name='__main__')
