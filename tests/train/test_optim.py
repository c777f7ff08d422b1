"""AdamW as the paper has it: what decays, how much is clipped, and when the rate is what."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import groupvit_vits16_gcc_yfcc
from groupvit_jax.train import optim
from tests.tiny import tiny_model
from tests.weights import random_variables

CONFIG = ml_collections.ConfigDict(
  dict(
    warmup_lr=0.1,
    peak_lr=0.5,
    end_lr=0.2,
    warmup_steps=2,
    cosine='after_warmup',
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.05,
    clip_norm=5.0,
  )
)


def flat(tree) -> dict[str, np.ndarray]:
  return flax.traverse_util.flatten_dict(jax.device_get(tree), sep='/')


def test_what_decays():
  """Without gradients AdamW does nothing but decay: by rate times weight decay, or not at all."""
  params = random_variables(tiny_model())['params']
  tx = optim.build_optimizer(CONFIG, optax.constant_schedule(0.5))
  update = jax.jit(lambda params: tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, finite=True))
  updates, _ = update(params)
  decayed = set()
  for name, update in flat(updates).items():
    if update.any():
      decayed.add(name)
      np.testing.assert_allclose(update, -0.5 * 0.05 * flat(params)[name], rtol=1e-5)
  kept = set(flat(params)) - decayed
  assert kept == {name for name in flat(params) if name.endswith(('/bias', '/scale'))}
  assert {'logit_scale', 'multi_label_logit_scale', 'vision/positions', 'text/positions'} <= decayed
  assert len([name for name in decayed if 'group_tokens' in name]) == 2
  assert all(value.ndim < 2 or name.endswith('/bias') for name, value in flat(params).items() if name in kept)


@pytest.mark.parametrize('norm, share', [(4.0, 1.0), (50.0, 0.1)])
def test_gradients_are_clipped_at_a_norm_of_five(norm, share):
  """Of all gradients together; the first moment shows what came through."""
  params = {'a': np.ones(16, np.float32), 'b': {'kernel': np.ones((3, 3), np.float32)}}
  grads = jax.tree.map(lambda p: np.full_like(p, norm / 5), params)  # 25 equal elements
  tx = optim.build_optimizer(CONFIG, optax.constant_schedule(0.5))
  _, state = tx.update(grads, tx.init(params), params, finite=True)
  moments = optax.tree.get(state, 'mu')
  for moment, grad in zip(jax.tree.leaves(moments), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(moment, 0.1 * share * grad, rtol=1e-5)


def test_finite_updates_are_those_of_optax_and_others_leave_the_state():
  """Those of `optax.adamw` after clipping, bit for bit, with their state, as if other steps had not been."""
  schedule = optim.build_schedule(CONFIG, total_steps=6, batch_size=4096)
  theirs = optax.chain(optim.clip_by_global_norm(5.0), optax.adamw(schedule, weight_decay=0.05, mask=optim.decay_mask))
  ours, rng = optim.build_optimizer(CONFIG, schedule), np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(3, 16)).astype('f'), 'norm': {'scale': np.ones(3, 'f')}}
  states = [ours.init(params), theirs.init(params)]
  for scale in (0.1, np.nan, 3.0, np.inf, 0.1):
    grads = jax.tree.map(lambda p, scale=scale: (scale * rng.normal(size=p.shape)).astype('f'), params)
    found, state = ours.update(grads, states[0], params, finite=np.isfinite(scale))
    if np.isfinite(scale):
      expected, states[1] = theirs.update(grads, states[1], params)
      jax.tree.map(np.testing.assert_array_equal, found, expected)
    states[0] = state
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_the_papers_cosine_spans_the_warm_up_too():
  """The values are those of the published schedule, by epochs."""
  config = groupvit_vits16_gcc_yfcc.get_config()
  schedule = optim.build_schedule(config.optim, config.total_steps, config.batch_size)
  epoch = config.total_steps // 30
  rates = np.asarray(schedule(np.array([5, 10, 20, 30]) * epoch))
  np.testing.assert_allclose(rates, [1.4955e-3, 1.2100e-3, 4.3001e-4, 4e-5], rtol=4e-5)
  last_of_warmup, first_of_cosine = schedule(np.array([2 * epoch - 1, 2 * epoch]))
  assert last_of_warmup == pytest.approx(1.6e-3, rel=1e-4)
  assert first_of_cosine == pytest.approx(
    4e-5 + 7.8e-4 * (1 + np.cos(np.pi * (2 * epoch - 1) / (30 * epoch))), rel=1e-5
  )


def test_rates_scale_with_the_batch_and_can_be_had_all_at_once():
  schedule = optim.build_schedule(CONFIG, total_steps=6, batch_size=2048)
  rates = np.asarray(schedule(np.arange(6)))
  np.testing.assert_allclose(rates, [float(schedule(step)) for step in range(6)], rtol=1e-6)
  np.testing.assert_allclose(rates[[0, 1, 2, 4]], [0.05, 0.15, 0.25, (0.25 + 0.1) / 2], rtol=1e-5)
