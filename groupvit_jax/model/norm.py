"""LayerNorm, with a backward pass that adds up over features by products with the scale."""

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

# torch's epsilon; Flax's default is 1e-6.
LAYER_NORM_EPS = 1e-5


class LayerNorm(nn.Module):
  """A float32 LayerNorm over the last axis, as torch computes it."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param('scale', nn.initializers.ones, x.shape[-1:], jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], jnp.float32)
    return normalize(x, scale, bias)


@jax.custom_vjp
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
  """[..., D] -> float32 [..., D] of mean 0 and variance 1, times `scale` [D], plus `bias` [D]."""
  return _forward(x, scale, bias)[0]


def _forward(x, scale, bias):
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis=-1, keepdims=True)
  rate = lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)
  along = (1,) * (x.ndim - 1) + (-1,)
  return (wide - mean) * rate * scale.reshape(along) + bias.reshape(along), (x, mean, rate, scale)


def _backward(saved, grad):
  x, mean, rate, scale = saved
  normal = (x.astype(jnp.float32) - mean) * rate
  # Means over features of grad * scale and of grad * scale * normal.
  straight = _add_up(grad, scale)[..., None] / x.shape[-1]
  sideways = _add_up(grad * normal, scale)[..., None] / x.shape[-1]
  along = (1,) * (x.ndim - 1) + (-1,)
  grad_x = rate * (grad * scale.reshape(along) - straight - normal * sideways)
  rows = tuple(range(x.ndim - 1))
  return grad_x.astype(x.dtype), (grad * normal).sum(axis=rows), grad.sum(axis=rows)


def _add_up(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Sums [...] over features of x * scale. Elsewhere than on CPUs a product would round, and not be fused."""
  product = lambda x, scale: jnp.einsum('...d,d->...', x, scale, precision='highest')
  plain = lambda x, scale: (x * scale.reshape((1,) * (x.ndim - 1) + (-1,))).sum(axis=-1)
  return lax.platform_dependent(x, scale, cpu=product, default=plain)


normalize.defvjp(_forward, _backward)
