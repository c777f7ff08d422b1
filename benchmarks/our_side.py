"""Our side of the comparisons: GroupViT-S/16, its encoder and its whole training step, on one device."""

import argparse
from collections.abc import Callable
import functools
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from benchmarks import caption_lengths, processes
from configs import groupvit_vits16_gcc_yfcc
from groupvit_jax.aot.step import abstract_batch, matmul_flops
from groupvit_jax.eval import window_encoder
from groupvit_jax.interop import bundle, onnx, state_dicts
from groupvit_jax.interop.state_dicts import abstract_variables
from groupvit_jax.model.build import build_model
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import choose_attention
from groupvit_jax.train import optim
from groupvit_jax.train import state as train_state
from groupvit_jax.train.run import jit_step, Run

VOCAB, CONTEXT = 49_408, 77
# Size and number of the square matmuls that say what a machine can do.
SQUARES = {'cpu': (2048, 1), 'gpu': (8192, 10)}


class Step(NamedTuple):
  """A training step, the shapes of what it takes, and its optimizer."""

  jitted: Callable
  state: train_state.TrainState  # abstract
  batch: dict[str, jax.ShapeDtypeStruct]
  tx: optax.GradientTransformation


def paper_config(
  batch: int, dtype: str = 'float32', size: int = 224, remat: str = 'none', text_budget: int = 64
) -> ml_collections.ConfigDict:
  """The paper's experiment; everything is kept for the backward pass unless told otherwise."""
  config = groupvit_vits16_gcc_yfcc.get_config()
  config.batch_size, config.remat, config.text_budget = batch, remat, text_budget
  config.model.dtype, config.model.vision.image_size = dtype, (size, size)
  config.tokenizer.vocab_size = VOCAB
  return config


def make_model(config: ml_collections.ConfigDict, **options) -> ImageTextModel:
  """The model of a config; options are those of `build_model`."""
  return build_model(
    config.model,
    vocab_size=config.tokenizer.vocab_size,
    eos_id=1,
    multi_label=config.data.num_prompts > 0,
    **dict(remat=config.remat) | options,
  )


def make_step(config: ml_collections.ConfigDict, model: ImageTextModel, mesh: jax.sharding.Mesh) -> Step:
  """A config's training step."""
  schedule = optim.build_schedule(config.optim, config.total_steps, config.batch_size)
  run = Run(config, mesh, model, optim.build_optimizer(config.optim, schedule), schedule)
  state = train_state.abstract_state(model, run.tx, run.text_shape, mesh)
  return Step(jit_step(run, state), state, abstract_batch(run), run.tx)


def init_state(
  model: ImageTextModel, tx: optax.GradientTransformation, texts: tuple[int, int], mesh: jax.sharding.Mesh
) -> train_state.TrainState:
  """A random state, drawn on a CPU: compiling that for a GPU takes a minute."""
  plain = model.with_attention('xla')
  cpu = sharding.make_mesh(devices=jax.devices('cpu')[:1])
  state = train_state.init_state(plain, tx, 0, texts, cpu)
  return jax.device_put(state, sharding.state_shardings(state, mesh))


def draw_batch(step: Step, config: ml_collections.ConfigDict, seed: int = 0) -> dict[str, jax.Array]:
  """Random images with texts as long as CC12M's."""
  _, num_texts, length = step.batch['tokens'].shape
  tokens = caption_lengths.draw_tokens(config.batch_size, num_texts - 1, length, config.tokenizer.vocab_size, seed)
  batch = {'image': draw_images(*step.batch['image'].shape), 'tokens': tokens}
  return jax.device_put(batch, {name: leaf.sharding for name, leaf in step.batch.items()})


def draw_images(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def one_device() -> jax.sharding.Mesh:
  return sharding.make_mesh(devices=jax.devices()[:1])


def with_attention(
  model: ImageTextModel, batch: int, mesh: jax.sharding.Mesh, train: bool
) -> tuple[ImageTextModel, dict[str, str]]:
  """The model with the attention that is fastest here, and the choice for a report."""
  choice = choose_attention(model, mesh, train=train)
  model = model.with_attention(choice.implementation)
  return model, {'attention': str(choice.implementation), 'attention_reason': choice.reason}


def model_flops(work: str, batch: int, size: int) -> float:
  """FLOPs of the matmuls that the method needs, texts unpadded; a backward pass counts as two forward passes."""
  config = paper_config(1, size=size)
  model = make_model(config)
  variables = abstract_variables(model)
  count = lambda method, *shape: matmul_flops(
    jax.make_jaxpr(lambda variables, x: model.apply(variables, x, method=method))(
      variables, jax.ShapeDtypeStruct(shape, jnp.int32 if method == 'encode_text' else jnp.float32)
    ).jaxpr
  )
  if work != 'training':
    return batch * count({'encoding': 'encode_image', 'windows': 'encode_segments'}[work], 1, size, size, 3)
  # A text of n tokens costs a + b n + c n^2.
  a, b, c = np.linalg.solve(
    [[1, n, n * n] for n in (1, 2, CONTEXT)], [count('encode_text', 1, n) for n in (1, 2, CONTEXT)]
  )
  texts = 1 + config.data.num_prompts
  lengths = [caption_lengths.draw_lengths(batch, texts - 1, CONTEXT, seed) for seed in range(caption_lengths.BATCHES)]
  of_texts = np.mean([(a + b * n + c * n * n).sum() for n in lengths])
  logits = 2 * batch * batch * texts * config.model.embed_dim
  return float(3 * (batch * count('encode_image', 1, size, size, 3) + of_texts + logits))


class Work(NamedTuple):
  """Something to time, compiled."""

  facts: dict[str, object]
  dispatch: Callable[[], object]  # starts it once; returns what to wait for


def training(args: argparse.Namespace) -> Work:
  """A training step with the paper's whole recipe."""
  config = paper_config(args.batch, args.dtype, args.size, args.remat, args.text_budget)
  model, facts = with_attention(make_model(config), args.batch, one_device(), train=True)
  step = make_step(config, model, one_device())
  compiled, seconds = compile_timed(step.jitted, step.state, step.batch)
  state = init_state(model, step.tx, step.batch['tokens'].shape[1:], one_device())
  batches = itertools.cycle([draw_batch(step, config, seed) for seed in range(caption_lengths.BATCHES)])
  facts |= {
    'compile_s': seconds,
    'temporaries_mb': compiled.memory_analysis().temp_size_in_bytes / 2**20,
    'remat': args.remat,
    'text_budget': args.text_budget,
  }

  def dispatch() -> object:
    nonlocal state
    state, metrics = compiled(state, next(batches))
    return metrics

  return Work(facts, dispatch)


def encoder(args: argparse.Namespace) -> tuple[ImageTextModel | bundle.ExportedTowers, dict[str, str], dict]:
  """The model of 224-pixel images for inference, or its ONNX export, facts about it, and variables."""
  config = paper_config(args.batch, args.dtype)
  model, facts = with_attention(make_model(config), args.batch, one_device(), train=False)
  variables = init_state(model, optax.identity(), (1, CONTEXT), one_device()).variables
  if args.runtime is None:
    return model, facts, variables
  spec = state_dicts.ModelSpec(config.model, config.tokenizer.vocab_size, 1, config.data.num_prompts > 0)
  calls = bundle.open_onnx(onnx.export_towers(spec, variables, args.size, 'float32'), args.size, args.runtime)
  sizes = bundle.Sizes((224, 224), config.model.vision.patch_size, CONTEXT)
  return bundle.ExportedTowers(*calls, sizes, 0), {'runtime': args.runtime}, variables


def encoding(args: argparse.Namespace) -> Work:
  """The image encoder: images in, embeddings and assignments out."""
  model, facts, variables = encoder(args)
  images = jax.device_put(draw_images(args.batch, args.size, args.size, 3), sharding.batch_sharding(one_device()))
  compiled, seconds = compile_timed(jax.jit(functools.partial(model.apply, method='encode_pixels')), variables, images)
  return Work(facts | {'compile_s': seconds}, lambda: compiled(variables, images))


def windows(args: argparse.Namespace) -> Work:
  """The evaluator's pass over windows: pixels in; the segment of each pixel and embeddings of segments out."""
  model, facts, variables = encoder(args)
  inputs = draw_images(args.batch, args.size, args.size, 3), np.ones(args.batch, np.int32)
  inputs = jax.device_put(inputs, sharding.batch_sharding(one_device()))
  started = time.perf_counter()
  compiled = window_encoder.encode_windows.lower(variables, *inputs, model=model, mesh=one_device()).compile()
  facts['compile_s'] = time.perf_counter() - started
  return Work(facts, lambda: compiled(variables, *inputs))


def compile_timed(function: Callable, *args: object) -> tuple[jax.stages.Compiled, float]:
  """A jitted function compiled for arguments, and the seconds that took, tracing included."""
  started = time.perf_counter()
  return function.lower(*args).compile(), time.perf_counter() - started


def repeat(dispatch: Callable[[], object], times: int) -> None:
  """Dispatches several times; as in training and evaluation, one is waited for while the next one runs."""
  before = None
  for _ in range(times):
    running = dispatch()
    jax.block_until_ready(before)
    before = running
  jax.block_until_ready(before)


def matmul(dtype: str) -> Callable[[int], int]:
  """Work of square matmuls in one program, whatever the number of images."""
  size, count = SQUARES[jax.default_backend()]
  x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype)) * size**-0.5
  chain = jax.jit(lambda x: functools.reduce(jnp.matmul, [x] * (1 + count)))
  return lambda _: len([chain(x).block_until_ready()])


def matmul_flop() -> float:
  """FLOPs of `matmul`."""
  size, count = SQUARES[jax.default_backend()]
  return 2 * size**3 * count


def device_peak_mb() -> float:
  """The most memory that was in use: of the device, or of the process where that is the device's."""
  stats = jax.devices()[0].memory_stats()
  return stats['peak_bytes_in_use'] / 2**20 if stats else processes.process_peak_mb()


def main() -> None:
  """Serves rounds. Nothing runs, and so no temporaries are allocated, before the first is asked for."""
  parser = argparse.ArgumentParser()
  parser.add_argument('work', choices=('training', 'encoding', 'windows'))
  for name, kind in dict(batch=int, size=int, text_budget=int, device=str, dtype=str, remat=str).items():
    parser.add_argument(f'--{name}', type=kind, required=True)
  parser.add_argument('--runtime')
  args = parser.parse_args()
  jax.config.update('jax_platforms', {'cpu': 'cpu', 'gpu': 'cuda,cpu'}[args.device])
  jax.config.update('jax_enable_compilation_cache', False)
  work = {'training': training, 'encoding': encoding, 'windows': windows}[args.work](args)
  facts = work.facts | {'jax': jax.__version__, 'device': jax.devices()[0].device_kind, 'product_flop': matmul_flop()}

  def timed(images: int) -> int:
    started, steps = time.perf_counter(), -(-images // args.batch)
    if 'first_s' not in facts:
      repeat(work.dispatch, 1)
      facts['first_s'] = facts['compile_s'] + time.perf_counter() - started
    repeat(work.dispatch, steps)
    return steps * args.batch

  processes.serve(facts, {args.work: timed, 'multiply': matmul(args.dtype)}, device_peak_mb)


if __name__ == '__main__':
  main()
