"""Losses on arrays small enough to work out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import plain_losses
from groupvit_jax.model import losses
from groupvit_jax.running import sharding

LOG2 = np.log(2.0)


def test_l2_normalize():
  out = losses.l2_normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]], jnp.bfloat16))
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
  assert np.isfinite(jax.grad(lambda x: losses.l2_normalize(x).sum())(jnp.zeros((1, 3)))).all()


def test_contrastive_loss_is_the_mean_of_two_different_directions():
  # Similarities [[0.6, 1], [0.8, 0]], scale 2, logits [[1.2, 2], [1.6, 0]].
  out = losses.contrastive_loss(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[3.0, 4.0], [7.0, 0.0]]), LOG2)
  image_to_text = (np.log(np.exp(1.2) + np.exp(2.0)) - 1.2 + np.log(np.exp(1.6) + 1)) / 2
  text_to_image = (np.log(np.exp(1.2) + np.exp(1.6)) - 1.2 + np.log(np.exp(2.0) + 1)) / 2
  np.testing.assert_allclose(out.loss, (image_to_text + text_to_image) / 2, rtol=1e-5)
  assert (out.image_to_text_accuracy, out.text_to_image_accuracy) == (0, 0)


def test_the_temperature_is_clamped_at_100_and_has_no_gradient_beyond():
  np.testing.assert_allclose(losses.clamped_scale(jnp.float32(np.log(99.0))), 99, rtol=1e-5)
  assert losses.clamped_scale(jnp.float32(5.0)) == 100
  gradient = jax.grad(losses.clamped_scale)
  np.testing.assert_allclose(gradient(jnp.float32(4.0)), np.exp(4.0), rtol=1e-5)
  assert gradient(jnp.float32(5.0)) == 0
  images, texts = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[3.0, 4.0], [7.0, 0.0]])
  for scale, moves in ((4.0, True), (5.0, False)):
    loss = lambda x: losses.contrastive_loss(images, texts, x).loss
    assert (jax.grad(loss)(jnp.float32(scale)) != 0) == moves


def test_multi_label_loss_by_hand():
  # Two images, two prompts each; similarities of image 0: (1, 0.6), (0, 0), of image 1: (0, 0.8), (1, 1).
  images = jnp.array([[1.0, 0.0], [0.0, 1.0]])
  prompts = jnp.array([[[2.0, 0.0], [3.0, 4.0]], [[0.0, 5.0], [0.0, 1.0]]])
  out = losses.multi_label_loss(images, prompts, LOG2)
  logits = 2 * np.array([[1, 0.6, 0, 0], [0, 0.8, 1, 1]])
  targets = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
  log_softmax = lambda x, axis: x - np.log(np.exp(x).sum(axis=axis, keepdims=True))
  image_to_text = -(targets * log_softmax(logits, 1)).sum(axis=1).mean()
  text_to_image = -(2 * targets * log_softmax(logits, 0)).sum(axis=0).mean()
  np.testing.assert_allclose(out.loss, (image_to_text + text_to_image) / 2, rtol=1e-5)
  # Prompt 1 of image 0 looks more like image 1.
  assert (out.image_to_text_accuracy, out.text_to_image_accuracy) == (1, 0.75)


def embeds(batch: int, prompts: int) -> tuple[np.ndarray, np.ndarray]:
  """Embeddings [B, E] and [B, M, E] of unequal lengths, of which two pairs are alike."""
  rng = np.random.default_rng(0)
  images = rng.standard_normal((batch, 6)).astype(np.float32)
  texts = images[:, None] + rng.standard_normal((batch, prompts, 6)).astype(np.float32)
  images[-1], texts[-1] = images[1], texts[1]
  return 3 * images, texts


def assert_blocked_is_plain(name: str, mesh: dict | None, block: int, arrays: tuple, wrt: tuple, scales: tuple) -> list:
  """Values, accuracies and gradients of a loss at some scales; returns the gradients for the scale."""
  place = mesh and sharding.batch_sharding(sharding.make_mesh(**mesh))
  blocked = functools.partial(getattr(losses, name), sharding=place, block=block)

  @jax.jit
  def both(*args):
    with_aux = lambda loss: lambda *args: (loss(*args).loss, loss(*args))
    grads = lambda loss: jax.value_and_grad(with_aux(loss), argnums=wrt, has_aux=True)(*args)
    return grads(blocked), grads(getattr(plain_losses, name))

  found = []
  for log_scale in scales:
    ours, plain = both(*jax.device_put(arrays, place), jnp.float32(log_scale))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    found.append(ours[1][-1])
  return found


@pytest.mark.parametrize(
  'mesh, batch, prompts, block',
  [(None, 14, 3, 7), ({'data': 8}, 24, 1, 2), ({'data': 2, 'fsdp': 2, 'model': 2}, 12, 2, 1024)],
)
def test_blocked_losses_are_the_plain_ones(mesh, batch, prompts, block):
  """On both sides of the clamp, beyond which the scale has no gradient."""
  grads = assert_blocked_is_plain('multi_label_loss', mesh, block, embeds(batch, prompts), (0, 1, 2), (0.0, 3.0, 5.0))
  assert [grad == 0 for grad in grads] == [False, False, True]


def segments_and_prompts(batch: int, prompts: int, segments: int = 4) -> tuple[np.ndarray, ...]:
  """Segments [B, S, E], of which some own no patch, prompts [B, M, E] and their words, of which many are alike."""
  rng = np.random.default_rng(0)
  embeds = rng.standard_normal((batch, segments, 6)).astype(np.float32)
  texts = rng.standard_normal((batch, prompts, 6)).astype(np.float32)
  in_use = rng.random((batch, segments)) < 0.6
  in_use[:, 1] = True
  words = rng.integers(5, size=(batch, prompts, 2)).astype(np.int32)
  return embeds, in_use, texts, words


def test_best_segment_loss_by_hand():
  """Of image 0 the second segment fits its prompt, the third one better, but it owns no patch."""
  segments = jnp.array([[[5.0, 12.0], [4.0, 3.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
  in_use = jnp.array([[True, True, False], [True, True, True]])
  prompts = jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]])
  loss = functools.partial(losses.best_segment_loss, segments, in_use, prompts, log_scale=LOG2, temperature=1e-3)
  # Similarities by the best segment in use: [[0.8, 12 / 13], [0, 1]], scale 2.
  out = loss(jnp.array([[[1, 1]], [[1, 2]]]))
  rows, columns = np.log1p(np.exp([24 / 13 - 1.6, -2.0])), np.log1p(np.exp([-1.6, 24 / 13 - 2]))
  np.testing.assert_allclose(out.loss, (rows.mean() + columns.mean()) / 2, rtol=5e-3)
  assert (out.image_to_text_accuracy, out.text_to_image_accuracy) == (0.5, 1)
  # Of one word, the prompts are no negatives, and without negatives there is nothing to learn.
  same = jax.value_and_grad(lambda x: losses.best_segment_loss(x, in_use, prompts, jnp.ones((2, 1, 2)), LOG2).loss)
  value, gradient = same(segments)
  assert value == 0 and (gradient == 0).all()


def test_a_soft_maximum_lies_between_maximum_and_mean():
  cosines, in_use = jnp.array([[[0.9], [0.1], [-0.4]]]), jnp.array([[True, True, False]])
  best, soft, mean = (losses._soft_maximum(cosines, in_use, t)[0, 0] for t in (1e-3, 0.1, 1e3))
  np.testing.assert_allclose(best, 0.9, rtol=1e-5)
  np.testing.assert_allclose(soft, 0.1 * np.log(np.exp(9) + np.exp(1)), rtol=1e-5)
  np.testing.assert_allclose(mean - 1e3 * np.log(2), 0.5, atol=1e-3)


@pytest.mark.parametrize(
  'mesh, batch, prompts, block, segments',
  [(None, 6, 3, 4, 4), ({'data': 8}, 16, 1, 2, 1), ({'data': 2, 'fsdp': 2, 'model': 2}, 12, 2, 1024, 4)],
)
def test_blocked_best_segment_loss_is_the_plain_one(mesh, batch, prompts, block, segments):
  """One segment is the loss of the pooled feature."""
  embeds, in_use, *others = segments_and_prompts(batch, prompts)
  arrays = (embeds[:, 1 : 1 + segments], in_use[:, 1 : 1 + segments], *others)
  assert_blocked_is_plain('best_segment_loss', mesh, block, arrays, (0, 2, 4), (0.0, 3.0))


def test_equals_count_for_the_first_on_any_number_of_devices():
  """As argmax does: a batch of equal pairs has one hit, not all or none."""
  ones = jnp.ones((16, 4))
  for place in (None, sharding.batch_sharding(sharding.make_mesh())):
    out = jax.jit(functools.partial(losses.contrastive_loss, sharding=place, block=3))(ones, ones, 1.0)
    assert (out.image_to_text_accuracy, out.text_to_image_accuracy) == (1 / 16, 1 / 16)


def test_far_logits_neither_overflow_nor_vanish():
  """At the clamp a row may have all logits but its own 200 below; here its own is the lowest."""
  images = jnp.array([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
  out = losses.contrastive_loss(images, -images, 9.0, block=2)
  row = np.log(2.0) + 200, np.log(np.exp(-200.0) + 1) + 200
  np.testing.assert_allclose(out.loss, (row[0] + 2 * row[1]) / 3, rtol=1e-6)


def test_no_prompts_have_no_loss():
  with pytest.raises(ValueError, match='needs prompts and got 0 per image'):
    losses.multi_label_loss(jnp.ones((2, 3)), jnp.ones((2, 0, 3)), 1.0)
