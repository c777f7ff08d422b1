"""Memory that is freed and asked for again is the same memory."""

import subprocess
import sys

import pytest

# In a process of its own, which keeps what it is told. The product of this program has 64 MiB, more than an arena of
# a thread. The heap grows for some calls, while what is small settles between what is large: the last calls count.
PROGRAM = '''
import resource
import jax
import jax.numpy as jnp
from groupvit_jax.freed_memory import keep_freed_memory
if {keep}:
  assert keep_freed_memory()

@jax.jit
def program(x):
  table = x @ x.T
  return (table @ table[:, :1]).sum()

x = jnp.ones((4096, 16))
faults = []
for _ in range(40):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  program(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[-20:])[10])
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_temporaries_of_most_calls_touch_no_new_pages():
  faults = [int(subprocess.run([sys.executable, '-c', PROGRAM.format(keep=keep)], check=True, capture_output=True,
                               text=True).stdout) for keep in (False, True)]
  assert faults[1] < 100 and faults[1] < 0.1 * faults[0]
