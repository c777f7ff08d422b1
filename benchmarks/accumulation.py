"""Prints what micro-batches, rematerialisation and loops over blocks cost and save in a config's training step.

  python -m benchmarks.accumulation --config=configs/quickstart.py --config.batch_size=512
  python -m benchmarks.accumulation --config=configs/groupvit_vits16_gcc_yfcc.py --config.batch_size=512 --steps=10

Arithmetic is that of matrix products and convolutions, counted in the step as JAX traces it, because the compiler
counts the body of a loop once; memory is what the compiler plans. With --steps each variant is run as well, in turns,
on random pictures and on texts as long as those of CC12M.
"""

from collections.abc import Callable
import functools
import statistics
import time
from typing import NamedTuple

from absl import app, flags
import jax
import jax.numpy as jnp
import ml_collections
from ml_collections import config_flags
import numpy as np

from benchmarks import caption_lengths
from groupvit_jax.aot.flops import matmul_flops
from groupvit_jax.model.build import build_model, build_random_erasing
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.layers import Remat
from groupvit_jax.model.pixels import normalize_images
from groupvit_jax.model.text_packing import one_a_row
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import choose_attention
from groupvit_jax.train import optim
from groupvit_jax.train import state as train_state
from groupvit_jax.train import step as train_step


class Variant(NamedTuple):
  """Of a step."""

  micro_batches: int
  remat: Remat
  scan_layers: bool = False

  @classmethod
  def parse(cls, text: str) -> 'Variant':
    """'2:dots:loop' -> two micro-batches, what products give is kept, blocks are a loop."""
    steps, remat, *loop = text.split(':')
    return cls(int(steps), remat, loop == ['loop'])


CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment.')
STEPS = flags.DEFINE_integer('steps', 0, 'Timed steps of each variant; 0 runs none.')
VARIANTS = flags.DEFINE_list(
  'variants',
  ['1:none', '2:none', '8:none', '1:dots', '1:dots:loop', '1:blocks', '8:blocks'],
  'Micro-batches, policy, and `loop` for a loop over blocks.',
)
flags.mark_flag_as_required('config')


def main(_) -> None:
  """A table with a line per variant."""
  config = CONFIG.value
  mesh = sharding.make_mesh(**config.mesh)
  batch = _batch(config, mesh)
  forward = _forward_flops(config, batch)
  print(
    f'batch {config.batch_size} on {mesh.size} x {mesh.devices.flat[0].device_kind}, JAX {jax.__version__}; '
    f'one forward pass of the towers: {forward / 1e9:.2f} GFLOP\n'
  )
  variants, rows, base = list(map(Variant.parse, VARIANTS.value)), [], None
  compiled = []
  for variant in variants:
    step, state = _step(config, variant, mesh)
    flops = matmul_flops(jax.make_jaxpr(step)(state, batch).jaxpr)
    base = base or flops
    started = time.perf_counter()
    compiled.append(step.lower(state, batch).compile())
    seconds = time.perf_counter() - started
    temporaries = compiled[-1].memory_analysis().temp_size_in_bytes / 2**20
    rows.append(
      f'{variant.micro_batches} | {variant.remat} | {"loop" if variant.scan_layers else "unrolled"} | '
      f'{flops / 1e9:.2f} | {(flops - base) / forward:.2f} | {temporaries:,.0f} | {seconds:.0f}'
    )
  times = _time(compiled, config, mesh, batch) if STEPS.value else [''] * len(rows)
  print(
    '| micro-batches | remat | blocks | GFLOP a step | extra tower forwards | temporaries, MiB a device '
    '| compiled in, s | ms a step |\n|--:|:--|:--|--:|--:|--:|--:|--:|'
  )
  for row, found in zip(rows, times):
    print(f'| {row} | {found} |')


def _model(config: ml_collections.ConfigDict, variant: Variant | None = None) -> ImageTextModel:
  options = {} if variant is None else dict(remat=variant.remat, scan_layers=variant.scan_layers)
  return build_model(
    config.model, vocab_size=config.tokenizer.vocab_size, eos_id=1, multi_label=config.data.num_prompts > 0, **options
  )


def _batch(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  size, context = (config.batch_size, *config.model.vision.image_size, 3), config.model.text.context_length
  images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
  tokens = caption_lengths.draw_tokens(config.batch_size, config.data.num_prompts, context, config.tokenizer.vocab_size)
  return jax.device_put({'image': images, 'tokens': tokens}, sharding.batch_sharding(mesh))


def _forward_flops(config: ml_collections.ConfigDict, batch: dict[str, jax.Array]) -> int:
  """Of both towers on padded texts, without gradients."""
  model, texts = _model(config), batch['tokens'].reshape(-1, batch['tokens'].shape[-1])
  apply = lambda params: (
    model.apply({'params': params}, normalize_images(batch['image']), method='vision_features'),
    model.apply({'params': params}, one_a_row(texts, 1), method='text_features'),
  )
  one = lambda name, dtype: jnp.zeros((1, *batch[name].shape[1:]), dtype)
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), one('image', jnp.float32), one('tokens', jnp.int32)))
  return matmul_flops(jax.make_jaxpr(apply)(shapes['params']).jaxpr)


def _optimizer(config: ml_collections.ConfigDict):
  return optim.build_optimizer(config.optim, optim.build_schedule(config.optim, config.total_steps, config.batch_size))


def _step(
  config: ml_collections.ConfigDict, variant: Variant, mesh: jax.sharding.Mesh
) -> tuple[Callable, train_state.TrainState]:
  """A training step with the attention that suits the hardware, and the shapes of its state."""
  model, tx = _model(config, variant), _optimizer(config)
  choice = choose_attention(model.vision, config.batch_size // variant.micro_batches, mesh, train=True)
  model = model.clone(vision=model.vision.clone(attention=choice.implementation))
  text_shape = 1 + config.data.num_prompts, config.model.text.context_length
  state = train_state.abstract_state(model, tx, text_shape, mesh)
  step = functools.partial(
    train_step.train_step,
    model=model,
    tx=tx,
    multi_label_weight=config.multi_label_weight,
    grad_accum_steps=variant.micro_batches,
    text_budget=config.text_budget,
    random_erasing=build_random_erasing(config.data.augment),
    place=sharding.batch_sharding(mesh),
  )
  places = jax.tree.map(lambda leaf: leaf.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(places, None)), state


def _time(
  compiled: list[jax.stages.Compiled],
  config: ml_collections.ConfigDict,
  mesh: jax.sharding.Mesh,
  batch: dict[str, jax.Array],
) -> list[str]:
  """Medians in ms, each with the range of its rounds; variants take turns."""
  # Variables are drawn on a CPU: compiling that for a GPU takes a minute.
  cpu = sharding.make_mesh(devices=jax.devices('cpu')[:1])
  text_shape = 1 + config.data.num_prompts, config.model.text.context_length
  state = train_state.init_state(_model(config), _optimizer(config), 0, text_shape, cpu)
  state = jax.device_put(state, sharding.state_shardings(state, mesh))
  found = [[] for _ in compiled]
  for step in range(1 + STEPS.value):  # the first of each warms it up
    for number, run in enumerate(compiled):
      started = time.perf_counter()
      state, figures = run(state, batch)
      jax.block_until_ready(figures)
      found[number] += [time.perf_counter() - started] if step else []
  ms = lambda seconds: f'{1e3 * seconds:.1f}'
  return [f'{ms(statistics.median(times))} ({ms(min(times))} to {ms(max(times))})' for times in found]


if __name__ == '__main__':
  app.run(main)
