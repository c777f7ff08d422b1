"""One update: what a step that is not finite leaves alone, and what it counts."""

import functools

import jax
import numpy as np
import optax
import pytest

from groupvit_jax.errors import UserError
from groupvit_jax.interop.native import to_flat
from groupvit_jax.model.vision import StageSpec
from groupvit_jax.train import loop, optim
from groupvit_jax.train import step as train_step
from groupvit_jax.train.state import TrainState
from tests.running.test_sharding import EFFORTLESS, random_batch
from tests.tiny import tiny_config, tiny_model
from tests.train.test_checkpoint import raw
from tests.weights import random_variables

# Weights of the prompts' loss. The last leaves the loss finite, and the norm of its gradient overflows.
GOOD, BAD_LOSS, BAD_GRADIENT = 1.0, float('nan'), 1e37


@pytest.fixture(scope='module')
def history():
  """(state, figures) before any step and after a good one, one of each bad kind, and a good one again; and after one
  that starts with a parameter that is not finite, the embedding of a token that no text has."""
  model = tiny_model(stages=(StageSpec(1, 4, 4), StageSpec(1, 0, 0)))
  tx = optim.build_optimizer(tiny_config().optim, optax.constant_schedule(1e-3))
  variables = random_variables(model)
  state = TrainState.start(variables, tx.init(variables['params']), jax.random.key(0)).start_average()

  def step(state, batch, weight):
    return train_step.train_step(
      state,
      batch,
      model=model,
      tx=tx,
      multi_label_weight=weight,
      grad_accum_steps=1,
      text_budget=0,
      random_erasing=None,
      batch_sharding=None,
      ema_decay=0.9,
    )

  found, batch = [(state, None)], random_batch(8)
  compiled = jax.jit(step).lower(state, batch, GOOD).compile(EFFORTLESS)
  for weight in (GOOD, BAD_LOSS, BAD_GRADIENT, GOOD):
    found.append(compiled(found[-1][0], batch, weight))
  unused = np.setdiff1d(np.arange(20), batch['tokens'])[0]
  embedding = lambda path, leaf: leaf.at[unused].set(np.nan) if 'token_embedding' in str(path) else leaf
  params = jax.tree_util.tree_map_with_path(embedding, found[-1][0].params)
  return [*found, compiled(found[-1][0].replace(params=params), batch, GOOD)]


def learnt(state: TrainState) -> list[np.ndarray]:
  """Parameters, statistics, moments and averages."""
  return raw((state.params, state.batch_stats, state.opt_state, state.ema))


def test_both_kinds_of_bad_steps_are_bad(history):
  scalars = [jax.device_get(figures.scalars) for _, figures in history[1:5]]
  assert [bool(np.isfinite(found['loss'])) for found in scalars] == [True, False, True, True]
  assert [bool(np.isfinite(found['grad_norm'])) for found in scalars] == [True, False, False, True]


@pytest.mark.parametrize('number', [2, 3])
def test_a_bad_step_moves_the_position_and_nothing_that_was_learnt(history, number):
  (before, _), (after, _) = history[number - 1], history[number]
  for old, new in zip(learnt(before), learnt(after), strict=True):
    np.testing.assert_array_equal(old, new)
  assert int(after.step) == number
  assert (int(after.skipped), int(after.skipped_in_a_row)) == (number - 1, number - 1)


@pytest.mark.parametrize('number', [1, 4])
def test_a_good_step_learns_and_ends_the_row(history, number):
  (before, _), (after, figures) = history[number - 1], history[number]
  changed = [not np.array_equal(old, new) for old, new in zip(learnt(before), learnt(after), strict=True)]
  assert np.mean(changed) > 0.9  # some arrays have no gradient
  assert (int(after.step), int(after.skipped_in_a_row), int(figures.scalars['skipped_in_a_row'])) == (number, 0, 0)
  assert int(after.skipped) == (2 if number == 4 else 0)


def test_a_parameter_that_is_not_finite_ends_the_run_though_loss_and_gradient_are(history):
  figures = history[5][1]
  assert np.isfinite(figures.scalars['loss']) and np.isfinite(figures.scalars['grad_norm'])
  assert [int(figures.scalars['bad_parameters']) for _, figures in history[1:]] == [0, 0, 0, 0, 8]
  with pytest.raises(UserError, match='8 parameters are not finite after step 5; lower optim.peak_lr'):
    loop._log_step(None, None, None, 5, figures, None)


def test_gradients_of_frozen_parameters_are_not_computed():
  """Those of the others are what they were, in micro-batches too; fewer FLOPs are executed."""
  model = tiny_model(stages=(StageSpec(1, 4, 4), StageSpec(1, 0, 0)))
  batch, state = random_batch(8), TrainState.start(random_variables(model), (), jax.random.key(0))
  options = dict(model=model, text_budget=0, random_erasing=None, batch_sharding=None)

  def run(freeze, steps):
    step = functools.partial(train_step.loss_and_grads, grad_accum_steps=steps, freeze=freeze, **options)
    compiled = jax.jit(step).lower(state, batch).compile(EFFORTLESS)
    return to_flat(compiled(state, batch)[1]), compiled.cost_analysis()['flops']

  every, all_flops = run('', 1)
  tokens = {'vision/stage0_group_tokens'}
  for freeze, steps, left, share in (
    ('text|text_projector', 2, {name for name in every if not name.startswith(('text/', 'text_projector/'))}, 1),
    (r'(?!vision/stage\d_group_tokens).*', 1, tokens, 0.8),
  ):
    grads, flops = run(freeze, steps)
    assert grads.keys() == left and flops < share * all_flops
    for name, grad in grads.items():
      np.testing.assert_allclose(grad, every[name], atol=1e-5, err_msg=name)
