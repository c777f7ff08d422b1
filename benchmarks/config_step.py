"""Times a config's training step and prints JSON: python -m benchmarks.config_step --config=configs/quickstart.py"""

import functools
import json
import statistics
import tempfile
import time

from absl import app, flags
import jax
from ml_collections import config_flags
import numpy as np

from groupvit_jax.data import pipeline
from groupvit_jax.train import loop
from groupvit_jax.train import state as train_state

CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment.')
STEPS = flags.DEFINE_integer('steps', 50, 'Timed steps.')
flags.mark_flag_as_required('config')


def main(_) -> None:
  """Compiles the step, then times it on one batch, and again with the input pipeline feeding it."""
  config = CONFIG.value
  with tempfile.TemporaryDirectory() as workdir:
    run = loop.set_up(config, workdir)
  state = train_state.init_state(run.model, run.tx, config.seed, run.text_shape, run.mesh)
  batches = map(functools.partial(_to_devices, mesh=run.mesh), loop.read_batches(run, 0))
  batch = next(batches)

  start = time.perf_counter()
  step = loop.jit_step(run, state).lower(state, batch).compile()
  compile_s = time.perf_counter() - start

  def timed(next_batch) -> float:
    nonlocal state
    start = time.perf_counter()
    state, figures = step(state, next_batch())
    jax.block_until_ready(figures)
    return time.perf_counter() - start

  for _ in range(3):
    timed(lambda: batch)
  alone = statistics.median(timed(lambda: batch) for _ in range(STEPS.value))
  fed = statistics.median(timed(lambda: next(batches)) for _ in range(STEPS.value))
  cost, memory = step.cost_analysis(), step.memory_analysis()
  print(
    json.dumps(
      {
        'jax': jax.__version__,
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'batch_size': config.batch_size,
        'compile_s': round(compile_s, 2),
        'step_ms': round(1e3 * alone, 2),
        'steps_per_s': round(1 / alone, 2),
        'images_per_s': round(config.batch_size / alone, 1),
        'images_per_s_with_input': round(config.batch_size / fed, 1),
        'gflop_per_step': round(cost['flops'] / 1e9, 3),
        'temporaries_mb': round(memory.temp_size_in_bytes / 2**20, 1),
      },
      indent=2,
    )
  )


def _to_devices(batch: dict[str, np.ndarray], *, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """What the step takes of a batch; a run counts the rest on the host."""
  return pipeline.to_devices({name: rows for name, rows in batch.items() if name != 'bad_records'}, mesh)


if __name__ == '__main__':
  app.run(main)
