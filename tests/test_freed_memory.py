"""Memory that is freed and asked for again is the same memory."""

import subprocess
import sys

import pytest

# In a process of its own, which keeps what it is told.
PROGRAM = '''
import resource
import numpy as np
from groupvit_jax.freed_memory import keep_freed_memory
if {keep}:
  assert keep_freed_memory()
np.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='of glibc')
def test_the_second_array_touches_no_new_pages():
  faults = [int(subprocess.run([sys.executable, '-c', PROGRAM.format(keep=keep)], check=True, capture_output=True,
                               text=True).stdout) for keep in (False, True)]
  assert faults[1] < 100 and faults[1] < 0.5 * faults[0]
