"""Log-sum-exp along the rows and columns of a matrix of logits that is too large to hold.

The logits are the products of R rows and C columns, vectors of E. No more than [R of a device, block] of them exist at
a time, in the forward pass and in the backward pass, which computes them again. Rows and columns are divided over
devices alike: the columns stay, the rows travel round a ring of the devices and meet all columns, their sums
travelling with them. So a device holds what belongs to its own rows and columns, however many devices there are.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# Stands for a logit that does not count: finite, so that differences of two are no nan.
_NEVER = float(jnp.finfo(jnp.float32).min)
_NOWHERE = int(jnp.iinfo(jnp.int32).max)


class LogSumExp(NamedTuple):
  """What is known of a matrix of logits [R, C]."""

  rows: jax.Array  # [R], log of the sum of a row's exponentials
  columns: jax.Array  # [C]
  best_columns: jax.Array  # int32 [R], where a row is largest; the first of equals
  best_rows: jax.Array  # int32 [C], where a column is largest


class _Sums(NamedTuple):
  """Sums of exponentials over a part of the logits, such that parts can be merged."""

  peak: jax.Array  # the largest logit
  total: jax.Array  # sum of exp(logit - peak)
  best: jax.Array  # index of the largest logit, the lowest of equals


class _Ring(NamedTuple):
  """The devices over which rows and columns are divided."""

  axes: tuple[str, ...]  # mesh axes
  size: int

  def ids(self, count: int) -> jax.Array:
    """Global indices [count] of this device's rows or columns."""
    start = lax.axis_index(self.axes) * count if self.size > 1 else 0
    return start + jnp.arange(count)

  def meet(self, visit: Callable, travelling: object, staying: object) -> tuple[object, object]:
    """Lets what travels meet what stays on every device; afterwards it is home again.

    Args:
      visit: (travelling, staying) -> both, updated.
      travelling: arrays of one device.
      staying: arrays of one device.

    Returns:
      Both, as after all visits.
    """
    if self.size == 1:
      return visit(travelling, staying)
    onwards = [(i, (i + 1) % self.size) for i in range(self.size)]

    def step(carry, _):
      travelling, staying = visit(*carry)
      return (lax.ppermute(travelling, self.axes, onwards), staying), None

    return lax.scan(step, (travelling, staying), length=self.size)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def logsumexp(
  rows: jax.Array, columns: jax.Array, place: NamedSharding | None, block: int
) -> LogSumExp:
  """Reduces the logits `rows @ columns.T`, block by block.

  Args:
    rows: [R, E], float32.
    columns: [C, E], float32.
    place: how R and C are divided over devices; None when there is but one.
    block: how many columns' logits are computed at a time.

  Returns:
    Log-sum-exp and argmax, along both axes. The gradient is that of the log-sum-exps.
  """
  return _on_devices(functools.partial(_forward, block=block), place)(rows, columns)


def _logsumexp_fwd(rows, columns, place, block):
  out = logsumexp(rows, columns, place, block)
  return out, (rows, columns, out.rows, out.columns)


def _logsumexp_bwd(place, block, residuals, grads):
  return _on_devices(functools.partial(_backward, block=block), place)(
    *residuals, grads.rows, grads.columns
  )


logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)


def _on_devices(function: Callable, place: NamedSharding | None) -> Callable:
  """`function` on each device's part of its arguments, which are all divided as `place` says."""
  if place is None:
    return functools.partial(function, ring=_Ring((), 1))
  axes = place.spec[0] if isinstance(place.spec[0], tuple) else (place.spec[0],)
  ring = _Ring(axes, math.prod(place.mesh.shape[axis] for axis in axes))
  spec = PartitionSpec(axes)
  return jax.shard_map(
    functools.partial(function, ring=ring),
    mesh=place.mesh,
    in_specs=spec,
    out_specs=spec,
    check_vma=False,
  )


def _forward(rows: jax.Array, columns: jax.Array, *, ring: _Ring, block: int) -> LogSumExp:
  parts = _divide(columns, block, 0)
  column_ids = _divide(ring.ids(len(columns)), block, _NOWHERE)

  def visit(travelling, column_sums):
    rows, row_ids, row_sums = travelling

    def add_block(row_sums, inputs):
      part, ids, column_sums = inputs
      logits = _logits(rows, part, ids)
      return (
        _merge(row_sums, _sums(logits, ids[None, :], axis=1)),
        _merge(column_sums, _sums(logits, row_ids[:, None], axis=0)),
      )

    row_sums, column_sums = lax.scan(add_block, row_sums, (parts, column_ids, column_sums))
    return (rows, row_ids, row_sums), column_sums

  (_, _, row_sums), column_sums = ring.meet(
    visit, (rows, ring.ids(len(rows)), _no_sums(rows.shape[:1])), _no_sums(column_ids.shape)
  )
  column_sums = jax.tree.map(lambda x: x.reshape(-1)[: len(columns)], column_sums)
  log = lambda sums: sums.peak + jnp.log(sums.total)
  return LogSumExp(log(row_sums), log(column_sums), row_sums.best, column_sums.best)


def _backward(
  rows: jax.Array,
  columns: jax.Array,
  row_lse: jax.Array,
  column_lse: jax.Array,
  row_grad: jax.Array,
  column_grad: jax.Array,
  *,
  ring: _Ring,
  block: int,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of rows and columns: a logsumexp's gradient is the softmax of what it sums."""
  parts = _divide(columns, block, 0)
  column_ids = _divide(ring.ids(len(columns)), block, _NOWHERE)
  column_inputs = parts, column_ids, _divide(column_lse, block, 0), _divide(column_grad, block, 0)

  def visit(travelling, d_parts):
    rows, row_lse, row_grad, d_rows = travelling

    def add_block(d_rows, inputs):
      part, ids, lse, grad, d_part = inputs
      logits = _logits(rows, part, ids)
      d_logits = (
        jnp.exp(logits - row_lse[:, None]) * row_grad[:, None]
        + jnp.exp(logits - lse[None, :]) * grad[None, :]
      )
      return (
        d_rows + jnp.einsum('rc,ce->re', d_logits, part, precision='highest'),
        d_part + jnp.einsum('rc,re->ce', d_logits, rows, precision='highest'),
      )

    d_rows, d_parts = lax.scan(add_block, d_rows, (*column_inputs, d_parts))
    return (rows, row_lse, row_grad, d_rows), d_parts

  (*_, d_rows), d_parts = ring.meet(
    visit, (rows, row_lse, row_grad, jnp.zeros_like(rows)), jnp.zeros_like(parts)
  )
  return d_rows, d_parts.reshape(-1, columns.shape[1])[: len(columns)]


def _divide(x: jax.Array, block: int, fill: int) -> jax.Array:
  """[C, ...] -> [K, c, ...], K equal blocks of at most `block`, the last filled up."""
  num_blocks = -(-len(x) // block)
  size = -(-len(x) // num_blocks)
  padding = [(0, num_blocks * size - len(x))] + [(0, 0)] * (x.ndim - 1)
  return jnp.pad(x, padding, constant_values=fill).reshape(num_blocks, size, *x.shape[1:])


def _logits(rows: jax.Array, part: jax.Array, ids: jax.Array) -> jax.Array:
  """Logits [R, c] of rows [R, E] and a block of columns [c, E]; filling never counts."""
  logits = jnp.einsum('re,ce->rc', rows, part, precision='highest')
  return jnp.where(ids[None, :] == _NOWHERE, _NEVER, logits)


def _no_sums(shape: tuple[int, ...]) -> _Sums:
  return _Sums(jnp.full(shape, _NEVER), jnp.zeros(shape), jnp.full(shape, _NOWHERE))


def _sums(logits: jax.Array, ids: jax.Array, axis: int) -> _Sums:
  """Sums over one axis of a block of logits; `ids` name the positions along it."""
  peak = logits.max(axis=axis, keepdims=True)
  best = jnp.where(logits == peak, ids, _NOWHERE).min(axis=axis)
  return _Sums(peak.squeeze(axis), jnp.exp(logits - peak).sum(axis=axis), best)


def _merge(a: _Sums, b: _Sums) -> _Sums:
  """The sums over two parts together, whichever came first."""
  peak = jnp.maximum(a.peak, b.peak)
  at_peak = lambda sums: jnp.where(sums.peak == peak, sums.best, _NOWHERE)
  return _Sums(
    peak,
    a.total * jnp.exp(a.peak - peak) + b.total * jnp.exp(b.peak - peak),
    jnp.minimum(at_peak(a), at_peak(b)),
  )
