"""Transformer parts shared by both towers: attention, MLPs, the pre-norm block, stochastic depth."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Literal

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from groupvit_jax.model.attention import attend, Implementation

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
Activation = Callable[[jax.Array], jax.Array]

# Activations that a block keeps for the backward pass: all, the results of matmuls with weights, or none. The rest is
# recomputed.
Remat = Literal['none', 'dots', 'blocks']

# torch's epsilon; Flax's default is 1e-6.
LAYER_NORM_EPS = 1e-5


def _from_its_input(function: Activation, slope: Activation) -> Activation:
  """The function, with x as the only residual of its backward pass.

  Args:
    function: of x.
    slope: its derivative at x. It must share no expensive operation with `function`, because compilers would compute
      that once, in the forward pass, and keep its result beside x.
  """
  activation = jax.custom_vjp(function)
  activation.defvjp(lambda x: (function(x), x), lambda x, grad: (grad * slope(x),))
  return functools.wraps(function)(activation)


def _exact_gelu(x: jax.Array) -> jax.Array:
  """The erf form; Flax's default is the tanh approximation, and its erf form is computed by the slower erfc."""
  return 0.5 * x * (1 + lax.erf(x * 0.5**0.5))


def _exact_gelu_slope(x: jax.Array) -> jax.Array:
  """The normal distribution function, by erf(-x) = -erf(x), and x times its density."""
  density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
  return 0.5 * (1 - lax.erf(-x * 0.5**0.5)) + x * density


def _quick_gelu(x: jax.Array) -> jax.Array:
  """CLIP's activation, x * sigmoid(1.702 x), for an array of any shape."""
  return x * jax.nn.sigmoid(1.702 * x)


def _quick_gelu_slope(x: jax.Array) -> jax.Array:
  """By sigmoid(-x) = 1 - sigmoid(x)."""
  rest = jax.nn.sigmoid(-1.702 * x)
  return (1 - rest) * (1 + 1.702 * x * rest)


exact_gelu = _from_its_input(_exact_gelu, _exact_gelu_slope)
quick_gelu = _from_its_input(_quick_gelu, _quick_gelu_slope)


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
  return _normalize_forward(x, scale, bias)[0]


def _normalize_forward(x, scale, bias):
  wide = x.astype(jnp.float32)
  mean = wide.mean(axis=-1, keepdims=True)
  rate = lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)
  along = (1,) * (x.ndim - 1) + (-1,)
  return (wide - mean) * rate * scale.reshape(along) + bias.reshape(along), (x, mean, rate, scale)


def _normalize_backward(saved, grad):
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


normalize.defvjp(_normalize_forward, _normalize_backward)


def project(
  x: jax.Array, kernel: jax.Array, dimension_numbers: lax.DotDimensionNumbers, precision: lax.PrecisionLike = None
) -> jax.Array:
  """A `dot_general` for Flax's dense layers: x [..., *K] and kernel [*K, *F] -> [..., *F].

  Its gradients are matmuls of two-dimensional arrays, in layouts that suit CPUs.
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


def _project_forward(x, kernel, axes, precision):
  return _multiply(x, kernel, axes, precision), (x, kernel)


def _project_backward(axes, precision, saved, grad):
  x, kernel = saved
  # Two matmuls read the gradient. On CPUs each would recompute, with strides, what produces it.
  grad = lax.platform_dependent(grad, cpu=lax.optimization_barrier, default=lambda grad: grad)
  grad = _rows(grad, kernel.ndim - axes)
  # With the axes that x and the kernel share flattened to one, neither is transposed first.
  flat = kernel.reshape(-1, *kernel.shape[axes:])
  features = tuple(range(1, grad.ndim))
  grad_x = lax.dot_general(grad, flat, ((features, features), ((), ())), precision)
  grad_kernel = lax.dot_general(x.reshape(len(grad), -1), grad, (((0,), (0,)), ((), ())), precision)
  return grad_x.reshape(x.shape), grad_kernel.reshape(kernel.shape)


_project.defvjp(_project_forward, _project_backward)


def sample_keys(key: jax.Array, batch: int) -> jax.Array:
  """Keys [B], one for each sample of a global batch.

  All noise is drawn per sample from these, so it depends on the row in the global batch and not on the rows computed
  with it.
  """
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def fold_keys(keys: jax.Array | None, data: int) -> jax.Array | None:
  """`fold_in` for the keys [B] of samples; None stays None."""
  return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def drop_path(x: jax.Array, rate: float | jax.Array, keys: jax.Array | None) -> jax.Array:
  """Stochastic depth: zeroes whole samples of a residual branch [B, ...] and rescales the others.

  `rate` is the probability of dropping a sample; without keys [B] nothing is dropped.
  """
  if keys is None or (isinstance(rate, float) and rate == 0):
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate))(keys)
  return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x / (1 - rate), 0).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class BlockInit:
  """Kernel initialisers of a transformer block; biases start at zero."""

  attn_in: Initializer
  attn_out: Initializer
  mlp_in: Initializer
  mlp_out: Initializer

  @classmethod
  def uniform(cls, kernel: Initializer) -> 'BlockInit':
    """The same initialiser everywhere."""
    return cls(kernel, kernel, kernel, kernel)


def rematerialized(module: type[nn.Module], remat: Remat) -> type[nn.Module]:
  """The module class with activations recomputed as `remat` says; parameters are the same."""
  if remat == 'none':
    return module
  dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return nn.remat(module, policy=dots if remat == 'dots' else None)


class Mlp(nn.Module):
  """Two dense layers over the last axis, [..., D] -> [..., out]."""

  hidden: int
  out: int
  kernel_in: Initializer
  kernel_out: Initializer
  activation: Activation = exact_gelu
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = functools.partial(nn.Dense, dot_general=project, dtype=self.dtype)
    x = dense(self.hidden, kernel_init=self.kernel_in, name='fc1')(x)
    x = self.activation(x)
    return dense(self.out, kernel_init=self.kernel_out, name='fc2')(x)


class TokenMixer(nn.Module):
  """An MLP across the token axis, [B, G, D] -> [B, S, D]."""

  hidden: int
  out: int  # S
  kernel: Initializer
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    mlp = Mlp(self.hidden, self.out, self.kernel, self.kernel, dtype=self.dtype, name='mlp')
    return mlp(x.swapaxes(-1, -2)).swapaxes(-1, -2)


@jax.custom_vjp
def unfuse(qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Query, key and value [B, N, h, k] of a fused projection [B, N, 3, h, k].

  Their gradients are stacked; indexing would pad each with zeros and add them up.
  """
  return tuple(qkv[..., i, :, :] for i in range(3))


unfuse.defvjp(lambda qkv: (unfuse(qkv), None), lambda _, grads: (jnp.stack(grads, axis=-3),))


class SelfAttention(nn.Module):
  """Multi-head self-attention with one fused query/key/value projection, [B, N, D] -> [B, N, D]."""

  num_heads: int
  kernel_in: Initializer
  kernel_out: Initializer
  dtype: jnp.dtype = jnp.float32
  attention: Implementation = 'xla'

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    width = x.shape[-1]
    qkv = nn.DenseGeneral(
      (3, self.num_heads, width // self.num_heads),
      kernel_init=self.kernel_in,
      dtype=self.dtype,
      dot_general=project,
      name='qkv',
    )(x)
    out = attend(*unfuse(qkv), mask, self.attention)
    return nn.DenseGeneral(
      width, axis=(-2, -1), kernel_init=self.kernel_out, dtype=self.dtype, dot_general=project, name='out'
    )(out)


class CrossAttention(nn.Module):
  """Multi-head attention of queries [B, S, D] on tokens [B, N, D], -> [B, S, D]."""

  num_heads: int
  kernel: Initializer
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, queries: jax.Array, tokens: jax.Array) -> jax.Array:
    width = queries.shape[-1]
    dense = functools.partial(nn.DenseGeneral, kernel_init=self.kernel, dtype=self.dtype, dot_general=project)
    heads = (self.num_heads, width // self.num_heads)
    out = attend(
      dense(heads, name='query')(queries), dense(heads, name='key')(tokens), dense(heads, name='value')(tokens)
    )
    return dense(width, axis=(-2, -1), name='out')(out)


class Block(nn.Module):
  """Pre-norm transformer block with stochastic depth, [B, N, D] -> [B, N, D]."""

  num_heads: int
  mlp_ratio: float
  init: BlockInit
  activation: Activation = exact_gelu
  drop_rate: float = 0.0
  dtype: jnp.dtype = jnp.float32
  attention: Implementation = 'xla'

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    *,
    mask: jax.Array | None = None,
    keys: jax.Array | None = None,
    drop_rate: jax.Array | None = None,
  ) -> jax.Array:
    """Applies the block.

    Args:
      x: tokens [B, N, D].
      mask: what each token may attend to, broadcasting to [B, h, N, N].
      keys: [B], source of stochastic depth; None keeps every branch.
      drop_rate: [], instead of the module's.

    Returns:
      Tokens [B, N, D].
    """
    width, init = x.shape[-1], self.init
    rate = self.drop_rate if drop_rate is None else drop_rate
    attn = SelfAttention(self.num_heads, init.attn_in, init.attn_out, self.dtype, self.attention, name='attn')
    x = x + drop_path(attn(LayerNorm(name='norm1')(x), mask), rate, fold_keys(keys, 0))
    mlp = Mlp(int(width * self.mlp_ratio), width, init.mlp_in, init.mlp_out, self.activation, self.dtype, name='mlp')
    return x + drop_path(mlp(LayerNorm(name='norm2')(x)), rate, fold_keys(keys, 1))


def scan_blocks(
  block: nn.Module,
  params: Sequence[dict],
  x: jax.Array,
  *,
  mask: jax.Array | None = None,
  keys: jax.Array | None = None,
  drop_rates: Sequence[float] | None = None,
) -> jax.Array:
  """Applies blocks of one shape in a `lax.scan`, so that the compiler sees one of them.

  Args:
    block: a `Block` that has no parent.
    params: of each block.
    x: tokens [B, N, D].
    mask: as a block takes it.
    keys: [B], of all the blocks; each folds in its number.
    drop_rates: of each block; None for none.

  Returns:
    Tokens [B, N, D].
  """
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
  rates = jnp.zeros(len(params)) if drop_rates is None else jnp.array(drop_rates, jnp.float32)

  def step(x, inputs):
    params, rate, i = inputs
    rate = None if drop_rates is None else rate
    return block.apply({'params': params}, x, mask=mask, keys=fold_keys(keys, i), drop_rate=rate), None

  return lax.scan(step, x, (stacked, rates, jnp.arange(len(params))))[0]
