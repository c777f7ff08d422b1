"""A trace of three steps in the middle of a run."""

import jax
import jax.numpy as jnp
import pytest

from groupvit_jax.running.profile import StepTrace


def run(trace: StepTrace) -> int:
  """Steps 11 to 19; the step after which jax.profiler was stopped, 0 for none."""
  stopped, stop = [0], jax.profiler.stop_trace
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax.profiler, 'stop_trace', lambda: stopped.append(step) or stop())
    for step in range(11, 20):
      with trace.step(step):
        x = jnp.float32(step)
      trace.stop_after(step, x)
    trace.close(x)
  return stopped[-1]


def test_three_steps_are_traced_and_no_more(tmp_path, monkeypatch):
  said = []
  assert run(StepTrace(tmp_path, first_step=10, enabled=True, log=said.append)) == 16
  assert said == [f'wrote a trace of 3 steps to {tmp_path}/profile']
  assert len(list((tmp_path / 'profile').rglob('perfetto_trace.json.gz'))) == 1
  assert run(StepTrace(tmp_path / 'other', first_step=10, enabled=False, log=said.append)) == 0
  monkeypatch.setattr(jax, 'process_index', lambda: 1)  # whose trace would lie in the same folder
  assert run(StepTrace(tmp_path / 'other', first_step=10, enabled=True, log=said.append)) == 0
  assert not (tmp_path / 'other').exists() and len(said) == 1


def test_a_trace_that_cannot_be_made_costs_a_line(tmp_path, monkeypatch):
  said = []
  (tmp_path / 'profile').write_text('no folder')
  run(StepTrace(tmp_path, first_step=10, enabled=True, log=said.append))

  def refuse(*args, **kwargs):
    raise RuntimeError('another profiler is at work')

  monkeypatch.setattr(jax.profiler, 'start_trace', refuse)
  run(StepTrace(tmp_path, first_step=10, enabled=True, log=said.append))
  assert said[0].startswith('no trace: ') and said[1:] == ['no trace: another profiler is at work']
