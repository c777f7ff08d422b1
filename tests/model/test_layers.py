"""Parts with a backward pass of their own are the functions they stand for, and so are their gradients."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from groupvit_jax.model import assignment
from groupvit_jax.model.attention import attend, unfuse
from groupvit_jax.model.layers import exact_gelu, HeadsDense, LayerNorm, normal_by_tanh, quick_gelu, sigmoid_by_tanh
from groupvit_jax.model.vision import PatchEmbed


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


@pytest.mark.parametrize(
  'dtype, tolerance, size, masked',
  [
    (jnp.float32, 1e-5, 100, False),  # so large that exponents need their largest taken away
    (jnp.float32, 1e-5, 1, True),
    (jnp.bfloat16, 3e-2, 1, True),
  ],
)
def test_attention_is_softmax_attention(dtype, tolerance, size, masked):
  query = size * normal(0, 2, 5, 3, 4, dtype=dtype)
  key, value = normal(1, 2, 7, 3, 4, dtype=dtype), normal(2, 2, 7, 3, 4, dtype=dtype)
  mask = jnp.arange(7)[None, None, None] <= jnp.arange(5)[None, None, :, None] if masked else None
  plain = functools.partial(jax.nn.dot_product_attention, mask=mask, implementation='xla')
  with jax.default_matmul_precision('highest'):
    assert_same(lambda *args: attend(*args, mask), plain, query, key, value, tolerance=tolerance)


@pytest.mark.parametrize('batch, parts', [(1, 3), (8, 8), (7, 7), (1, 1)])
def test_attention_in_parts_is_the_same(batch, parts):
  heads = 1 if parts == 1 else 3
  args = normal(0, batch, 5, heads, 4), normal(1, batch, 7, heads, 4), normal(2, batch, 7, heads, 4)
  in_parts = functools.partial(attend, implementation='xla_in_parts')
  assert str(jax.make_jaxpr(in_parts)(*args)).count('custom_vjp_call[') == parts
  assert_same(in_parts, attend, *args)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_layer_norm_is_flaxs(dtype):
  params = {'scale': normal(1, 6), 'bias': normal(2, 6)}
  flax_norm = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32)
  apply = lambda module: lambda x, params: module.apply({'params': params}, x)
  assert jax.tree.map(jnp.shape, LayerNorm().init(jax.random.key(0), jnp.zeros((2, 6)))) == jax.tree.map(
    jnp.shape, flax_norm.init(jax.random.key(0), jnp.zeros((2, 6)))
  )
  x = 5 + normal(0, 2, 3, 6, dtype=dtype)
  assert_same(apply(LayerNorm()), apply(flax_norm), x, params, tolerance=1e-5 if dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize('inputs, features', [((8,), (3, 2, 4)), ((2, 4), (5,)), ((8,), (5,))])
def test_projections_are_flaxs(inputs, features):
  x, kernel_init = normal(0, 2, 3, 8), nn.initializers.lecun_normal()
  theirs = nn.DenseGeneral(features, axis=range(-len(inputs), 0), kernel_init=kernel_init)
  params = theirs.init(jax.random.key(1), x.reshape(2, 3, *inputs))
  ours = HeadsDense(inputs, features, kernel_init)
  jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), x), params)  # runs start the same
  plain = lambda x, params: theirs.apply(params, x.reshape(2, 3, *inputs)).reshape(2, 3, -1)
  assert_same(lambda x, params: ours.apply(params, x), plain, x, params)


@pytest.mark.parametrize(
  'ours, theirs',
  [
    (exact_gelu, functools.partial(jax.nn.gelu, approximate=False)),
    (quick_gelu, lambda x: x * jax.nn.sigmoid(1.702 * x)),
  ],
)
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_activations_and_their_gradients(ours, theirs, dtype, tolerance):
  x = jnp.concatenate([jnp.linspace(-12, 12, 2001), jnp.array([-1e4, 0, 1e4])])
  expected, pull = jax.vjp(theirs, x.astype(dtype).astype(jnp.float32))
  found, our_pull = jax.vjp(ours, x.astype(dtype))
  assert found.dtype == dtype
  np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)
  grad = jnp.cos(x)
  np.testing.assert_allclose(our_pull(grad.astype(dtype))[0].astype(jnp.float32), *pull(grad), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
  'by_tanh, exact', [(normal_by_tanh, scipy.special.ndtr), (sigmoid_by_tanh, scipy.special.expit)]
)
def test_what_tpus_compute_by_tanh(by_tanh, exact):
  x = np.linspace(-12, 12, 100_001, dtype=np.float32)
  assert np.abs(by_tanh(x) - exact(x.astype(np.float64))).max() < 2e-7


@pytest.mark.parametrize('activation, dear', [(exact_gelu, ' erf('), (quick_gelu, ' exponential(')])
def test_no_more_than_its_input_waits_for_an_activations_gradient(activation, dear):
  """What is dear in it is computed twice, where a compiler would keep an array as large as the input."""
  loss = lambda x, kernel: jnp.square(activation(x @ kernel) @ kernel).sum()
  x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
  assert jax.jit(jax.grad(loss)).lower(x, x).compile().as_text().count(dear) == 2


def test_a_fused_projection_is_taken_apart():
  qkv, mix = normal(0, 2, 5, 3, 4, 6), normal(1, 3)
  weighted = lambda take: lambda qkv: sum(w * part for w, part in zip(mix, take(qkv)))  # three cotangents that differ
  assert_same(weighted(unfuse), weighted(lambda qkv: jnp.moveaxis(qkv, -3, 0)), qkv)


@pytest.mark.parametrize('size', [(8, 12), (11, 9)])  # whole patches, and pixels beyond the last one
def test_patches_are_a_convolution(size):
  images = normal(0, 2, *size, 3)
  conv = nn.Conv(5, (4, 4), (4, 4), padding='VALID')
  params = conv.init(jax.random.key(1), images)
  ours = PatchEmbed(4, 5)
  jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(1), images), params)  # runs start the same
  assert_same(lambda x, params: ours.apply(params, x), lambda x, params: conv.apply(params, x), images, params)


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_pooling_is_the_straight_through_average(dtype, tolerance):
  """The paper's equations as they stand: soft + stop_gradient(hard - soft), weights divided before they multiply."""
  logits, values = 2 * normal(0, 2, 3, 7), normal(1, 2, 7, 4, dtype=dtype)

  def plain(logits, values):
    soft = jax.nn.softmax(logits, axis=1)
    hard = jax.nn.one_hot(soft.argmax(axis=1), 3, axis=1)
    weights = soft + jax.lax.stop_gradient(hard - soft)
    weights = weights / (weights.sum(axis=-1, keepdims=True) + 1)
    return jnp.einsum('bsn,bnd->bsd', weights, values.astype(jnp.float32)).astype(values.dtype)

  ours = lambda logits, values: assignment.pool_segments(assignment.assign(logits, 'hard', dtype=dtype), values)
  assert_same(ours, plain, logits, values, tolerance=tolerance)
