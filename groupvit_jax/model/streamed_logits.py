"""Log-sum-exp along the rows and columns of a matrix of logits that is too large to hold.

The logits are the products of R rows and C columns, vectors of E. No more than [R of a device, block] of them exist at
a time, in the forward pass and in the backward pass, which computes them again. Rows and columns are divided over
devices alike: the columns stay, the rows travel round a ring of the devices and meet all columns, their sums
travelling with them. So a device holds what belongs to its own rows and columns, however many devices there are.
Where devices have few rows each, a turn of the ring would take longer than what is computed in it; there every device
gets all rows at once.
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

# Fewer rows than these, and a device does not pass them on but hands them to all: they do not fill a matrix unit.
_FEW_ROWS = 128


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


class _Devices(NamedTuple):
  """The devices over which rows and columns are divided."""

  axes: tuple[str, ...]  # mesh axes
  size: int

  def ids(self, count: int) -> jax.Array:
    """Global indices [count] of this device's rows or columns."""
    start = lax.axis_index(self.axes) * count if self.size > 1 else 0
    return start + jnp.arange(count)

  def meet(
    self,
    visit: Callable,
    rows: tuple[jax.Array, ...],
    start: Callable[[int], object],
    staying: object,
    merge: Callable[[object, tuple[str, ...]], object],
    block: int,
  ) -> tuple[object, object]:
    """Lets the rows of all devices meet what stays on every device.

    Args:
      visit: (rows, their sums, what stays) -> sums and what stays, updated.
      rows: arrays [r, ...] of this device's rows.
      start: the sums of so many rows before any visit.
      staying: arrays of this device.
      merge: (sums, mesh axes) -> the sums that all devices have of these rows together.
      block: rows that visit at a time, where all devices get them.

    Returns:
      The sums of this device's rows, and what stayed, after all visits.
    """
    count = len(rows[0])
    if self.size == 1:
      return visit(rows, start(count), staying)
    if count < _FEW_ROWS:
      sums, staying = self._meet_gathered(visit, rows, start, staying, block)
      sums = merge(sums, self.axes)
      own = lax.axis_index(self.axes) * count
      return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, own, count), sums), staying
    onwards = [(i, (i + 1) % self.size) for i in range(self.size)]

    def step(carry, _):
      rows, sums, staying = carry
      sums, staying = visit(rows, sums, staying)
      return (*lax.ppermute((rows, sums), self.axes, onwards), staying), None

    _, sums, staying = lax.scan(step, (rows, start(count), staying), length=self.size)[0]
    return sums, staying

  def _meet_gathered(self, visit, rows, start, staying, block) -> tuple[object, object]:
    """Likewise, but all rows come to each device, whose sums [R] of them are only its own part."""
    at_once = max(n for n in range(1, self.size + 1) if self.size % n == 0 and (n == 1 or n * len(rows[0]) <= block))
    chunks = jax.tree.map(
      lambda x: lax.all_gather(x, self.axes, tiled=True).reshape(self.size // at_once, -1, *x.shape[1:]), rows
    )

    def step(staying, chunk):
      sums, staying = visit(chunk, start(len(chunk[0])), staying)
      return staying, sums

    staying, sums = lax.scan(step, staying, chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), sums), staying


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def logsumexp(rows: jax.Array, columns: jax.Array, place: NamedSharding | None, block: int) -> LogSumExp:
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
  return _on_devices(functools.partial(_backward, block=block), place)(*residuals, grads.rows, grads.columns)


logsumexp.defvjp(_logsumexp_fwd, _logsumexp_bwd)


def _on_devices(function: Callable, place: NamedSharding | None) -> Callable:
  """`function` on each device's part of its arguments, which are all divided as `place` says."""
  if place is None:
    return functools.partial(function, devices=_Devices((), 1))
  axes = place.spec[0] if isinstance(place.spec[0], tuple) else (place.spec[0],)
  devices = _Devices(axes, math.prod(place.mesh.shape[axis] for axis in axes))
  spec = PartitionSpec(axes)
  return jax.shard_map(
    functools.partial(function, devices=devices), mesh=place.mesh, in_specs=spec, out_specs=spec, check_vma=False
  )


def _forward(rows: jax.Array, columns: jax.Array, *, devices: _Devices, block: int) -> LogSumExp:
  parts = _divide(columns, block, 0)
  column_ids = _divide(devices.ids(len(columns)), block, _NOWHERE)

  def visit(rows, row_sums, column_sums):
    rows, row_ids = rows

    def add_block(row_sums, inputs):
      part, ids, column_sums = inputs
      logits = _logits(rows, part, ids)
      return (
        _merge(row_sums, _sums(logits, ids[None, :], axis=1)),
        _merge(column_sums, _sums(logits, row_ids[:, None], axis=0)),
      )

    return lax.scan(add_block, row_sums, (parts, column_ids, column_sums))

  row_sums, column_sums = devices.meet(
    visit,
    (rows, devices.ids(len(rows))),
    lambda count: _no_sums((count,)),
    _no_sums(column_ids.shape),
    _merge_over_devices,
    block,
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
  devices: _Devices,
  block: int,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of rows and columns: a logsumexp's gradient is the softmax of what it sums."""
  parts = _divide(columns, block, 0)
  column_ids = _divide(devices.ids(len(columns)), block, _NOWHERE)
  column_inputs = parts, column_ids, _divide(column_lse, block, 0), _divide(column_grad, block, 0)

  def visit(rows, d_rows, d_parts):
    rows, row_lse, row_grad = rows

    def add_block(d_rows, inputs):
      part, ids, lse, grad, d_part = inputs
      logits = _logits(rows, part, ids)
      d_logits = jnp.exp(logits - row_lse[:, None]) * row_grad[:, None] + jnp.exp(logits - lse[None, :]) * grad[None, :]
      return (
        d_rows + jnp.einsum('rc,ce->re', d_logits, part, precision='highest'),
        d_part + jnp.einsum('rc,re->ce', d_logits, rows, precision='highest'),
      )

    return lax.scan(add_block, d_rows, (*column_inputs, d_parts))

  d_rows, d_parts = devices.meet(
    visit,
    (rows, row_lse, row_grad),
    lambda count: jnp.zeros((count, rows.shape[1])),
    jnp.zeros_like(parts),
    lax.psum,
    block,
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
    peak, a.total * jnp.exp(a.peak - peak) + b.total * jnp.exp(b.peak - peak), jnp.minimum(at_peak(a), at_peak(b))
  )


def _merge_over_devices(sums: _Sums, axes: tuple[str, ...]) -> _Sums:
  """The sums over the parts that all devices have of the same rows."""
  peak = lax.pmax(sums.peak, axes)
  return _Sums(
    peak,
    lax.psum(sums.total * jnp.exp(sums.peak - peak), axes),
    lax.pmin(jnp.where(sums.peak == peak, sums.best, _NOWHERE), axes),
  )
