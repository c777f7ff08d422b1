"""Our side of the speed benchmarks: GroupViT-S/16, its training step with the paper's whole recipe."""

import argparse
from collections.abc import Callable
import functools
import itertools
import pathlib
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from benchmarks import caption_lengths, rounds
from configs import groupvit_vits16_gcc_yfcc
from groupvit_jax.eval import window_encoder
from groupvit_jax.model.build import build_model, build_random_erasing
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.pixels import normalize_images
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import choose_attention
from groupvit_jax.train import optim
from groupvit_jax.train import state as train_state
from groupvit_jax.train import step as train_step

VOCAB, CONTEXT = 49_408, 77
TRACED_STEPS = 3


class Square(NamedTuple):
  """Products that say what a machine can do."""

  size: int
  products: int  # one after the other, in one program

  @property
  def flops(self) -> float:
    return 2 * self.size**3 * self.products


SQUARES = {'cpu': Square(2048, 1), 'gpu': Square(8192, 10)}


class Work(NamedTuple):
  """Something to time, compiled."""

  facts: dict[str, object]
  dispatch: Callable[[], object]  # starts it once; returns what to wait for
  compiled: jax.stages.Compiled


def make_config(
  batch: int, dtype: str, text_budget: int, size: int = 224, remat: str = 'none'
) -> ml_collections.ConfigDict:
  """The paper's experiment, everything kept for the backward pass unless told otherwise."""
  config = groupvit_vits16_gcc_yfcc.get_config()
  config.batch_size, config.remat, config.text_budget = batch, remat, text_budget
  config.model.dtype, config.model.vision.image_size = dtype, (size, size)
  return config


def build_step(
  config: ml_collections.ConfigDict, model: ImageTextModel
) -> tuple[Callable, optax.GradientTransformation]:
  """The training step, not compiled, and its optimiser."""
  tx = optim.build_optimizer(config.optim, optim.build_schedule(config.optim, config.total_steps, config.batch_size))
  step = functools.partial(
    train_step.train_step,
    model=model,
    tx=tx,
    multi_label_weight=config.multi_label_weight,
    grad_accum_steps=config.grad_accum_steps,
    text_budget=config.text_budget,
    random_erasing=build_random_erasing(config.data.augment),
    place=sharding.batch_sharding(one_device()),
  )
  return jax.jit(step, donate_argnums=0), tx


def abstract_step(
  config: ml_collections.ConfigDict, model: ImageTextModel
) -> tuple[Callable, train_state.TrainState, dict[str, jax.ShapeDtypeStruct]]:
  """The training step, and the shapes of what it takes: a state and a batch."""
  step, tx = build_step(config, model)
  texts = 1 + config.data.num_prompts, CONTEXT
  array = lambda *shape, dtype: jax.ShapeDtypeStruct(
    (config.batch_size, *shape), dtype, sharding=sharding.batch_sharding(one_device())
  )
  return (
    step,
    train_state.abstract_state(model, tx, texts, one_device()),
    {'image': array(*config.model.vision.image_size, 3, dtype=jnp.uint8), 'tokens': array(*texts, dtype=jnp.int32)},
  )


def make_step(
  config: ml_collections.ConfigDict, model: ImageTextModel
) -> tuple[Callable, train_state.TrainState, list[dict[str, jax.Array]]]:
  """The training step with a state and batches, whose texts differ."""
  prompts, place = config.data.num_prompts, sharding.batch_sharding(one_device())
  step, tx = build_step(config, model)
  state = train_state.init_state(plain(model), tx, 0, (1 + prompts, CONTEXT), a_cpu())
  images = jax.device_put(draw_images(config.batch_size, *config.model.vision.image_size), place)
  batches = [
    {
      'image': images,
      'tokens': jax.device_put(caption_lengths.draw_tokens(config.batch_size, prompts, CONTEXT, VOCAB, seed), place),
    }
    for seed in range(caption_lengths.BATCHES)
  ]
  return step, jax.device_put(state, sharding.replicated(one_device())), batches


def one_device() -> jax.sharding.Mesh:
  """The comparison is of one device."""
  return sharding.make_mesh(devices=jax.devices()[:1])


def a_cpu() -> jax.sharding.Mesh:
  """Where variables are drawn: compiling that for a GPU takes a minute."""
  return sharding.make_mesh(devices=jax.devices('cpu')[:1])


def plain(model: ImageTextModel) -> ImageTextModel:
  """The same model for any device."""
  return model.clone(vision=model.vision.clone(attention='xla'))


def draw_images(batch: int, height: int, width: int) -> np.ndarray:
  """Pixels uint8 [batch, height, width, 3]."""
  return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)


def make_model(args: argparse.Namespace, size: int) -> tuple[ImageTextModel, dict[str, object]]:
  """The model with the attention that is fastest here, and facts about it."""
  config = make_config(args.batch, args.dtype, args.text_budget, size, args.remat)
  model = build_model(config.model, vocab_size=VOCAB, eos_id=1, multi_label=True, remat=config.remat)
  choice = choose_attention(model.vision, args.batch, one_device(), train=args.work == 'train')
  model = model.clone(vision=model.vision.clone(attention=choice.implementation))
  return model, {'attention': choice.implementation, 'attention_reason': choice.reason}


def train(args: argparse.Namespace) -> Work:
  """Compiles the step."""
  model, facts = make_model(args, args.size)
  config = make_config(args.batch, args.dtype, args.text_budget, args.size, args.remat)
  step, state, batches = make_step(config, model)
  compiled, seconds = compile_timed(step, state, batches[0])
  batches = itertools.cycle(batches)
  facts |= {
    'compile_s': seconds,
    'temporaries_mb': compiled.memory_analysis().temp_size_in_bytes / 2**20,
    'remat': args.remat,
    'text_budget': args.text_budget,
  }

  def dispatch() -> object:
    nonlocal state
    state, figures = compiled(state, next(batches))
    return figures

  return Work(facts, dispatch, compiled)


def encode(args: argparse.Namespace) -> Work:
  """Compiles the image encoder: pictures in, embeddings out."""
  model, facts = make_model(args, 224)
  variables = init_variables(model)
  images = jax.device_put(
    normalize_images(draw_images(args.batch, args.size, args.size)), sharding.batch_sharding(one_device())
  )
  compiled, seconds = compile_timed(jax.jit(functools.partial(model.apply, method='encode_image')), variables, images)
  return Work(facts | {'compile_s': seconds}, lambda: compiled(variables, images), compiled)


def windows(args: argparse.Namespace) -> Work:
  """Compiles the evaluator's pass over windows: pixels in; the segment of each pixel and embeddings of segments out."""
  model, facts = make_model(args, 224)
  place = sharding.batch_sharding(one_device())
  variables = init_variables(model)
  pixels, mask = jax.device_put((draw_images(args.batch, args.size, args.size), np.ones(args.batch, np.int32)), place)
  encode_windows = functools.partial(window_encoder.encode_windows.lower, model=model, mesh=one_device())
  started = time.perf_counter()
  compiled = encode_windows(variables, pixels, mask).compile()
  facts |= {'compile_s': time.perf_counter() - started}
  return Work(facts, lambda: compiled(variables, pixels, mask), compiled)


def compile_timed(function: Callable, *args: object) -> tuple[jax.stages.Compiled, float]:
  """A jitted function compiled for arguments, and the seconds that took, tracing included."""
  started = time.perf_counter()
  return function.lower(*args).compile(), time.perf_counter() - started


def init_variables(model: ImageTextModel) -> dict[str, object]:
  """Random ones, on the device."""
  variables = train_state.init_state(plain(model), optax.identity(), 0, (1, CONTEXT), a_cpu()).variables
  return jax.device_put(variables, sharding.replicated(one_device()))


def repeat(dispatch: Callable[[], object], times: int) -> None:
  """Does some work several times. As in training and evaluation, one is waited for while the next one runs."""
  before = None
  for _ in range(times):
    running = dispatch()
    jax.block_until_ready(before)
    before = running
  jax.block_until_ready(before)


def multiply(dtype: str = 'float32') -> Callable[[], None]:
  """A square product, or several, of `SQUARES`: what the machine can do."""
  square = SQUARES[jax.default_backend()]
  x = jax.random.normal(jax.random.key(0), (square.size, square.size), jnp.dtype(dtype)) * square.size**-0.5
  chain = jax.jit(lambda x: functools.reduce(jnp.matmul, [x] * (1 + square.products)))
  return lambda: chain(x).block_until_ready()


def profile(work: Work, folder: str) -> None:
  """Writes a trace of a few steps, and the program whose operations it names, for benchmarks/trace_summary.py."""
  repeat(work.dispatch, 2)
  with jax.profiler.trace(folder, create_perfetto_trace=True):
    repeat(work.dispatch, TRACED_STEPS)
  (pathlib.Path(folder) / 'program.txt').write_text(work.compiled.as_text(), encoding='utf-8')


def device_peak_mb() -> float:
  """The most memory that was in use: of the device, or of the process where that is the device's."""
  stats = jax.devices()[0].memory_stats()
  return stats['peak_bytes_in_use'] / 2**20 if stats else rounds.process_peak_mb()


def parse() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('work', choices=('train', 'encode', 'windows'))
  parser.add_argument('--batch', type=int, required=True)
  parser.add_argument('--size', type=int, default=224)
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--remat', choices=('none', 'dots', 'blocks'), default='none')
  parser.add_argument('--text_budget', type=int, default=64)
  parser.add_argument('--hold', action='store_true', help='Wait for a line before the first step, which takes memory.')
  parser.add_argument('--trace', help='Folder for a profile of a few steps, and for the program.')
  return parser.parse_args()


def main() -> None:
  """Serves rounds."""
  args = parse()
  jax.config.update('jax_platforms', {'cpu': 'cpu', 'gpu': 'cuda,cpu'}[args.device])
  jax.config.update('jax_enable_compilation_cache', False)
  work = {'train': train, 'encode': encode, 'windows': windows}[args.work](args)
  if args.hold:
    sys.stdin.readline()
  started = time.perf_counter()
  repeat(work.dispatch, 1)
  first = work.facts['compile_s'] + time.perf_counter() - started
  if args.trace:
    profile(work, args.trace)
  product = multiply(args.dtype)

  def multiplied(_: int) -> int:
    product()
    return 1

  def timed(pictures: int) -> int:
    steps = -(-pictures // args.batch)
    repeat(work.dispatch, steps)
    return steps * args.batch

  device, square = jax.devices()[0], SQUARES[args.device]
  rounds.serve(
    work.facts | {'first_s': first, 'jax': jax.__version__, 'device': device.device_kind, 'product_flop': square.flops},
    {args.work: timed, 'multiply': multiplied},
    device_peak_mb,
  )


if __name__ == '__main__':
  main()
