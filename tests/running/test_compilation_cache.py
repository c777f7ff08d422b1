"""Programs that a run compiled are there for the next one."""

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest

from groupvit_jax.running import processes


@pytest.fixture
def events(monkeypatch):
  """What JAX's cache reports, in a process that has compiled before and was told of no folder."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = {name: getattr(jax.config, name) for name in names}
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  found = []
  listen = lambda event, **_: found.append(event.rpartition('/')[2])
  jax.monitoring.register_event_listener(listen)
  yield found
  jax.monitoring.unregister_event_listener(listen)
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def compile_step() -> None:
  """Each time a function that this process has not seen, with the same program."""
  jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()


def test_a_second_start_compiles_nothing(events, tmp_path):
  folder = tmp_path / 'run' / 'programs'
  processes.enable_compilation_cache(folder)
  assert not folder.exists()  # a run with a mistake leaves nothing
  compile_step()
  assert 'cache_misses' in events and list(folder.iterdir())
  events.clear()
  compile_step()
  assert 'cache_hits' in events and 'cache_misses' not in events


def test_the_environment_comes_first(events, tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'named'))
  processes.enable_compilation_cache(tmp_path / 'programs')
  compile_step()
  assert not (tmp_path / 'programs').exists()
