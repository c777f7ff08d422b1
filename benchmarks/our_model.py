"""Our side of benchmarks/train_step.py and benchmarks/inference.py: GroupViT-S/16 with the paper's whole recipe."""

import argparse
import functools
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from benchmarks import caption_lengths, rounds
from configs import groupvit_vits16_gcc_yfcc
from groupvit_jax import optim, sharding, train_state, train_step
from groupvit_jax.freed_memory import keep_freed_memory
from groupvit_jax.models.build import build_model
from groupvit_jax.random_erasing import build_random_erasing

VOCAB, CONTEXT = 49_408, 77
PEAK_SIZE = 2048


def make_config(batch: int, dtype: str, text_budget: int) -> ml_collections.ConfigDict:
  """The paper's experiment, everything kept for the backward pass."""
  config = groupvit_vits16_gcc_yfcc.get_config()
  config.batch_size, config.remat, config.text_budget = batch, 'none', text_budget
  config.model.dtype = dtype
  return config


def make_step(config: ml_collections.ConfigDict) -> tuple[Callable, train_state.TrainState, dict[str, jax.Array]]:
  """The training step, not compiled, with what it takes: a state and a batch."""
  prompts, mesh = config.data.num_prompts, sharding.make_mesh(devices=jax.devices()[:1])
  tx = optim.build_optimizer(
      config.optim, optim.build_schedule(config.optim, config.total_steps, config.batch_size))
  model = build_model(config.model, vocab_size=VOCAB, eos_id=1, multi_label=prompts > 0, remat=config.remat)
  step = functools.partial(
      train_step.train_step, model=model, tx=tx, multi_label_weight=config.multi_label_weight,
      grad_accum_steps=config.grad_accum_steps, text_budget=config.text_budget,
      random_erasing=build_random_erasing(config.data.augment), place=sharding.batch_sharding(mesh))
  state = train_state.init_state(model, tx, 0, (1 + prompts, CONTEXT), mesh)
  batch = {
      'image': np.random.default_rng(0).integers(
          0, 256, (config.batch_size, *config.model.vision.image_size, 3), np.uint8),
      'tokens': caption_lengths.draw_tokens(config.batch_size, prompts, CONTEXT, VOCAB)}
  return jax.jit(step, donate_argnums=0), state, jax.device_put(batch, sharding.batch_sharding(mesh))


def train(args: argparse.Namespace) -> tuple[dict[str, object], Callable[[], None]]:
  """Compiles the step; returns facts and what runs it once."""
  step, state, batch = make_step(make_config(args.batch, args.dtype, args.text_budget))
  started = time.perf_counter()
  compiled = step.lower(state, batch).compile()
  facts = {'compile_s': time.perf_counter() - started,
           'temporaries_mb': compiled.memory_analysis().temp_size_in_bytes / 2**20}

  def run() -> None:
    nonlocal state
    state, figures = compiled(state, batch)
    jax.block_until_ready(figures)
  return facts, run


def encode(args: argparse.Namespace) -> tuple[dict[str, object], Callable[[], None]]:
  """Compiles the image encoder; returns facts and what runs it once."""
  config = make_config(args.batch, args.dtype, args.text_budget).model
  model = build_model(config, vocab_size=VOCAB, eos_id=1, multi_label=True)
  images = jnp.asarray(np.random.default_rng(0).standard_normal((args.batch, args.size, args.size, 3), np.float32))
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 1, CONTEXT), int))
  started = time.perf_counter()
  apply = jax.jit(functools.partial(model.apply, method='encode_image')).lower(variables, images).compile()
  facts = {'compile_s': time.perf_counter() - started}
  return facts, lambda: jax.block_until_ready(apply(variables, images))


def multiply() -> Callable[[], None]:
  """A square product of 2 * PEAK_SIZE^3 FLOPs: what the machine can do."""
  x = jax.random.normal(jax.random.key(0), (PEAK_SIZE, PEAK_SIZE))
  product = jax.jit(lambda x: x @ x)
  return lambda: product(x).block_until_ready()


def main() -> None:
  """Serves rounds."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('work', choices=('train', 'encode'))
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('--size', type=int, default=224)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--text_budget', type=int, default=80)
  args = parser.parse_args()
  jax.config.update('jax_enable_compilation_cache', False)
  if jax.default_backend() == 'cpu':
    keep_freed_memory()  # as train.py and eval.py do
  facts, run = {'train': train, 'encode': encode}[args.work](args)
  product = multiply()

  def times(work: Callable[[], None], pictures: int) -> int:
    work()
    return pictures
  rounds.serve(
      facts | {'jax': jax.__version__, 'device': jax.devices()[0].device_kind, 'cores': os.cpu_count()},
      {args.work: lambda _: times(run, args.batch), 'multiply': lambda _: times(product, 1)})


if __name__ == '__main__':
  main()
