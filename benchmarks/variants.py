"""Arithmetic, memory and time of a config's training step by micro-batches, rematerialisation and loops over blocks.

  python -m benchmarks variants --config=configs/quickstart.py --config.batch_size=512 --steps=10

Arithmetic is that of matmuls and convolutions, counted in the step as JAX traces it, because the compiler counts the
body of a loop once; memory is what the compiler plans. With --steps each variant is run as well, in turns, on random
images and on texts as long as those of CC12M.
"""

import statistics
import time

from absl import app, flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags

from benchmarks import our_side
from groupvit_jax.aot.flops import matmul_flops
from groupvit_jax.interop.state_dicts import abstract_variables
from groupvit_jax.model.text_packing import one_a_row
from groupvit_jax.running import sharding

CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment.')
STEPS = flags.DEFINE_integer('steps', 0, 'Timed steps of each variant; 0 runs none.')
VARIANTS = flags.DEFINE_list(
  'variants',
  ['1:none', '2:none', '8:none', '1:dots', '1:dots:loop', '1:blocks', '8:blocks'],
  'Micro-batches, policy, and `loop` for a loop over blocks.',
)


def main() -> None:
  flags.mark_flag_as_required('config')
  app.run(_measure)


def _measure(_) -> None:
  """Prints a table with a row per variant."""
  config = CONFIG.value
  mesh = sharding.make_mesh(**config.mesh)
  forward, base, rows, compiled = None, None, [], []
  for text in VARIANTS.value:
    config.grad_accum_steps, config.remat, loop = int(text.split(':')[0]), text.split(':')[1], text.endswith(':loop')
    model = our_side.make_model(config, scan_layers=loop)
    model, _ = our_side.with_attention(model, config.batch_size // config.grad_accum_steps, mesh, train=True)
    step = our_side.make_step(config, model, mesh)
    flops = matmul_flops(jax.make_jaxpr(step.jitted)(step.state, step.batch).jaxpr)
    if base is None:
      forward, base = _forward_flops(config, step), flops
      print(
        f'batch {config.batch_size} on {mesh.size} x {mesh.devices.flat[0].device_kind}, JAX {jax.__version__}; '
        f'one forward pass of the towers: {forward / 1e9:.2f} GFLOP\n'
      )
    program, seconds = our_side.compile_timed(step.jitted, step.state, step.batch)
    compiled.append(program)
    temporaries = program.memory_analysis().temp_size_in_bytes / 2**20
    rows.append(
      f'{config.grad_accum_steps} | {config.remat} | {"loop" if loop else "unrolled"} | {flops / 1e9:.2f} | '
      f'{(flops - base) / forward:.2f} | {temporaries:,.0f} | {seconds:.0f}'
    )
  times = _time(compiled, config, step, mesh) if STEPS.value else [''] * len(rows)
  print(
    '| micro-batches | remat | blocks | GFLOP a step | extra tower forwards | temporaries, MiB a device '
    '| compiled in, s | ms a step |\n|--:|:--|:--|--:|--:|--:|--:|--:|'
  )
  for row, found in zip(rows, times, strict=True):
    print(f'| {row} | {found} |')


def _forward_flops(config, step: our_side.Step) -> int:
  """FLOPs of both towers on padded texts, without gradients."""
  model, (batch, texts, length) = our_side.make_model(config), step.batch['tokens'].shape
  images = jax.ShapeDtypeStruct(step.batch['image'].shape, jnp.float32)
  tokens = jax.ShapeDtypeStruct((batch * texts, length), jnp.int32)
  apply = lambda params, images, tokens: (
    model.apply({'params': params}, images, method='vision_features'),
    model.apply({'params': params}, one_a_row(tokens, 1), method='text_features'),
  )
  return matmul_flops(jax.make_jaxpr(apply)(abstract_variables(model)['params'], images, tokens).jaxpr)


def _time(compiled: list[jax.stages.Compiled], config, step: our_side.Step, mesh: jax.sharding.Mesh) -> list[str]:
  """Medians in ms, each with the range of its rounds; variants take turns."""
  state = our_side.init_state(our_side.make_model(config), step.tx, step.batch['tokens'].shape[1:], mesh)
  batch, found = our_side.draw_batch(step, config), [[] for _ in compiled]
  for number in range(1 + STEPS.value):  # the first of each warms it up
    for times, run in zip(found, compiled, strict=True):
      started = time.perf_counter()
      state, metrics = run(state, batch)
      jax.block_until_ready(metrics)
      times += [1e3 * (time.perf_counter() - started)] * (number > 0)
  return [f'{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})' for times in found]
