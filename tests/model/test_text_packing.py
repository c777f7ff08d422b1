"""Texts packed into rows: where they go, what they see, and that features and gradients stay those of padded texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import caption_lengths
from groupvit_jax.model import text_packing
from groupvit_jax.model.attention import causal_mask
from tests.tiny import tiny_model
from tests.weights import random_variables

EOS = 2


def padded(lengths: np.ndarray, width: int) -> np.ndarray:
  """Texts of these lengths, EOS included, with ids that differ."""
  words = 3 + np.arange(lengths.size * width).reshape(*lengths.shape, width) % 17
  return np.where(np.arange(width) < lengths[..., None] - 1, words, EOS)


def test_three_texts_in_two_rows():
  """Literally: 'abE', 'cE' and 'dE' in rows of 5 tokens."""
  tokens = jnp.array([[[11, 12, EOS, 9], [13, EOS, EOS, EOS], [14, EOS, 9, 9]]])
  packing = text_packing.pack(tokens, EOS, row_length=5)
  assert packing.starts.tolist() == [[0, 3, 5]] and packing.num_rows.tolist() == [2]
  rows, here = text_packing.take_rows(packing, 0, 2)
  assert rows.tokens[0, 0].tolist() == [11, 12, EOS, 13, EOS] and rows.tokens[0, 1, :2].tolist() == [14, EOS]
  assert rows.positions.tolist() == [[[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]]
  assert rows.ends.tolist() == [[2, 4, 6]] and here.all()
  np.testing.assert_array_equal(
    causal_mask(rows.texts[0]),
    [
      [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]],
      [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
    ],
  )
  assert text_packing.take_rows(packing, 1, 1)[1].tolist() == [[False, False, True]]


def test_texts_go_where_a_loop_would_put_them():
  rng = np.random.default_rng(0)
  pack = jax.jit(text_packing.pack, static_argnums=(1, 2))
  for row_length in (8, 11, 30):
    for seed_lengths in (rng.integers(1, 9, (4, 33)), np.full((4, 33), 8), np.full((4, 33), 1)):
      packing = pack(padded(seed_lengths, 8), EOS, row_length)
      assert packing.starts.tolist() == [next_fit(group, row_length) for group in seed_lengths]


def next_fit(lengths: np.ndarray, row_length: int) -> list[int]:
  starts, row, column = [], 0, 0
  for length in lengths:
    if column + length > row_length:
      row, column = row + 1, 0
    starts.append(row * row_length + column)
    column += length
  return starts


def test_features_and_gradients_are_those_of_padded_texts(monkeypatch):
  """Of texts that all fit, and of some that do not, for which blocks are a loop."""
  monkeypatch.setattr(text_packing, 'ROW_LENGTH', 8)
  model = tiny_model()
  model = model.clone(text=model.text.clone(depth=2))
  params = random_variables(model)['params']
  tokens = jnp.array(padded(np.random.default_rng(0).integers(1, 7, (8, 3)), 6))
  encode = lambda model: lambda params, rows: model.apply({'params': params}, rows, method='text_features')
  encoders = text_packing.Encoders(encode(model), encode(model.clone(text=model.text.clone(scan_layers=True))))

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def features_and_grads(params, budget, groups):
    def total(params):
      features = text_packing.text_features(encoders, params, tokens, eos_id=EOS, budget=budget, groups=groups)
      return (features * jnp.cos(jnp.arange(features.size)).reshape(features.shape)).sum(), features

    return jax.value_and_grad(total, has_aux=True)(params)

  with jax.default_matmul_precision('highest'):
    (_, expected), grads = features_and_grads(params, 0, 1)
    for budget, groups in ((18, 1), (6, 4)):
      (_, features), packed_grads = features_and_grads(params, budget, groups)
      np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
      for ours, theirs in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)

  # The loop's blocks have their parameters stacked: where all texts fit, nobody does that.
  stacking = 'text_features/text/stack"'
  loop, always = features_and_grads.lower(params, 6, 1).compile().as_text().rsplit('\nENTRY ', 1)
  assert stacking in loop and stacking not in always


def test_no_text_is_cut_at_lengths_of_cc12m():
  """A budget of 64 tokens an image pays for 256 images a device; never do they need 68."""
  texts = caption_lengths.draw_tokens(8 * 256, prompts=3, context_length=77, vocab_size=1000)
  packing = text_packing.pack(jnp.array(texts.reshape(8, -1, 77)), 1, text_packing.ROW_LENGTH)
  needed = packing.num_rows * text_packing.ROW_LENGTH / 256
  assert needed.mean() < 64 and needed.max() < 68, needed
  assert packing.lengths.max() == 77 and packing.lengths.sum() / (8 * 256) == pytest.approx(51.7, abs=1)


def test_a_budget_that_is_too_small_is_told(monkeypatch):
  """Eight images of two texts of 3 tokens, two texts to a row of 8: 8 rows, and each turn computes one."""
  monkeypatch.setattr(text_packing, 'ROW_LENGTH', 8)
  tokens = padded(np.full((8, 2), 3), 6)
  load = lambda budget, groups: text_packing.text_load(tokens, eos_id=EOS, budget=budget, groups=groups)
  assert load(8, 1) == text_packing.TextLoad(48, 0) and load(0, 1).turns == 0
  assert load(5, 1).turns == 3 and load(4, 2).turns == 2  # of 5 rows, and of 2 for each group
  assert [text_packing.needed_budget(tokens, eos_id=EOS, groups=groups) for groups in (1, 2)] == [8, 8]


def test_mistakes():
  with pytest.raises(ValueError, match='rows of 5 tokens do not hold texts of up to 6'):
    text_packing.pack(jnp.zeros((1, 1, 6), int), EOS, 5)
