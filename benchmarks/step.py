"""Time of a config's training step, alone and fed by its input pipeline.

python -m benchmarks step --config=configs/quickstart.py
"""

import statistics
import tempfile
import time

from absl import app, flags
import jax
from ml_collections import config_flags

from benchmarks import our_side, processes
from groupvit_jax.data import pipeline
from groupvit_jax.train import run as run_lib
from groupvit_jax.train import state as train_state

CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment.')
STEPS = flags.DEFINE_integer('steps', 50, 'Timed steps.')


def main() -> None:
  flags.mark_flag_as_required('config')
  app.run(_measure)


def _measure(_) -> None:
  config = CONFIG.value
  with tempfile.TemporaryDirectory() as workdir:
    run = run_lib.set_up(config, workdir)
  state = train_state.init_state(run.model, run.tx, config.seed, run.text_shape, run.mesh)
  batches = (
    pipeline.to_devices({name: rows for name, rows in batch.items() if name != 'bad_records'}, run.mesh)
    for batch in run_lib.read_batches(run, 0)
  )
  batch = next(batches)
  step, compile_s = our_side.compile_timed(run_lib.jit_step(run, state), state, batch)

  def timed(next_batch) -> float:
    nonlocal state
    start = time.perf_counter()
    state, metrics = step(state, next_batch())
    jax.block_until_ready(metrics)
    return time.perf_counter() - start

  for _ in range(3):
    timed(lambda: batch)
  alone = statistics.median(timed(lambda: batch) for _ in range(STEPS.value))
  fed = statistics.median(timed(lambda: next(batches)) for _ in range(STEPS.value))
  processes.write(
    {
      'jax': jax.__version__,
      'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
      'batch_size': config.batch_size,
      'compile_s': round(compile_s, 2),
      'step_ms': round(1e3 * alone, 2),
      'steps_per_s': round(1 / alone, 2),
      'images_per_s': round(config.batch_size / alone, 1),
      'images_per_s_with_input': round(config.batch_size / fed, 1),
      'gflop_per_step': round(step.cost_analysis()['flops'] / 1e9, 3),
      'temporaries_mb': round(step.memory_analysis().temp_size_in_bytes / 2**20, 1),
    }
  )
