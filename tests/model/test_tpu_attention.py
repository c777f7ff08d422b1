"""The TPU kernel, interpreted on CPUs, is plain attention, and so are its gradients; compiled in tests/aot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupvit_jax.model import tpu_attention
from groupvit_jax.model.attention import self_attend
from groupvit_jax.model.layers import sample_keys
from groupvit_jax.model.tpu_attention import TpuAttention
from groupvit_jax.model.vision import StageSpec
from groupvit_jax.running import sharding
from tests.tiny import tiny_model
from tests.weights import random_variables


def interpreted(**mesh) -> TpuAttention:
  devices = jax.devices() if mesh else jax.devices()[:1]
  return TpuAttention(sharding.make_mesh(**mesh, devices=devices), interpret=True)


@pytest.mark.parametrize(
  'batch, tokens, heads, size, texts, dtype, tolerance',
  [
    (3, 21, 3, 8, None, jnp.float32, 1e-5),  # padded to 24, with a scale of no power of two
    (60, 16, 1, 4, None, jnp.float32, 1e-5),  # several blocks of several samples
    (2, 14, 2, 8, (3, 6, 5), jnp.float32, 1e-5),
    (2, 16, 2, 16, (16,), jnp.bfloat16, 3e-2),
    (2, 13, 2, 16, None, jnp.bfloat16, 3e-2),
  ],
)
def test_kernel_is_plain_attention(batch, tokens, heads, size, texts, dtype, tolerance):
  how = interpreted().padded(tokens)
  if texts is not None:
    texts = jnp.repeat(jnp.arange(len(texts)), jnp.array(texts))[None]
  normal = lambda seed, width: jax.random.normal(jax.random.key(seed), (batch, tokens, width), dtype)
  qkv, grad = 2 * normal(0, 3 * heads * size), normal(1, heads * size)
  bias = jnp.linspace(-1, 1, 3 * heads * size).astype(dtype)

  def kernel(qkv, bias):
    padded = jnp.pad(qkv, ((0, 0), (0, how.padding), (0, 0)), constant_values=9)
    text_of = None if texts is None else jnp.pad(texts, ((0, 0), (0, how.padding)))
    assert how.fits(heads, padded)
    return self_attend(padded, bias, heads, text_of, how)[:, :tokens]

  def outcome(function):
    out, pull = jax.vjp(function, qkv, bias)
    return out, *pull(grad)

  plain = lambda qkv, bias: self_attend(qkv, bias, heads, texts)
  found, wanted = jax.jit(lambda: (outcome(kernel), outcome(plain)))()
  for ours, plain in zip(found, wanted, strict=True):
    assert ours.dtype == dtype
    ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
    np.testing.assert_allclose(ours, plain, atol=tolerance * np.abs(plain).max(), rtol=0)


def test_model_is_the_same_with_the_kernel():
  """Features, assignments and gradients, with padded tokens and grouping with noise."""
  model = tiny_model('dots', stages=(StageSpec(1, 4, 4), StageSpec(1, 0, 0)))
  params, keys = random_variables(model)['params'], sample_keys(jax.random.key(1), 2)
  images = jax.random.normal(jax.random.key(0), (2, 12, 20, 3))

  def outcome(model):
    def loss(params):
      out = model.apply({'params': params}, images, keys=keys, method='vision_features')
      return jnp.sin(out.segments).sum(), out

    return jax.value_and_grad(loss, has_aux=True)(params)

  kernel = model.with_attention(interpreted())
  found, wanted = jax.jit(lambda: (outcome(kernel), outcome(model)))()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max() + 1e-6), found, wanted)


@pytest.mark.parametrize('remat, kernels', [('none', 2), ('dots', 2), ('blocks', 3)])
def test_what_blocks_keep_spares_the_kernel(remat, kernels):
  """With 'dots' the backward pass runs no forward kernel again; two blocks, of which one is padded, and grouping."""
  stages = (StageSpec(1, 4, 4), StageSpec(1, 0, 0))
  model = tiny_model(remat, stages=stages).with_attention(interpreted())
  images, params = jnp.zeros((2, 16, 16, 3)), jax.eval_shape(lambda: random_variables(model))['params']
  loss = lambda params: model.apply({'params': params}, images, method='vision_features').pooled.sum()
  assert str(jax.make_jaxpr(jax.grad(loss))(params)).count('name=forward_head') == 3 * (kernels - 1)


def test_what_does_not_fit_is_left_to_xla(monkeypatch):
  """Heads over two devices, and padding."""
  how = interpreted(data=2, fsdp=2, model=2).padded(13)
  qkv = jax.random.normal(jax.random.key(0), (4, 16, 3 * 8))
  kernel = self_attend(qkv, jnp.ones(24), 2, None, how)
  monkeypatch.setattr(tpu_attention, '_VMEM_BYTES', 0)
  assert not how.fits(2, qkv)
  np.testing.assert_allclose(self_attend(qkv, jnp.ones(24), 2, None, how)[:, :13], kernel[:, :13], atol=1e-6)


def test_exports_with_any_batch_take_xla():
  how = interpreted()
  (batch,) = jax.export.symbolic_shape('b')
  attend = jax.jit(lambda qkv: self_attend(qkv, jnp.ones(24), 2, None, how))
  exported = jax.export.export(attend)(jax.ShapeDtypeStruct((batch, 16, 24), jnp.float32))
  qkv = jax.random.normal(jax.random.key(0), (3, 16, 24))
  np.testing.assert_allclose(exported.call(qkv), attend(qkv), atol=1e-6)
