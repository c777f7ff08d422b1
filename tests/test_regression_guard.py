"""What texts cost, without a clock: nothing here depends on how busy the machine is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import caption_lengths, our_model
from groupvit_jax import packed_texts
from groupvit_jax.models.build import build_model
from groupvit_jax.models.text_rows import pack


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


