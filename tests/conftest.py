"""Eight fake CPU devices, strict shapes, a compilation cache that all processes of a test run share, and oracles.

Tests that compare with torch or transformers carry the mark `oracle`: all of a file that imports either, or models made
with them, and those that take one as a fixture. Where torch is not installed they are left out.
"""

from collections.abc import Iterator
import ctypes
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import struct
import sys
import tempfile

CACHE = pathlib.Path(__file__).parents[1] / '.cache' / 'jax'

# A shell starts jobs in the background with Ctrl-C ignored, and the commands that tests start would ignore it, too.
signal.signal(signal.SIGINT, signal.default_int_handler)

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
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

ORACLES = ('torch', 'transformers')


@functools.cache
def imports_oracle(path: pathlib.Path) -> bool:
  pattern = rf'^(import ({"|".join(ORACLES)})|from tests\.huggingface_models import .*)$'
  return re.search(pattern, path.read_text(), re.MULTILINE) is not None


def pytest_ignore_collect(collection_path: pathlib.Path) -> bool | None:
  if collection_path.suffix == '.py' and not all(map(importlib.util.find_spec, ORACLES)):
    return imports_oracle(collection_path) or None
  return None


def pytest_configure(config: pytest.Config) -> None:
  os.environ.setdefault('GROUPVIT_TRAINED', f'groupvit-trained-{os.getpid()}')  # the first process names it for all


def pytest_unconfigure(config: pytest.Config) -> None:
  if os.environ['GROUPVIT_TRAINED'].endswith(f'-{os.getpid()}'):
    for path in pathlib.Path(tempfile.gettempdir()).glob(f'{os.environ["GROUPVIT_TRAINED"]}*'):
      shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  for item in items:
    if imports_oracle(item.path) or any(name in item.fixturenames for name in ORACLES):
      item.add_marker('oracle')


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> None:
  """The test has a folder of its own, tmp_path/cache, for indices and downloads."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))


@pytest.fixture
def ordinary_signal_stack() -> None:
  """Signals to this process are handled on its ordinary stack.

  Another test may have loaded a library that set an alternative one, which is gone by now: with it the kernel would
  end the process by SIGSEGV.
  """
  none = struct.pack('PiP', 0, 2, 0)  # stack_t: no address, SS_DISABLE, no size
  if sys.platform == 'linux':
    assert ctypes.CDLL(None).sigaltstack(none, None) == 0


@pytest.fixture
def one_device() -> Iterator[None]:
  """See `tests.trained.on_devices`."""
  from tests.trained import on_devices

  with on_devices(1):
    yield


@pytest.fixture(scope='session')
def torch():
  return pytest.importorskip('torch')


@pytest.fixture(scope='session')
def transformers():
  return pytest.importorskip('transformers')
