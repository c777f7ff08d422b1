"""Parts with a backward pass of their own are the functions they stand for, and so are their gradients."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupvit_jax.models.attention import attend
from groupvit_jax.models.layers import unfuse
from groupvit_jax.models.norm import LayerNorm
from groupvit_jax.models.projection import project


def normal(seed: int, *shape: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def assert_same(ours, plain, *args, tolerance: float = 1e-5):
  """Results, and the gradients of each argument for some cotangent."""
  def outcome(function):
    out, pull = jax.vjp(function, *args)
    return out, pull(normal(9, *out.shape, dtype=out.dtype))

  for found, wanted in zip(*map(jax.tree.leaves, jax.jit(lambda: (outcome(ours), outcome(plain)))())):
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    scale = np.abs(np.asarray(wanted, np.float32)).max()
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize('dtype, tolerance, size, masked', [
    (jnp.float32, 1e-5, 100, False),  # so large that exponents need their largest taken away
    (jnp.float32, 1e-5, 1, True), (jnp.bfloat16, 3e-2, 1, True)])
def test_attention_is_softmax_attention(dtype, tolerance, size, masked):
  query = size * normal(0, 2, 5, 3, 4, dtype=dtype)
  key, value = normal(1, 2, 7, 3, 4, dtype=dtype), normal(2, 2, 7, 3, 4, dtype=dtype)
  mask = jnp.arange(7)[None, None, None] <= jnp.arange(5)[None, None, :, None] if masked else None
  plain = functools.partial(jax.nn.dot_product_attention, mask=mask, implementation='xla')
  with jax.default_matmul_precision('highest'):
    assert_same(lambda *args: attend(*args, mask), plain, query, key, value, tolerance=tolerance)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_layer_norm_is_flaxs(dtype):
  params = {'scale': normal(1, 6), 'bias': normal(2, 6)}
  flax_norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32)
  apply = lambda module: lambda x, params: module.apply({'params': params}, x)
  assert jax.tree.map(jnp.shape, LayerNorm().init(jax.random.key(0), jnp.zeros((2, 6)))) == jax.tree.map(
      jnp.shape, flax_norm.init(jax.random.key(0), jnp.zeros((2, 6))))
  x = 5 + normal(0, 2, 3, 6, dtype=dtype)
  assert_same(apply(LayerNorm()), apply(flax_norm), x, params, tolerance=1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize('axis, features', [(-1, (3, 2, 4)), ((-2, -1), (5,)), (-1, 5)])
def test_projections_are_flaxs(axis, features):
  x = normal(0, 2, 3, 6, 4)
  module = functools.partial(nn.DenseGeneral, features, axis=axis)
  params = module().init(jax.random.key(1), x)
  apply = lambda module: lambda x, params: module.apply(params, x)
  assert_same(apply(module(dot_general=project)), apply(module()), x, params)


def test_a_fused_projection_is_taken_apart():
  qkv, mix = normal(0, 2, 5, 3, 4, 6), normal(1, 3)
  weighted = lambda take: lambda qkv: sum(w * part for w, part in zip(mix, take(qkv)))  # three cotangents that differ
  assert_same(weighted(unfuse), weighted(lambda qkv: jnp.moveaxis(qkv, -3, 0)), qkv)
