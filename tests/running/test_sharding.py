"""The mesh, the rules, and that devices change nothing."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from configs import groupvit_vitb16_gcc_yfcc, groupvit_vitl16_gcc_yfcc
from groupvit_jax.data import pipeline
from groupvit_jax.model.attention import Implementation
from groupvit_jax.model.build import build_model
from groupvit_jax.model.pixels import RandomErasing
from groupvit_jax.model.tpu_attention import TpuAttention
from groupvit_jax.model.vision import StageSpec
from groupvit_jax.running import sharding
from groupvit_jax.train import state as train_state
from groupvit_jax.train import step as train_step
from tests.agreement import assert_agree
from tests.tiny import tiny_model
from tests.weights import random_variables

TEXT_SHAPE = (3, 6)

# For programs that run once.
EFFORTLESS = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}


def random_batch(size: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  length = rng.integers(1, TEXT_SHAPE[1] + 1, (size, TEXT_SHAPE[0], 1))
  words = rng.integers(3, 20, (size, *TEXT_SHAPE), np.int32)
  return {
    'image': rng.integers(0, 256, (size, 16, 16, 3), np.uint8),
    'tokens': np.where(np.arange(TEXT_SHAPE[1]) < length - 1, words, np.int32(2)),
  }  # EOS, and CLIP's padding


def loss_and_grads_on(mesh: jax.sharding.Mesh, attention: Implementation = 'xla'):
  model = tiny_model(stages=(StageSpec(1, 4, 4), StageSpec(1, 0, 0))).with_attention(attention)
  state = train_state.TrainState.start(random_variables(model), (), jax.random.key(0))
  state = jax.device_put(state, sharding.state_shardings(state, mesh))
  batch = pipeline.to_devices(random_batch(32), mesh)
  step = (
    jax.jit(
      functools.partial(
        train_step.loss_and_grads,
        model=model,
        grad_accum_steps=1,
        text_budget=4,
        random_erasing=RandomErasing(0.5),
        batch_sharding=sharding.batch_sharding(mesh),
      )
    )
    .lower(state, batch)
    .compile(EFFORTLESS)
  )
  out, grads = step(state, batch)
  return jax.device_get((out.metrics.scalars['loss'], out.batch_stats, grads))


@functools.cache
def one_device():
  return loss_and_grads_on(sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.parametrize(
  'shape, kernel',
  [
    pytest.param(
      shape, kernel, marks=() if (shape, kernel) in (((2, 2, 2), False), ((2, 2, 2), True)) else pytest.mark.long
    )
    for shape in itertools.product((1, 2, 4, 8), repeat=3)
    for kernel in (False, True)
    if np.prod(shape) == 8
  ],
  ids=str,
)
def test_one_and_eight_devices_agree(shape, kernel):
  """Loss, gradients and BatchNorm statistics, noise included, are those of one device; with the TPU kernel as well."""
  axes = dict(zip(sharding.AXES, shape))
  mesh = sharding.make_mesh(**axes)
  with jax.default_matmul_precision('highest'):
    one, many = one_device(), loss_and_grads_on(mesh, TpuAttention(mesh, interpret=True) if kernel else 'xla')
  for a, b in zip(one, many, strict=True):
    assert_agree(a, b, 3e-5, axes)


def test_parameters_are_born_sharded():
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  state = train_state.init_state(tiny_model(), optax.adamw(1e-3), seed=0, text_shape=TEXT_SHAPE, mesh=mesh)
  kernel = state.params['vision']['stage0_block0']['attn']['qkv']['kernel']
  assert kernel.sharding.spec == PartitionSpec('fsdp', None, 'model')
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  moment = state.opt_state[0].mu['vision']['stage0_block0']['attn']['qkv']['kernel']
  assert moment.sharding == kernel.sharding


def test_every_large_kernel_has_a_rule():
  """No matrix falls through to the last rule, which replicates."""
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  shapes = jax.eval_shape(
    lambda: tiny_model().init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, *TEXT_SHAPE), jnp.int32))[
      'params'
    ]
  )
  places = sharding.state_shardings(shapes, mesh)
  replicated = [
    sharding.path_name(path)
    for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(places))
    if path[-1].key == 'kernel' and place.is_fully_replicated and 'mixer' not in sharding.path_name(path)
  ]
  assert replicated == ['vision/patch_embed/kernel']


def test_an_axis_that_does_not_divide_is_left_out():
  mesh = sharding.make_mesh(data=1, fsdp=8)
  place = sharding.state_shardings({'mlp': {'fc1': {'kernel': jnp.zeros((12, 16))}}}, mesh)
  assert place['mlp']['fc1']['kernel'].spec == PartitionSpec(None, None)


@pytest.mark.parametrize('axes', [{'data': 3}, {'fsdp': 3}, {'data': 0}, {'data': 8, 'model': 2}])
def test_mesh_that_does_not_cover_the_devices(axes):
  with pytest.raises(ValueError, match='does not cover 8 devices'):
    sharding.make_mesh(**axes)


@pytest.mark.parametrize('steps, nearest', [(0, 1), (5, 4), (-1, 1), (100, 12)])
def test_micro_batches_that_do_not_divide_a_devices_samples(steps, nearest):
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  with pytest.raises(ValueError, match=f'grad_accum_steps={steps} does not divide the 12 samples .* use {nearest}$'):
    sharding.check_micro_batches(48, steps, mesh)
  sharding.check_micro_batches(48, 6, mesh)


def test_batch_that_the_devices_do_not_divide():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match='batch_size=12 .* 8 devices .* use 8 or 16'):
    sharding.check_batch_size('batch_size', 12, mesh)
  sharding.check_batch_size('batch_size', 16, mesh)


@pytest.mark.parametrize('config, millions', [(groupvit_vitb16_gcc_yfcc, 165), (groupvit_vitl16_gcc_yfcc, 400)])
def test_sizes_beyond_the_papers_are_divided(config, millions):
  """Parameters and optimiser: a device of eight holds hardly more than an eighth."""
  config = config.get_config()
  mesh = sharding.make_mesh(**config.mesh)
  model = build_model(config.model, vocab_size=config.tokenizer.vocab_size, eos_id=1, multi_label=True)
  state = train_state.abstract_state(model, optax.adamw(1e-3), (4, 77), mesh)
  total = sum(leaf.size for leaf in jax.tree.leaves(state))
  local = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(state))
  assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) > millions * 1e6
  assert local < 1.05 * total / 8
