"""Products of activations and kernels, with gradients laid out as compilers for CPUs want them."""

import math

import jax
from jax import lax


def project(
  x: jax.Array, kernel: jax.Array, dimension_numbers: lax.DotDimensionNumbers, precision: lax.PrecisionLike = None
) -> jax.Array:
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
  return _project(x, kernel, len(dimension_numbers[0][0]), precision)


def _multiply(x: jax.Array, kernel: jax.Array, axes: int, precision: lax.PrecisionLike) -> jax.Array:
  kept = x.shape[: x.ndim - axes]
  contracted = tuple(range(1, 1 + axes)), tuple(range(axes))
  out = lax.dot_general(_rows(x, axes), kernel, (contracted, ((), ())), precision)
  return out.reshape(*kept, *kernel.shape[axes:])


def _rows(x: jax.Array, axes: int) -> jax.Array:
  """All but the last axes as one."""
  return x.reshape(math.prod(x.shape[: x.ndim - axes]), *x.shape[x.ndim - axes :])


_project = jax.custom_vjp(_multiply, nondiff_argnums=(2, 3))


def _forward(x, kernel, axes, precision):
  return _multiply(x, kernel, axes, precision), (x, kernel)


def _backward(axes, precision, saved, grad):
  x, kernel = saved
  # Two products read the gradient. On CPUs each would compute again, with strides, what leads to it.
  grad = lax.platform_dependent(grad, cpu=lax.optimization_barrier, default=lambda grad: grad)
  grad = _rows(grad, kernel.ndim - axes)
  # With all that x and the kernel share in one axis both are read as they lie; else they would be turned around first.
  flat = kernel.reshape(-1, *kernel.shape[axes:])
  features = tuple(range(1, grad.ndim))
  grad_x = lax.dot_general(grad, flat, ((features, features), ((), ())), precision)
  grad_kernel = lax.dot_general(x.reshape(len(grad), -1), grad, (((0,), (0,)), ((), ())), precision)
  return grad_x.reshape(x.shape), grad_kernel.reshape(kernel.shape)


_project.defvjp(_forward, _backward)
