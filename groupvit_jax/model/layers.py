"""Transformer parts shared by both towers: attention, MLPs, the pre-norm block, stochastic depth."""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Literal

from flax import linen as nn
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from groupvit_jax.model import tpu_attention
from groupvit_jax.model.attention import cross_attend, Implementation, is_cudnn_attention, self_attend
from groupvit_jax.model.tpu_attention import TpuAttention

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]
Activation = Callable[[jax.Array], jax.Array]

# Activations that a block keeps for the backward pass: all, the results of matmuls with weights, or none. The rest is
# recomputed.
Remat = Literal['none', 'dots', 'blocks']

# torch's epsilon; Flax's default is 1e-6.
LAYER_NORM_EPS = 1e-5

# A norm's mean and rate, by their names in checkpoint policies: two numbers a row, for two passes over it.
_SAVED = 'mean', 'rate'


def _from_its_input(function: Activation, slope: Activation) -> Activation:
  """The function, computed in float32 as torch does it, with x as the only residual of its backward pass.

  Args:
    function: of x.
    slope: its derivative at x. It must share no expensive operation with `function`, because compilers would compute
      that once, in the forward pass, and keep its result beside x.
  """
  in_float32 = lambda f: functools.wraps(f)(lambda x: f(x.astype(jnp.float32)).astype(x.dtype))
  forward, derivative = in_float32(function), in_float32(slope)
  activation = jax.custom_vjp(forward)
  activation.defvjp(lambda x: (forward(x), x), lambda x, grad: (grad * derivative(x),))
  return functools.wraps(function)(activation)


# Of log(P / (1 - P)) / x for P = _normal(x), a polynomial of x^2 up to x = 5.5, fitted to P by weighted least squares.
_LOGIT = (1.59576988, 7.26661691e-2, -6.51899371e-5, -1.10612394e-4, 7.92949018e-6, -2.64526796e-7, 3.51234500e-9)


def _normal(x: jax.Array) -> jax.Array:
  """The normal distribution function; on TPUs by the instruction for tanh: erf takes their compiler 2.5 times as long.

  Flax's exact form of GELU has erfc, which is slower on CPUs.
  """
  return lax.platform_dependent(x, tpu=normal_by_tanh, default=lambda x: 0.5 * (1 + lax.erf(x * 0.5**0.5)))


def normal_by_tanh(x: jax.Array) -> jax.Array:
  """The normal distribution function of float32 numbers, off by at most 1.6e-7, as erf is."""
  squared = jnp.minimum(x * x, 5.5**2)
  return sigmoid_by_tanh(x * functools.reduce(lambda total, factor: total * squared + factor, reversed(_LOGIT)))


def _sigmoid(x: jax.Array) -> jax.Array:
  """The logistic function; on TPUs by the instruction for tanh."""
  return lax.platform_dependent(x, tpu=sigmoid_by_tanh, default=jax.nn.sigmoid)


def sigmoid_by_tanh(x: jax.Array) -> jax.Array:
  return 0.5 + 0.5 * jnp.tanh(0.5 * x)


def _exact_gelu(x: jax.Array) -> jax.Array:
  """The exact form; Flax's default is the tanh approximation of Hendrycks and Gimpel, off by 5e-4."""
  return x * _normal(x)


def _exact_gelu_slope(x: jax.Array) -> jax.Array:
  """The normal distribution function, by P(-x) = 1 - P(x), and x times its density."""
  density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
  return 1 - _normal(-x) + x * density


def _quick_gelu(x: jax.Array) -> jax.Array:
  """CLIP's activation, x * sigmoid(1.702 x), for an array of any shape."""
  return x * _sigmoid(1.702 * x)


def _quick_gelu_slope(x: jax.Array) -> jax.Array:
  """By sigmoid(-x) = 1 - sigmoid(x)."""
  rest = _sigmoid(-1.702 * x)
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
  rows = _rows(x).astype(jnp.float32)
  mean = rows.mean(axis=1, keepdims=True)
  # Both means in one pass, which compilers fuse into what computes x.
  variance = jnp.maximum(jnp.square(rows).mean(axis=1, keepdims=True) - jnp.square(mean), 0)
  mean, rate = map(checkpoint_name, (mean, lax.rsqrt(variance + LAYER_NORM_EPS)), _SAVED)
  return ((rows - mean) * rate * scale[None] + bias[None]).reshape(x.shape), (x, mean, rate, scale)


def _normalize_backward(saved, grad):
  x, mean, rate, scale = saved
  grad = _rows(grad)
  normal = (_rows(x).astype(jnp.float32) - mean) * rate
  # Means over features of grad * scale and of grad * scale * normal.
  straight = _add_up(grad, scale)[:, None] / x.shape[-1]
  sideways = _add_up(grad * normal, scale)[:, None] / x.shape[-1]
  grad_x = rate * (grad * scale[None] - straight - normal * sideways)
  return grad_x.astype(x.dtype).reshape(x.shape), (grad * normal).sum(axis=0), grad.sum(axis=0)


def _add_up(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Sums [rows] over features of x * scale. Elsewhere than on CPUs a product would round, and not be fused."""
  product = lambda x, scale: jnp.einsum('rd,d->r', x, scale, precision='highest')
  plain = lambda x, scale: (x * scale[None]).sum(axis=1)
  return lax.platform_dependent(x, scale, cpu=product, default=plain)


normalize.defvjp(_normalize_forward, _normalize_backward)


def project(
  x: jax.Array,
  kernel: jax.Array,
  dimension_numbers: lax.DotDimensionNumbers | None = None,
  precision: lax.PrecisionLike = None,
  saved: str | None = None,
) -> jax.Array:
  """A `dot_general` for dense layers: x [..., K] and kernel [K, F] -> [..., F].

  Its gradients are matmuls of two-dimensional arrays, in layouts that suit CPUs.
  `saved` names x in checkpoint policies.
  """
  del dimension_numbers  # those of Flax's dense layers
  return _project(x, kernel, precision, saved)


def _multiply(x: jax.Array, kernel: jax.Array, precision: lax.PrecisionLike, saved: str | None = None) -> jax.Array:
  """The matmul where there is no backward pass."""
  del saved
  # Processors with bfloat16 instructions use them only where the result is float32.
  out = lax.dot(_rows(x), kernel, precision=precision, preferred_element_type=jnp.float32)
  return out.astype(x.dtype).reshape(*x.shape[:-1], -1)


def _rows(x: jax.Array) -> jax.Array:
  """All but the last axis as one."""
  return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


_project = jax.custom_vjp(_multiply, nondiff_argnums=(2, 3))


def _project_forward(x, kernel, precision, saved):
  out = lax.dot(_rows(x), kernel, precision=precision).reshape(*x.shape[:-1], -1)  # in sight of checkpoint policies
  return out, (x if saved is None else checkpoint_name(x, saved), kernel)


def _project_backward(precision, _, saved, grad):
  x, kernel = saved
  # Two matmuls read the gradient. On CPUs each would recompute, with strides, what produces it.
  grad = _rows(lax.platform_dependent(grad, cpu=lax.optimization_barrier, default=lambda grad: grad))
  grad_x = lax.dot_general(grad, kernel, (((1,), (1,)), ((), ())), precision)
  grad_kernel = lax.dot_general(_rows(x), grad, (((0,), (0,)), ((), ())), precision)
  return grad_x.reshape(x.shape), grad_kernel


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


def drop_path(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
  """Stochastic depth: zeroes whole samples of a residual branch [B, ...] and rescales the others.

  `rate` is the probability of dropping a sample; without keys [B] nothing is dropped.
  """
  if keys is None or rate == 0:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate))(keys)
  return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x / (1 - rate), 0).astype(x.dtype)


def torch_uniform(fan_in: int) -> Initializer:
  """Torch's default of a Linear or Conv2d, for its kernel and its bias: uniform in +-1 / sqrt(fan-in)."""
  bound = fan_in**-0.5
  return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def bias_init(torch_init: bool, fan_in: int) -> Initializer:
  """How a bias starts: as torch's default, or at zero."""
  return torch_uniform(fan_in) if torch_init else nn.initializers.zeros


@dataclasses.dataclass(frozen=True)
class BlockInit:
  """Kernel initialisers of a transformer block; biases start at zero, but for the MLP's where they start as torch's."""

  attn_in: Initializer
  attn_out: Initializer
  mlp_in: Initializer
  mlp_out: Initializer
  torch_biases: bool = False

  @classmethod
  def uniform(cls, kernel: Initializer) -> 'BlockInit':
    """The same initialiser everywhere."""
    return cls(kernel, kernel, kernel, kernel)


def rematerialized(module: type[nn.Module], remat: Remat) -> type[nn.Module]:
  """The module class with activations recomputed as `remat` says; parameters are the same."""
  if remat == 'none':
    return module
  policies = jax.checkpoint_policies
  names = policies.save_only_these_names(*_SAVED, *tpu_attention.SAVED)
  dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, names)
  keep = policies.save_from_both_policies(dots, is_cudnn_attention)
  return nn.remat(module, policy=keep if remat == 'dots' else None)


class Mlp(nn.Module):
  """Two dense layers over the last axis, [..., D] -> [..., out]."""

  hidden: int
  out: int
  kernel_in: Initializer
  kernel_out: Initializer
  activation: Activation = exact_gelu
  dtype: jnp.dtype = jnp.float32
  torch_biases: bool = False  # at the start, else zero

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = functools.partial(nn.Dense, dot_general=project, dtype=self.dtype)
    biases = [bias_init(self.torch_biases, fan_in) for fan_in in (x.shape[-1], self.hidden)]
    hidden = dense(self.hidden, kernel_init=self.kernel_in, bias_init=biases[0], name='fc1')(_rows(x))
    out = dense(self.out, kernel_init=self.kernel_out, bias_init=biases[1], name='fc2')(self.activation(hidden))
    return out.reshape(*x.shape[:-1], self.out)


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


class HeadsDense(nn.Module):
  """A dense layer [..., K] -> [..., F] whose parameters name heads, computed as one matmul of matrices."""

  inputs: tuple[int, ...]  # of the kernel, K together
  features: tuple[int, ...]  # F together
  kernel_init: Initializer
  dtype: jnp.dtype = jnp.float32
  arrange: Callable[[jax.Array], jax.Array] = lambda x: x  # reorders features of a parameter [..., *features]
  saved: str | None = None  # names its input in checkpoint policies

  def __call__(self, x: jax.Array) -> jax.Array:
    product, bias = self.parts(x)
    return product + bias.reshape((1,) * (x.ndim - 1) + (-1,))

  @nn.compact
  def parts(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What is [..., F] before the bias [F] is added, and the bias."""
    flat = math.prod(self.inputs), math.prod(self.features)
    init = lambda key, shape, dtype: self.kernel_init(key, flat, dtype).reshape(shape)
    kernel = self.param('kernel', init, (*self.inputs, *self.features), jnp.float32)
    bias = self.param('bias', nn.initializers.zeros, self.features, jnp.float32)
    kernel, bias = self.arrange(kernel).reshape(flat), self.arrange(bias).reshape(-1)
    return project(x.astype(self.dtype), kernel.astype(self.dtype), saved=self.saved), bias.astype(self.dtype)


class SelfAttention(nn.Module):
  """Multi-head self-attention with one fused query/key/value projection, [B, N, D] -> [B, N, D]."""

  num_heads: int
  kernel_in: Initializer
  kernel_out: Initializer
  dtype: jnp.dtype = jnp.float32
  attention: Implementation = 'xla'

  @nn.compact
  def __call__(self, x: jax.Array, texts: jax.Array | None = None) -> jax.Array:
    width = x.shape[-1]
    heads = self.num_heads, width // self.num_heads
    dense = HeadsDense((width,), (3, *heads), self.kernel_in, self.dtype, self._by_shard, name='qkv')
    out = self_attend(*dense.parts(x), self.num_heads, texts, self.attention)
    saved = tpu_attention.saved_output(self.attention)
    return HeadsDense(heads, (width,), self.kernel_out, self.dtype, saved=saved, name='out')(out)

  def _by_shard(self, param: jax.Array) -> jax.Array:
    """[..., 3, h, k] with query, key and value of each device's heads together, where devices divide heads."""
    if not isinstance(self.attention, TpuAttention):
      return param
    *rest, three, heads, size = param.shape
    shards = self.attention.shards(heads)
    param = param.reshape(*rest, three, shards, heads // shards, size).swapaxes(-4, -3)
    # Its gradient is a matmul's result as it stands: compilers would rather transpose an operand, which is far larger.
    return lax.optimization_barrier(param.reshape(*rest, -1))


class CrossAttention(nn.Module):
  """Multi-head attention of queries [B, S, D] on tokens [B, N, D], -> [B, S, D]."""

  num_heads: int
  kernel: Initializer
  dtype: jnp.dtype = jnp.float32
  attention: Implementation = 'xla'

  @nn.compact
  def __call__(self, queries: jax.Array, tokens: jax.Array) -> jax.Array:
    width = queries.shape[-1]
    heads = self.num_heads, width // self.num_heads

    dense = lambda name: HeadsDense((width,), heads, self.kernel, self.dtype, name=name)
    parts = [dense(name).parts(x) for name, x in (('query', queries), ('key', tokens), ('value', tokens))]
    out = cross_attend(*zip(*parts), self.num_heads, self.attention)
    saved = tpu_attention.saved_output(self.attention)
    return HeadsDense(heads, (width,), self.kernel, self.dtype, saved=saved, name='out')(out)


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
  def __call__(self, x: jax.Array, *, texts: jax.Array | None = None, keys: jax.Array | None = None) -> jax.Array:
    """Applies the block.

    Args:
      x: tokens [B, N, D].
      texts: [B, N] or [1, N], the text that each token is of: it sees those before it in that text. None: all see all.
      keys: [B], source of stochastic depth; None keeps every branch.

    Returns:
      Tokens [B, N, D].
    """
    width, init = x.shape[-1], self.init
    attn = SelfAttention(self.num_heads, init.attn_in, init.attn_out, self.dtype, self.attention, name='attn')
    x = x + drop_path(attn(LayerNorm(name='norm1')(x), texts), self.drop_rate, fold_keys(keys, 0))
    hidden, kernels = int(width * self.mlp_ratio), (init.mlp_in, init.mlp_out)
    mlp = Mlp(hidden, width, *kernels, self.activation, self.dtype, init.torch_biases, name='mlp')
    return x + drop_path(mlp(LayerNorm(name='norm2')(x)), self.drop_rate, fold_keys(keys, 1))
