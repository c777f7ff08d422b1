"""A trace of three steps in the middle of a run."""

import jax.numpy as jnp

from groupvit_jax.step_trace import StepTrace


def test_three_steps_are_traced_and_no_more(tmp_path):
  trace, stopped = StepTrace(tmp_path, first_step=10, enabled=True), []
  for step in range(11, 20):
    with trace.step(step):
      x = jnp.float32(step)
    stopped += [step] * trace.stop_after(step, x)
  trace.close(x)
  assert stopped == [16]
  assert len(list((tmp_path / 'profile').rglob('perfetto_trace.json.gz'))) == 1
  with StepTrace(tmp_path / 'other', first_step=0, enabled=False).step(4):
    pass
  assert not (tmp_path / 'other').exists()
