"""Eight fake CPU devices, strict shapes, and a compilation cache shared by all processes of a test run."""

import os
import pathlib

CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'jax'

# Also for the commands that tests start; it must be set before JAX is imported.
if not os.environ.get('JAX_PLATFORMS', '').startswith('cuda'):  # for tests/model/test_gpu.py
  os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'
# Threads for eight devices that wait in several collectives each: see groupvit_jax/cli.py.
os.environ['NPROC'] = '64'
# Eight devices on two busy cores may wait long for each other; the default of 40 s aborts the process.
# Most of a test's time goes into compiling what then runs for milliseconds: LLVM optimises nothing here.
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_cpu_collective_call_terminate_timeout_seconds=900',
    '--xla_cpu_collective_timeout_seconds=900',
    '--xla_backend_optimization_level=0',
  ]
)
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(CACHE)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.5'

import jax  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
