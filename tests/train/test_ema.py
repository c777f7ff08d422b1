"""The moving average of the weights: its values, its place in checkpoints, and who uses it; and frozen parameters."""

import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from groupvit_jax.commands.export import export
from groupvit_jax.interop.native import to_flat
from groupvit_jax.train import loop, restored_run
from groupvit_jax.train import run as run_lib
from groupvit_jax.train import state as train_state
from groupvit_jax.train import step as train_step
from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.checkpoint import Checkpoints
from tests.tiny import tiny_config
from tests.trained import on_devices


def config():
  """A tiny run, with parameters divided over two devices, that keeps an average and trains no text tower."""
  result = tiny_config()
  result.ema_decay, result.mesh.fsdp, result.freeze, result.eval.every_steps = 0.6, 2, 'text|text_projector', 0
  return result


@pytest.fixture(scope='module', autouse=True)
def two_devices():
  with on_devices(2):
    yield


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('ema') / 'run'
  assert loop.train(config(), folder) == 0
  return folder


def test_values():
  zero = jnp.zeros((), jnp.int32)
  variables = {'params': {'w': jnp.array([1.0, 2.0])}, 'batch_stats': {'m': jnp.array(8.0)}}
  state = train_state.TrainState.start(variables, None, jax.random.key(0)).start_average()
  after = lambda state, step, **new: state.replace(step=zero + step, **new)
  # 1 update: d = min(0.6, 2 / 11). 90: d = 0.6 < 91 / 100.
  once = train_step.average_variables(
    after(state, 1, params={'w': jnp.array([12.0, 2.0])}, batch_stats={'m': jnp.array(-3.0)}), 0.6
  )
  np.testing.assert_allclose(once['params']['w'], [10.0, 2.0], rtol=1e-6)
  np.testing.assert_allclose(once['batch_stats']['m'], -1.0, rtol=1e-6)
  late = train_step.average_variables(after(state, 90, params={'w': jnp.array([2.0, 12.0])}), 0.6)
  np.testing.assert_allclose(late['params']['w'], [1.4, 6.0], rtol=1e-6)
  # Of 3 steps one was skipped: 2 updates, d = 3 / 12; the skipped step itself changes nothing.
  counted = train_step.average_variables(after(state, 3, skipped=zero + 1, params={'w': jnp.array([5.0, 2.0])}), 0.6)
  np.testing.assert_allclose(counted['params']['w'], [4.0, 2.0], rtol=1e-6)
  skipped = train_step.average_variables(
    after(state, 90, skipped_in_a_row=zero + 1, params={'w': jnp.array([2.0, 12.0])}), 0.6
  )
  np.testing.assert_array_equal(skipped['params']['w'], [1.0, 2.0])


def test_a_run_averages_what_it_trains(run):
  """The last two checkpoints hold the recursion's two ends; between them lie two steps of training."""
  set_up = run_lib.set_up(config(), run)
  abstract = train_state.abstract_state(set_up.model, set_up.tx, set_up.text_shape, set_up.mesh, average=True)
  state = Checkpoints(run, keep=2, read_only=True).restore(abstract).state
  kernels = lambda tree: tree['params']['vision']['stage0_block0']['attn']['qkv']['kernel']
  assert kernels(state.ema).sharding == kernels(state.variables).sharding
  assert 'fsdp' in kernels(state.ema).sharding.spec
  step_fn, batches = run_lib.jit_step(set_up, state), list(run_lib.read_batches(set_up, 4))
  before = jax.tree.map(np.asarray, state.ema)
  state, _ = step_fn(
    state, run_lib.pipeline.to_devices({k: v for k, v in batches[0].items() if k != 'bad_records'}, set_up.mesh)
  )
  want = jax.tree.map(lambda old, new: 8 / 17 * old + 9 / 17 * np.asarray(new), before, state.variables)  # n = 7
  for found, expected in zip(jax.tree.leaves(state.ema), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-6)
  moved = optax.tree.norm(jax.tree.map(lambda a, b: np.asarray(a) - b, state.ema, before))
  assert moved > 1e-3


def test_frozen_parameters_stay_and_have_no_moments(run):
  """Bit for bit, also their average and running statistics, in spite of weight decay."""
  opened = [restored_run.restore(run, weights=weights) for weights in ('trained', 'ema')]
  start = to_flat(restored_run.untrained_variables(opened[0]))
  frozen = {name for name in start if '/text/' in name or '/text_projector/' in name}
  assert any(name.startswith('batch_stats/') for name in frozen)
  for found in (to_flat(each.variables) for each in opened):
    assert {name for name in found if np.array_equal(found[name], start[name])} == frozen
  set_up = run_lib.set_up(config(), run)
  abstract = train_state.abstract_state(set_up.model, set_up.tx, set_up.text_shape, set_up.mesh, average=True)
  trained = len(jax.tree.leaves(abstract.params)) - sum(name.startswith('params/') for name in frozen)
  moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.shape]
  assert len(moments) == 2 * (trained - 2)  # the temperatures are scalars


@pytest.mark.parametrize(
  'freeze, message',
  [
    (
      'txt',
      "freeze='txt' matches no parameter; at the top there are image_projector, logit_scale, multi_label_logit_sc",
    ),
    ('texts?/block7', 'matches no parameter; at the top'),
    ('.*', 'matches every parameter; leave one to train'),
    ('text(', "freeze='text.' is no regular expression"),
  ],
)
def test_mistakes_about_freezing(freeze, message, tmp_path):
  changed = config()
  changed.freeze = freeze
  with pytest.raises(ValueError, match=message) as error:
    run_lib.set_up(changed, tmp_path / 'run')
  assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_resumes_exactly(run, tmp_path):
  shutil.copytree(run, tmp_path / 'again')
  shutil.rmtree(tmp_path / 'again' / 'checkpoints' / '6')
  assert loop.train(config(), tmp_path / 'again') == 0
  first, second = (restored_run.restore(folder, weights='ema') for folder in (run, tmp_path / 'again'))
  assert first.step == second.step == 6
  for a, b in zip(jax.tree.leaves(first.variables), jax.tree.leaves(second.variables), strict=True):
    np.testing.assert_array_equal(a, b)


def test_is_what_a_run_is_judged_by_unless_told_otherwise(run, tmp_path):
  best, trained = restored_run.restore(run), restored_run.restore(run, weights='trained')
  assert (best.weights, trained.weights) == ('ema', 'trained') and best.provenance['weights'] == 'ema'
  export(str(run), 'safetensors', str(tmp_path / 'best'))
  export(str(run), 'safetensors', str(tmp_path / 'trained'), weights='trained')
  for folder, opened in (('best', best), ('trained', trained)):
    written = safetensors.numpy.load_file(tmp_path / folder / 'model.safetensors')
    for name, value in to_flat(opened.variables).items():
      np.testing.assert_array_equal(written[name], value)
  name = 'params/vision/positions'
  assert not np.array_equal(to_flat(best.variables)[name], to_flat(trained.variables)[name])


def test_mistakes(run, tmp_path):
  for key, value, message in (
    ('ema_decay', 0.0, 'ema_decay is 0.0 here and 0.6 there'),
    ('data.num_prompts', 0, 'data.num_prompts is 0 here and 1 there'),
    ('freeze', '', r"freeze is '' here and 'text\|text_projector' there; use another --workdir"),
  ):
    other = config()
    other.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
      workdir_lib.check_config(run, other)
  without, other = config(), config()
  without.ema_decay, other.ema_decay = 0.0, 0.7
  assert workdir_lib.check_config(run, other) == ['ema_decay is 0.7 here and 0.6 there']
  workdir_lib.write_config(tmp_path / 'old', without)
  shutil.copytree(run / 'tokenizer', tmp_path / 'old' / 'tokenizer')
  with pytest.raises(ValueError, match='keeps no moving average'):
    restored_run.restore(tmp_path / 'old', weights='ema')
