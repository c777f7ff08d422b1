"""Ctrl-C while the main thread is in a library, as during a compilation."""

import signal
import subprocess
import sys

from groupvit_jax import cli
from tests.runs import run_command

BUSY = """
import hashlib
from groupvit_jax.running.interrupts import Interrupts
with Interrupts().installed():
  print('busy', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)  # for minutes; no handler in Python runs before it returns
"""


def test_ctrl_c_says_at_once_what_will_happen_and_a_second_one_ends():
  process = subprocess.Popen(
    [sys.executable, '-c', BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
  )
  assert process.stdout.readline() == 'busy\n'
  process.send_signal(signal.SIGINT)
  assert process.stderr.readline().startswith(
    'SIGINT: saves and ends after what runs now (a step, a compilation, a save)'
  )
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  _, rest = process.communicate(timeout=20)
  assert process.returncode == cli.EXIT_INTERRUPTED
  assert rest == 'ended by the second Ctrl-C; the same command resumes from the last checkpoint\n'


LOST = """
import signal
from groupvit_jax import cli
class Destroyed:
  def __del__(self):
    signal.raise_signal(signal.SIGINT)
def main():
  Destroyed()  # Python drops what is raised in there
  while True:
    pass
cli.run(main)
"""


def test_ctrl_c_in_a_destructor_is_not_lost():
  done = run_command('-c', LOST, timeout=60)
  assert (done.returncode, done.stderr) == (cli.EXIT_INTERRUPTED, 'error: interrupted\n')
