"""Compiles a config's training step, exactly as a run would, for absent chips."""

import math
import re
import time
from typing import NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import ml_collections

from groupvit_jax import config_entries
from groupvit_jax.aot.chips import Topology
from groupvit_jax.aot.program import read_traffic, Traffic
from groupvit_jax.data.tokenizer import build_tokenizer
from groupvit_jax.model.build import build_model
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import choose_attention
from groupvit_jax.train import optim
from groupvit_jax.train import state as train_state
from groupvit_jax.train.run import jit_step, Run


class Memory(NamedTuple):
  """Bytes of a device's main memory during a step."""

  arguments: int  # state and batch; the new state takes the place of the old one
  results: int  # beside those that take the place of arguments
  temporaries: int
  code: int

  @property
  def together(self) -> int:
    return sum(self)


class State(NamedTuple):
  """Bytes of parameters, statistics and optimiser."""

  whole: int
  of_a_device: int


class CompiledStep(NamedTuple):
  """A step as its compiler sees it."""

  memory: Memory | None  # None: the compiler found no way to fit it in
  wanted_bytes: float  # of a device's main memory
  traffic: Traffic | None  # of a device; None also where this jaxlib cannot read libtpu's program
  flops: float  # of all devices
  compile_s: float
  compile_cpu_s: float  # of all processors together
  rows: int  # samples of a device
  state: State


def compile_step(config: ml_collections.ConfigDict, topology: Topology) -> CompiledStep:
  """Compiles a step for a topology.

  Args:
    config: the experiment.
    topology: what to compile for.

  Returns:
    What the compiler says, and what its program shows.

  Raises:
    ValueError: the config has a mistake, or does not fit the number of devices.
  """
  config_entries.check(config)
  mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
  sharding.check_batch_size('batch_size', config.batch_size, mesh)
  sharding.check_micro_batches(config.batch_size, config.grad_accum_steps, mesh)
  schedule = optim.build_schedule(config.optim, config.total_steps, config.batch_size)
  # A tokenizer that is yet to be trained has at most this many pieces.
  path = config.tokenizer.path
  vocab_size = build_tokenizer(path).vocab_size if path else config.tokenizer.vocab_size
  model = build_model(
    config.model, vocab_size=vocab_size, eos_id=1, multi_label=config.data.num_prompts > 0, remat=config.remat
  )
  choice = choose_attention(model, mesh, train=True, absent=True)
  model = model.with_attention(choice.implementation)
  tx = optim.build_optimizer(config.optim, schedule, config.freeze)
  run = Run(config, mesh, model, tx, schedule)
  state = train_state.abstract_state(model, tx, run.text_shape, mesh, run.averages)
  step = jit_step(run, state)
  batch = abstract_batch(run)
  flops = matmul_flops(jax.make_jaxpr(step)(state, batch).jaxpr)
  rows = config.batch_size // sharding.data_parallel_size(mesh)
  started = time.perf_counter(), time.process_time()
  taken = lambda: (time.perf_counter() - started[0], time.process_time() - started[1])
  try:
    compiled = step.lower(state, batch).compile()
  except jax.errors.JaxRuntimeError as error:
    wanted = re.search(r'Used ([\d.]+)([KMGT]) of', str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or not wanted:
      raise
    size = float(wanted[1]) * 2 ** (10 * (1 + 'KMGT'.index(wanted[2])))
    return CompiledStep(None, size, None, flops, *taken(), rows, _size(state))
  seconds = taken()
  found = compiled.memory_analysis()
  memory = Memory(
    found.argument_size_in_bytes,
    found.output_size_in_bytes - found.alias_size_in_bytes,
    found.temp_size_in_bytes,
    found.generated_code_size_in_bytes,
  )
  try:
    traffic = read_traffic(compiled.as_text())
  except jax.errors.JaxRuntimeError:  # it has operations that jaxlib's version of XLA does not know
    traffic = None
  return CompiledStep(memory, memory.together, traffic, flops, *seconds, rows, _size(state))


def _size(state: train_state.TrainState) -> State:
  leaves = jax.tree.leaves(state)
  of_a_device = (math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
  return State(sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), sum(of_a_device))


def abstract_batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of what a step reads."""
  place, size = sharding.batch_sharding(run.mesh), run.config.batch_size
  image_shape = (size, *run.config.model.vision.image_size, 3)
  prompts, words = run.config.data.num_prompts, {}
  if prompts and run.config.multi_label_loss != 'pooled':
    words = {'words': jax.ShapeDtypeStruct((size, prompts, 2), jnp.int32, sharding=place)}
  return words | {
    'image': jax.ShapeDtypeStruct(image_shape, jnp.uint8, sharding=place),
    'tokens': jax.ShapeDtypeStruct((size, *run.text_shape), jnp.int32, sharding=place),
  }


def matmul_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
  """Floating-point operations of matmuls and convolutions, loops counted as often as they run."""
  total = 0
  for eqn in jaxpr.eqns:
    shapes = [var.aval.shape for var in eqn.invars]
    out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      total += 2 * out * math.prod(shapes[0][axis] for axis in contracted)
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel_out = shapes[1][eqn.params['dimension_numbers'].rhs_spec[0]]
      total += 2 * out * math.prod(shapes[1]) // kernel_out
    inner = [
      getattr(x, 'jaxpr', x)
      for x in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))
    ]
    counts = [matmul_flops(x) for x in inner if hasattr(x, 'eqns')]
    # Of a conditional's branches one is run: they differ by platform here, and compute the same.
    total += max(counts, default=0) if eqn.primitive.name == 'cond' else _times(eqn) * sum(counts)
  return total


def _times(eqn: jax.extend.core.JaxprEqn) -> int:
  """How often an operation runs what it contains, all devices together."""
  if eqn.primitive.name == 'shard_map':
    return eqn.params['mesh'].size
  return eqn.params['length'] if eqn.primitive.name == 'scan' else 1
