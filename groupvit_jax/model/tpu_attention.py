"""Attention in one Pallas kernel for TPUs, in which no array of scores reaches the main memory.

A block is the query, key and value of some samples, fused [N, 3 D] or apart, and heads are slices of them: nothing is
transposed. The backward pass computes the weights again.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# By their names in checkpoint policies: the kernel's inputs and output, without which it would run again.
SAVED = 'qkv', 'attended'

# A tile of memory. Arrays [B, N, D] and [B * N, D] are the same bytes where its rows divide N.
_ROWS, _LANES = 8, 128
_VMEM_BYTES = 16 * 2**20  # that a kernel may use on every TPU
_BLOCK_TOKENS = 256  # of several samples; with fewer, starting a block takes longer than its work


@dataclasses.dataclass(frozen=True)
class TpuAttention:
  """Attention by the kernel, on each device for its samples and heads.

  Attributes:
    mesh: divides samples over data and fsdp, heads over model.
    padding: how many keys at the end none attends to.
    interpret: runs on CPUs, for tests.
  """

  mesh: Mesh
  padding: int = 0
  interpret: bool = False

  def __str__(self) -> str:
    return 'pallas'

  def padded(self, num_tokens: int) -> 'TpuAttention':
    """The same, for so many tokens and the padding that fills their tiles."""
    return dataclasses.replace(self, padding=-num_tokens % _ROWS)

  def seen(self, num_tokens: int) -> jax.Array:
    """Booleans [1, 1, 1, N], False for padding."""
    return jnp.arange(num_tokens)[None, None, None] < num_tokens - self.padding

  def shards(self, num_heads: int) -> int:
    """Over how many devices heads are divided."""
    size = self.mesh.shape['model']
    return 1 if num_heads % size else size

  def fits(self, num_heads: int, *arrays: jax.ShapeDtypeStruct) -> bool:
    """Whether the kernel takes these: B and N are numbers, and the backward pass fits in a core's VMEM.

    With D = 384 and heads on one device it does for up to 680 tokens in bfloat16, 512 in float32.

    Args:
      num_heads: of all devices.
      *arrays: as for `attend`.
    """
    batch, queries, _ = arrays[0].shape
    if any(jax.export.is_symbolic_dim(size) for x in arrays for size in x.shape[:2]):
      return False
    # Two buffers of inputs, the output and all gradients; scores, exponentials, their gradients, and one more.
    widths = [x.shape[1] * x.shape[2] for x in arrays]
    sample = 2 * (sum(widths) + queries * _width(arrays)) * arrays[0].dtype.itemsize // self.shards(num_heads)
    scores = 4 * 4 * _up(queries, _ROWS) * _up(arrays[-1].shape[1], _LANES)
    return 2 * _samples_of_block(batch, queries) * sample + scores <= _VMEM_BYTES

  def attend(
    self, arrays: Sequence[jax.Array], biases: Sequence[jax.Array], num_heads: int, texts: jax.Array | None = None
  ) -> jax.Array:
    """Attended values [B, N, D].

    Args:
      arrays: query, key and value, as one array [B, N, 3 D] or as [B, N, D] and twice [B, M, D]. Where devices divide
        heads, the three of each device stand together in the first.
      biases: to be added to them, [3 D] or each [D].
      num_heads: of all devices.
      texts: [B, N] or [1, N], the text that each token is of: it sees those before it in that text. None: all see all.
    """
    if texts is not None:
      texts = jnp.broadcast_to(texts, arrays[0].shape[:2])[:, None]
    return _attend(self, num_heads, tuple(arrays), tuple(biases), texts)


def row_major(x: jax.Array, implementation: object) -> jax.Array:
  """The same array, and gradient, as the kernel reads it: compilers for TPUs would rather put tokens before samples."""
  return with_layout_constraint(x, Layout(range(x.ndim))) if isinstance(implementation, TpuAttention) else x


def saved_output(implementation: object) -> str | None:
  """The name that what reads an attention's output gives to it, for its own backward pass.

  Of one name for both uses, JAX rounds what it saves to the precision that it has, a pass over it.
  """
  return SAVED[1] if isinstance(implementation, TpuAttention) else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(how, num_heads, arrays, biases, texts):
  return _forward(how, num_heads, arrays, biases, texts)[0]


def _forward(how, num_heads, arrays, biases, texts):
  arrays = tuple(checkpoint_name(x + bias[None, None], SAVED[0]) for x, bias in zip(arrays, biases))
  (out,) = _run(how, num_heads, _forward_head, texts, arrays)
  return out, (arrays, texts, checkpoint_name(out, SAVED[1]))


def _backward(how, num_heads, saved, grad):
  arrays, texts, out = saved
  found = _run(how, num_heads, _backward_head, texts, arrays, (out, grad))
  grads, sums = found[: len(arrays)], found[len(arrays) :]
  return grads, tuple(x.sum(axis=(0, 1)).astype(grad.dtype) for x in sums), None


_attend.defvjp(_forward, _backward)


def _run(
  how: TpuAttention,
  num_heads: int,
  head: Callable,
  texts: jax.Array | None,
  arrays: Sequence[jax.Array],
  grads: Sequence[jax.Array] = (),
) -> tuple[jax.Array, ...]:
  """Runs a kernel on each device.

  Returns:
    Attended values [B, N, D]. With `grads`, the output and its gradient, the gradients of `arrays`, and of each the
    float32 sums over each of n blocks, [n, 1, width].
  """
  shards, mesh = how.shards(num_heads), how.mesh.shape
  divided = arrays[0].shape[0] % (mesh['data'] * mesh['fsdp']) == 0  # not the one sample that initialises a model
  batch = ('data', 'fsdp') if divided else None
  spec = PartitionSpec(batch, None, 'model' if shards > 1 else None)
  inputs = (*arrays, *grads)
  specs = (None if texts is None else PartitionSpec(batch), *[spec] * len(inputs))
  outputs = (spec,) * (2 * len(arrays) if grads else 1)
  run = functools.partial(_run_on_device, how, num_heads // shards, head, len(arrays))
  return jax.shard_map(run, mesh=how.mesh, in_specs=specs, out_specs=outputs, check_vma=False)(texts, *inputs)


def _run_on_device(how, num_heads, head, num_arrays, texts, *inputs):
  arrays, backward = inputs[:num_arrays], len(inputs) > num_arrays
  batch, queries, _ = arrays[0].shape
  width, samples, real = _width(arrays), _samples_of_block(batch, queries), arrays[-1].shape[1] - how.padding
  size = width // num_heads
  outputs = [jax.ShapeDtypeStruct((batch, queries, width), inputs[0].dtype)]
  if backward:
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    outputs += [jax.ShapeDtypeStruct((batch // samples, 1, x.shape[2]), jnp.float32) for x in arrays]
  operands = inputs if texts is None else (*inputs, texts)

  def kernel(*refs):
    outs = refs[len(operands) :]
    sums = outs[num_arrays:]
    for ref in sums:
      ref[...] = jnp.zeros_like(ref)
    parts_of = lambda refs, offset: [
      (i, slice(start + offset, start + offset + size))
      for i, ref in enumerate(refs)
      for start in range(0, ref.shape[-1], width)
    ]

    def attend(sample, _):
      mask = None if texts is None else _causal_mask(refs[len(inputs)][sample], real)
      for offset in range(0, width, size):
        parts = [refs[i][sample, :, part] for i, part in parts_of(refs[: len(inputs)], offset)]
        for (i, part), result in zip(parts_of(outs[:num_arrays], offset), head(real, mask, *parts), strict=True):
          outs[i][sample, :, part] = result.astype(outs[i].dtype)
          if backward:
            sums[i][0, :, part] += result.sum(axis=0, keepdims=True)

    lax.fori_loop(0, samples, attend, None)

  block = lambda x: pl.BlockSpec((samples * x.shape[0] // batch, *x.shape[1:]), lambda i: (i, 0, 0))
  return pl.pallas_call(
    kernel,
    outputs,
    grid=(batch // samples,),
    in_specs=[block(x) for x in operands],
    out_specs=[block(x) for x in outputs],
    interpret=how.interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    cost_estimate=_cost(arrays, (*operands, *outputs), num_heads, backward),
    name=head.__name__.strip('_'),
  )(*operands)


def _width(arrays: Sequence[jax.ShapeDtypeStruct]) -> int:
  """D, of query, key and value."""
  return sum(x.shape[2] for x in arrays) // 3


def _forward_head(real, mask, query, key, value):
  """Attended values of one head, normalised after they are summed."""
  key, value = key[:real], value[:real]
  weights, norm = _weights(query, key, mask)
  return (_dot(weights.astype(value.dtype), value, 1, 0) * norm,)


def _backward_head(real, mask, query, key, value, out, grad):
  """Gradients of one head's query, key and value."""
  pad = ((0, len(key) - real), (0, 0))
  key, value = key[:real], value[:real]
  weights, norm = _weights(query, key, mask)
  grad = grad * norm
  shared = (grad * out).sum(axis=-1, keepdims=True)  # the softmax's correction, equal for all keys of a query
  grad = grad.astype(value.dtype)
  grad_scores = (weights * (_dot(grad, value, 1, 1) - shared)).astype(query.dtype)
  scale = query.shape[-1] ** -0.5
  grad_value = _dot(weights.astype(value.dtype), grad, 0, 0)
  return (
    _dot(grad_scores, key, 1, 0) * scale,
    jnp.pad(_dot(grad_scores, query, 0, 0) * scale, pad),
    jnp.pad(grad_value, pad),
  )


def _weights(query, key, mask):
  """Weights [N, M] before they are normalised, and what normalises them, [N, 1]; both float32."""
  scores = _dot(query, key, 1, 1)
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  # Of base 2, as the chip computes them.
  weights = jnp.exp2((scores - scores.max(axis=-1, keepdims=True)) * (query.shape[-1] ** -0.5 * math.log2(math.e)))
  return weights, 1 / weights.sum(axis=-1, keepdims=True)


def _dot(x, y, axis, other):
  return lax.dot_general(x, y, (((axis,), (other,)), ((), ())), preferred_element_type=jnp.float32)


def _causal_mask(texts, real):
  """[1, N] -> [N, real]: whether a token sees another."""
  tokens = texts.shape[1]
  row, column = (lax.broadcasted_iota(jnp.int32, (tokens, real), axis) for axis in (0, 1))
  return (texts.reshape(tokens, 1) == texts[:, :real]) & (column <= row)


def _samples_of_block(batch: int, tokens: int) -> int:
  most = max(1, _BLOCK_TOKENS // tokens)
  return max(size for size in range(1, most + 1) if batch % size == 0)


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _cost(arrays, moved, num_heads, backward) -> pl.CostEstimate:
  """What groupvit_jax/aot counts: full tiles of matmuls, and passes of the vector unit over the scores.

  For 260 tokens and 6 heads of 64 on a v5e that makes 4,160 cycles a sample forward and 10,100 backward. The schedules
  that libtpu 0.0.52 writes (`LIBTPU_INIT_ARGS=--xla_jf_dump_to=...`) have 3,638 and 9,925 bundles.
  """
  (batch, queries, _), keys = arrays[0].shape, arrays[-1].shape[1]
  tiles = lambda rows, columns: batch * num_heads * _up(rows, _ROWS) * _up(columns, _LANES)
  # Backward two matmuls sum over queries, and three as forward over features or keys.
  tall = (3 * tiles(queries, keys) + 2 * tiles(keys, queries)) if backward else 2 * tiles(queries, keys)
  return pl.CostEstimate(
    flops=2 * tall * _LANES,
    transcendentals=(7 if backward else 3) * tiles(queries, keys),
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
  )
