"""Self-attention in one Pallas kernel for TPUs, in which no array of scores reaches the main memory.

A block is the fused query, key and value [N, 3 D] of some samples, and heads are slices of it: nothing is transposed.
The backward pass computes the weights again.
"""

from collections.abc import Callable
import dataclasses
import functools
import math

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# By their names in checkpoint policies: the kernel's input and output, without which it would run again.
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
    padding: how many tokens at the end none attends to.
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

  def shards(self, num_heads: int) -> int:
    """Over how many devices heads are divided."""
    size = self.mesh.shape['model']
    return 1 if num_heads % size else size

  def fits(self, qkv: jax.ShapeDtypeStruct, num_heads: int) -> bool:
    """Whether the kernel takes arrays [B, N, 3 D]: B and N are numbers, and the backward pass fits in a core's VMEM.

    With D = 384 and heads on one device it does for up to 680 tokens in bfloat16, 512 in float32.
    """
    batch, tokens, width = qkv.shape
    if jax.export.is_symbolic_dim(batch) or jax.export.is_symbolic_dim(tokens):
      return False
    # Two buffers of qkv, the output and both gradients; scores, exponentials, their gradients, and one more.
    row = 8 * (width // 3 // self.shards(num_heads)) * qkv.dtype.itemsize
    scores = 4 * 4 * _up(tokens, _ROWS) * _up(tokens, _LANES)
    return 2 * _samples_of_block(batch, tokens) * tokens * row + scores <= _VMEM_BYTES

  def attend(self, qkv: jax.Array, bias: jax.Array, num_heads: int, texts: jax.Array | None) -> jax.Array:
    """Attended values [B, N, D].

    Args:
      qkv: [B, N, 3 D]; where devices divide heads, the three of each device stand together.
      bias: [3 D], to be added to `qkv`.
      num_heads: of all devices.
      texts: [B, N] or [1, N], the text that each token is of: it sees those before it in that text. None: all see all.
    """
    if texts is not None:
      texts = jnp.broadcast_to(texts, qkv.shape[:2])[:, None]
    return _attend(self, num_heads, qkv, bias, texts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(how: TpuAttention, num_heads: int, qkv: jax.Array, bias: jax.Array, texts: jax.Array | None) -> jax.Array:
  return _forward(how, num_heads, qkv, bias, texts)[0]


def _forward(how, num_heads, qkv, bias, texts):
  qkv = checkpoint_name(qkv + bias[None, None], SAVED[0])
  out = checkpoint_name(*_run(how, num_heads, _forward_head, 1, texts, qkv), SAVED[1])
  return out, (qkv, texts, out)


def _backward(how, num_heads, saved, grad):
  qkv, texts, out = saved
  grad, sums = _run(how, num_heads, _backward_head, 3, texts, qkv, out, grad)
  return grad, sums.sum(axis=(0, 1)).astype(grad.dtype), None


_attend.defvjp(_forward, _backward)


def _run(
  how: TpuAttention, num_heads: int, head: Callable, num_results: int, texts: jax.Array | None, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
  """Runs a kernel that makes `num_results` arrays [N, k] of each head.

  Returns:
    Them, [B, N, num_results * D]; of several also their float32 sums over each of n blocks, [n, 1, num_results * D].
  """
  shards, mesh = how.shards(num_heads), how.mesh.shape
  divided = arrays[0].shape[0] % (mesh['data'] * mesh['fsdp']) == 0  # not the one sample that initialises a model
  batch = ('data', 'fsdp') if divided else None
  spec = PartitionSpec(batch, None, 'model' if shards > 1 else None)
  specs = (None if texts is None else PartitionSpec(batch), *[spec] * len(arrays))
  run = functools.partial(_run_on_device, how, num_heads // shards, head, num_results)
  outputs = (spec,) if num_results == 1 else (spec, spec)
  return jax.shard_map(run, mesh=how.mesh, in_specs=specs, out_specs=outputs, check_vma=False)(texts, *arrays)


def _run_on_device(how, num_heads, head, num_results, texts, *arrays):
  batch, tokens, width = arrays[0].shape
  size = width // 3 // num_heads
  samples, real = _samples_of_block(batch, tokens), tokens - how.padding
  inputs = arrays if texts is None else (*arrays, texts)
  out = jax.ShapeDtypeStruct((batch, tokens, num_results * num_heads * size), arrays[0].dtype)
  sums = jax.ShapeDtypeStruct((batch // samples, 1, out.shape[2]), jnp.float32)
  outputs = (out,) if num_results == 1 else (out, sums)

  def kernel(*refs):
    (out, *sums) = refs[len(inputs) :]
    for ref in sums:
      ref[...] = jnp.zeros_like(ref)

    def attend(sample, _):
      mask = None if texts is None else _causal_mask(refs[len(arrays)][sample], real)
      for i in range(num_heads):
        parts = [
          ref[sample, :, start + i * size : start + (i + 1) * size]
          for ref in refs[: len(arrays)]
          for start in range(0, ref.shape[-1], num_heads * size)
        ]
        for j, result in enumerate(head(real, mask, *parts)):
          start = (j * num_heads + i) * size
          out[sample, :, start : start + size] = result.astype(out.dtype)
          for ref in sums:
            ref[0, :, start : start + size] += result.sum(axis=0, keepdims=True)

    lax.fori_loop(0, samples, attend, None)

  block = lambda x: pl.BlockSpec((samples * x.shape[0] // batch, *x.shape[1:]), lambda i: (i, 0, 0))
  return pl.pallas_call(
    kernel,
    outputs,
    grid=(batch // samples,),
    in_specs=[block(x) for x in inputs],
    out_specs=[block(x) for x in outputs],
    interpret=how.interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    cost_estimate=_cost(out, (*inputs, *outputs), num_heads, num_results),
    name=head.__name__.strip('_'),
  )(*inputs)


def _forward_head(real, mask, query, key, value):
  """Attended values of one head, normalised after they are summed."""
  key, value = key[:real], value[:real]
  weights, norm = _weights(query, key, mask)
  return (_dot(weights.astype(value.dtype), value, 1, 0) * norm,)


def _backward_head(real, mask, query, key, value, out, grad):
  """Gradients of one head's query, key and value."""
  key, value = key[:real], value[:real]
  weights, norm = _weights(query, key, mask)
  grad = grad * norm
  shared = (grad * out).sum(axis=-1, keepdims=True)  # the softmax's correction, equal for all keys of a query
  grad = grad.astype(value.dtype)
  grad_scores = (weights * (_dot(grad, value, 1, 1) - shared)).astype(query.dtype)
  scale, pad = query.shape[-1] ** -0.5, ((0, len(query) - real), (0, 0))
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


def _cost(out, arrays, num_heads, num_results) -> pl.CostEstimate:
  """What groupvit_jax/aot counts: full tiles of matmuls, and passes of the vector unit over the scores.

  For 260 tokens and 6 heads of 64 on a v5e that makes 4,160 cycles a sample forward and 10,100 backward. The schedules
  that libtpu 0.0.52 writes (`LIBTPU_INIT_ARGS=--xla_jf_dump_to=...`) have 3,638 and 9,925 bundles.
  """
  batch, tokens, _ = out.shape
  scores = batch * num_heads * _up(tokens, _ROWS) * _up(tokens, _LANES)
  matmuls, passes = (2, 3) if num_results == 1 else (5, 7)
  return pl.CostEstimate(
    flops=matmuls * 2 * scores * _LANES,
    transcendentals=passes * scores,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
  )
