"""Products of activations and kernels, with gradients laid out as compilers for CPUs want them."""

import math

import jax
from jax import lax


def project(x: jax.Array, kernel: jax.Array, dimension_numbers: lax.DotDimensionNumbers,
            precision: lax.PrecisionLike = None) -> jax.Array:
  """A `dot_general` for Flax's dense layers: the last axes of x with the first ones of the kernel.

  All axes of x that stay are one while it multiplies.

  Args:
    x: [..., *K].
    kernel: [*K, *F].
    dimension_numbers: as `lax.dot_general` takes them; without batch axes.
    precision: of the products.

  Returns:
    [..., *F].
  """
  axes = len(dimension_numbers[0][0])
  kept = x.shape[:x.ndim - axes]
  out = _project(x.reshape(math.prod(kept), *x.shape[x.ndim - axes:]), kernel, axes, precision)
  return out.reshape(*kept, *kernel.shape[axes:])


def _multiply(x: jax.Array, kernel: jax.Array, axes: int, precision: lax.PrecisionLike) -> jax.Array:
  contracted = tuple(range(1, 1 + axes)), tuple(range(axes))
  return lax.dot_general(x, kernel, (contracted, ((), ())), precision)


_project = jax.custom_vjp(_multiply, nondiff_argnums=(2, 3))


def _forward(x, kernel, axes, precision):
  return _multiply(x, kernel, axes, precision), (x, kernel)


def _backward(axes, precision, saved, grad):
  x, kernel = saved
  # Two products read the gradient. On CPUs each would compute again, with strides, what leads to it.
  grad = lax.platform_dependent(grad, cpu=lax.optimization_barrier, default=lambda grad: grad)
  features = tuple(range(1, grad.ndim)), tuple(range(axes, kernel.ndim))
  return (lax.dot_general(grad, kernel, (features, ((), ())), precision),
          lax.dot_general(x, grad, (((0,), (0,)), ((), ())), precision))


_project.defvjp(_forward, _backward)
