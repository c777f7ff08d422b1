"""The speed benchmarks: FLOPs by hand are those of the traced model, and the table says what was found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import caption_lengths, model_flops, our_model, speed_table
from groupvit_jax import traced_flops
from groupvit_jax.models.build import build_model
from tests.weights import random_variables


def test_flops_by_hand_are_those_of_the_traced_model():
  """Of GroupViT-S/16 on one picture and four texts: tower by tower, and with projectors."""
  config = our_model.make_config(1, 'float32', 0).model
  model = build_model(config, vocab_size=9, eos_id=1, multi_label=True)
  shapes = jax.eval_shape(lambda: random_variables(model))
  traced = lambda method, *args: traced_flops.matmul_flops(
      jax.make_jaxpr(lambda variables: model.apply(variables, *args, method=method))(shapes).jaxpr)
  assert traced('encode_image', jnp.zeros((1, 224, 224, 3))) == model_flops.encode_images(config, 1, 224)
  # At another size, positions are resized: those products are no part of the model.
  assert traced('encode_image', jnp.zeros((1, 448, 448, 3))) == pytest.approx(
      model_flops.encode_images(config, 1, 448), rel=1e-2)
  text = model_flops.text_tower(config.text, [77] * 4) + 4 * model_flops.projector(256, 4096, 256)
  assert traced('encode_text', jnp.zeros((4, 77), int)) == text
  step = model_flops.train_step(config, [[77] * 4] * 2)
  assert step == 3 * (model_flops.encode_images(config, 2, 224) + 2 * text + 2 * 2 * 8 * 256)


def test_texts_are_as_long_as_those_of_cc12m():
  lengths = caption_lengths.draw_lengths(20_000, 3, 77)
  assert lengths.shape == (20_000, 4) and lengths.max() == 77 and lengths.min() >= 4
  words = (lengths[:, 0] - 2) / caption_lengths.TOKENS_A_WORD
  assert words.mean() == pytest.approx(20.2, rel=0.05)  # cut at 77 tokens
  tokens = caption_lengths.draw_tokens(50, 3, 77, 1000)
  np.testing.assert_array_equal((tokens == 1).argmax(axis=-1) + 1, caption_lengths.draw_lengths(50, 3, 77))


def test_the_table_holds_what_was_measured():
  report = {
      'work': 'train', 'batch': 8, 'size': 224, 'dtype': 'float32', 'rounds': 7,
      'cores': 2, 'clock': 'per_wall_s', 'processor': 'CPU', 'python': '3', 'load_average': 0.5,
      'images_per_s': {'ours': 4.0, 'eager': 2.0}, 'ratio_to': {'eager': 2.0},
      'peak_mb': {'ours': 2048, 'eager': 1024}, 'utilisation': {'ours': 0.5, 'eager': 0.25},
      'facts': {'ours': {'compile_s': 9.0, 'jax': 'J'}, 'eager': {'first_s': 3.0, 'torch': 'T', 'transformers': 'F'}}}
  page = speed_table.insert(f'a\n{speed_table.BEGIN}\nold\n{speed_table.END}\nb', speed_table.table([report]))
  assert '| training | transformers, eager | 2.00 | **2.00x** | 1.0 GiB | 25% | 3 s |' in page
  assert 'old' not in page and page.startswith('a\n') and page.endswith('\nb')
  with pytest.raises(ValueError, match='lacks the marks'):
    speed_table.insert('a', 'b')
