"""What only a GPU can show: JAX_PLATFORMS=cuda python -m pytest -m gpu"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupvit_jax.model.attention import attend, causal_mask
from groupvit_jax.model.layers import LayerNorm
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import choose_attention
from tests.tiny import tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != 'gpu', reason='cuDNN is for NVIDIA GPUs')]


# Of GroupViT-S/16's stages, of a window of 448 px, of group tokens on tokens, and of a row of packed texts.
SHAPES = [(260, 260, 1), (72, 72, 1), (8, 8, 1), (848, 848, 1), (64, 196, 1), (8, 64, 1), (128, 128, 3)]


@pytest.mark.parametrize('queries, tokens, texts', SHAPES)
def test_cudnn_is_the_same_attention(queries, tokens, texts):
  """In bfloat16, with gradients: as far from float32 as XLA's is, and no farther."""
  arrays = jax.random.normal(jax.random.key(0), (4, 2, tokens, 6, 64), jnp.bfloat16)
  mask = None if texts == 1 else causal_mask(jnp.arange(tokens)[None] * texts // tokens)[:, None]

  def outcome(implementation, *arrays):
    query, key, value, cotangent = arrays
    attend_by = functools.partial(attend, mask=mask, implementation=implementation)
    out, pull = jax.vjp(attend_by, query[:, :queries], key, value)
    return out, *pull(cotangent[:, :queries].astype(out.dtype))

  with jax.default_matmul_precision('highest'):
    exact = jax.jit(functools.partial(outcome, 'xla'))(*arrays.astype(jnp.float32))
  for name in ('xla', 'cudnn'):
    for found, wanted in zip(jax.jit(functools.partial(outcome, name))(*arrays), exact):
      assert np.linalg.norm(found.astype(jnp.float32) - wanted) < 1e-2 * np.linalg.norm(wanted), name


def test_a_model_takes_cudnn():
  """Heads of 8 features; the outputs are those of the other implementation."""
  model = tiny_model(dtype=jnp.bfloat16, width=16)
  choice = choose_attention(model, sharding.make_mesh(devices=jax.devices()[:1]), train=True)
  assert choice.implementation == 'cudnn', choice.reason
  images, tokens = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), jnp.full((2, 1, 6), 2)
  variables = model.init(jax.random.key(1), images, tokens)
  with_attention = lambda name: (
    model.clone(vision=model.vision.clone(attention=name)).apply(variables, images, method='encode_image').embeds
  )
  np.testing.assert_allclose(with_attention('cudnn'), with_attention('xla'), atol=3e-2)


def test_norms_do_not_round_gradients():
  """Products of float32 are rounded to TF32 on GPUs unless told otherwise; sums are not."""
  x, grad = np.random.default_rng(0).normal(size=(2, 64, 384)) + 3
  scale = np.random.default_rng(1).normal(size=384)
  params = {'params': {'scale': jnp.float32(scale), 'bias': jnp.zeros(384)}}
  found = jax.jit(lambda x, grad: jax.vjp(lambda x: LayerNorm().apply(params, x), x)[1](grad)[0])(
    jnp.float32(x), jnp.float32(grad)
  )
  spread = np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  normal, scaled = (x - x.mean(-1, keepdims=True)) / spread, grad * scale
  mean = lambda x: x.mean(-1, keepdims=True)
  np.testing.assert_allclose(found, (scaled - mean(scaled) - normal * mean(scaled * normal)) / spread, atol=2e-5)
