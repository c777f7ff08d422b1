"""What a training step costs, without a clock: nothing here depends on how busy the machine is.

Recorded values are of `tests.tiny.tiny_config` on eight CPU devices. A change that is meant to cost more, or saves,
records new ones: the failing test prints them.
"""

import functools
import json
import logging
import types
from typing import NamedTuple
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import caption_lengths, our_model
from groupvit_jax import packed_texts, sharding, train_loop, train_state, train_step
from groupvit_jax.models.build import build_model
from groupvit_jax.models.text_rows import pack
from tests.tiny import tiny_config

# Of one device's program: floating-point operations, bytes read and written, bytes of temporaries.
RECORDED = {'flops': 18.65e6, 'bytes accessed': 17.73e6, 'temporaries': 1_118_576}
TOLERANCE = 0.15  # versions of the compiler differ by less


class Program(NamedTuple):
  """The step, before and after the compiler."""

  lowered: jax.stages.Lowered
  compiled: jax.stages.Compiled


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
  """A run of six steps with a profile: what was compiled, fetched and donated."""
  found = {'fetches': 0, 'donated': [], 'compilations': []}
  config, workdir = tiny_config(), tmp_path_factory.mktemp('watched')
  config.profile, config.log_every, config.checkpoint.every_steps, config.eval.every_steps = True, 3, 100, 100
  jit_step, device_get = train_loop.jit_step, jax.device_get

  def watch(step):
    def call(state, batch):
      with jax.transfer_guard('disallow'):  # whatever is not asked for: a number that becomes an array, say
        after = step(state, batch)
      found['donated'].append(all(leaf.is_deleted() for leaf in jax.tree.leaves(state)))
      return after
    return call

  def watched_jit_step(run, state):
    step, found['run'] = jit_step(run, state), run
    lower = lambda *args: types.SimpleNamespace(compile=lambda: watch(step.lower(*args).compile()))
    return types.SimpleNamespace(lower=lower)

  def counted_device_get(tree):
    found['fetches'] += isinstance(tree, train_step.Figures)
    return device_get(tree)

  compiler = logging.getLogger('jax._src.interpreters.pxla')
  count = lambda record: found['compilations'].append(record.getMessage().split(' with ')[0]) or True
  compiler.addFilter(count)
  with pytest.MonkeyPatch.context() as patch, jax.log_compiles():
    patch.setattr(train_loop, 'jit_step', watched_jit_step)
    patch.setattr(train_loop.jax, 'device_get', counted_device_get)
    assert train_loop.train(config, workdir) == 0
  compiler.removeFilter(count)
  found['workdir'] = workdir
  return found


@pytest.fixture(scope='module')
def program(watched) -> Program:
  """The compiled step of that run, every warning an error: XLA warns of donated buffers that it cannot use."""
  run = watched['run']
  state = train_state.abstract_state(run.model, run.tx, run.text_shape, run.mesh)
  place = sharding.batch_sharding(run.mesh)
  batch = {'image': ((32, 32, 3), jnp.uint8), 'tokens': (run.text_shape, jnp.int32)}
  batch = {name: jax.ShapeDtypeStruct((8, *shape), dtype, sharding=place) for name, (shape, dtype) in batch.items()}
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    return Program(lowered := train_loop.jit_step(run, state).lower(state, batch), lowered.compile())


def test_one_compilation_and_two_fetches_in_six_steps(watched):
  assert watched['compilations'].count('Compiling jit(train_step)') == 1
  assert watched['fetches'] == 2  # of the two steps that are logged


def test_every_step_takes_over_the_state(watched, program):
  assert watched['donated'] == [True] * 6
  memory = program.compiled.memory_analysis()
  assert memory.alias_size_in_bytes > 0.99 * (memory.output_size_in_bytes - 8 * 1024)


def test_cost_of_the_step(program):
  cost, memory = program.compiled.cost_analysis(), program.compiled.memory_analysis()
  found = {name: cost[name] for name in ('flops', 'bytes accessed')} | {'temporaries': memory.temp_size_in_bytes}
  assert found == pytest.approx(RECORDED, rel=TOLERANCE), json.dumps(found)


def test_the_profile_reads_like_the_paper(watched, program):
  assert list((watched['workdir'] / 'profile').rglob('perfetto_trace.json.gz'))
  names = program.lowered.as_text(debug_info=True)
  for scope in ('vision/stage0', 'patch_embed', 'stage0_grouping', 'assign', 'text', 'pack_texts', 'caption_loss',
                'multi_label_loss', 'optimizer', 'transpose'):
    assert scope in names, scope


def test_tokens_and_flops_of_texts_at_lengths_of_cc12m():
  """GroupViT-S/16's text tower, forward and backward: as the compiler counts what it is given."""
  config = our_model.make_config(32, 'float32', text_budget=64)
  with config.unlocked():
    config.model.text.depth = 2  # of equal layers
  model = build_model(config.model, vocab_size=99, eos_id=1, multi_label=True)
  tokens = jnp.asarray(caption_lengths.draw_tokens(32, 3, 77, 99))
  params = jax.eval_shape(lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 224, 224, 3)), tokens[:1])['params'])
  encode = lambda params, rows: model.apply({'params': params}, rows, method='text_features')

  def flops(budget: int) -> float:
    features = functools.partial(packed_texts.text_features, encode, tokens=tokens, eos_id=1, budget=budget, groups=1)
    return jax.jit(jax.grad(lambda params: features(params).sum())).lower(params).cost_analysis()['flops']

  assert flops(0) > 3.5 * flops(64)  # 308 tokens an image; 64, and the body of the loop for what does not fit
  rows = pack(tokens.reshape(1, -1, 77), 1, packed_texts.ROW_LENGTH).num_rows
  assert np.max(rows) * packed_texts.ROW_LENGTH / 32 <= 72


