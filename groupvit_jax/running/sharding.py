"""The device mesh, and the sharding of batches and of the training state."""

from collections.abc import Sequence
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from groupvit_jax.errors import UserError

AXES = ('data', 'fsdp', 'model')

Rules = Sequence[tuple[str, PartitionSpec]]

# First match wins. A path reads like `params/vision/stage0_block1/mlp/fc1/kernel`; the optimiser's moments end in the
# same names and so follow their parameter. An axis that a dimension cannot be divided over is left out.
DEFAULT_RULES: Rules = (
  (r'attn/qkv/kernel$', PartitionSpec('fsdp', None, 'model')),  # [D, 3, h, k]
  (r'attn/(query|key|value)/kernel$', PartitionSpec('fsdp', 'model')),  # [D, h, k]
  (r'attn/out/kernel$', PartitionSpec('model', None, 'fsdp')),  # [h, k, D]
  (r'(mlp|projector)/fc1/kernel$', PartitionSpec('fsdp', 'model')),
  (r'(mlp|projector)/fc2/kernel$', PartitionSpec('model', 'fsdp')),
  (r'assign_\w+/kernel$', PartitionSpec('fsdp', 'model')),
  (r'token_embedding$', PartitionSpec('fsdp', 'model')),
  (r'', PartitionSpec()),
)


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over all devices with axes data, fsdp and model.

  Args:
    data: size of the data axis; -1 takes what the others leave.
    fsdp: over how many devices parameters are sharded; the batch is sharded over them as well.
    model: over how many devices heads and hidden units are split.
    devices: defaults to all of them; the sizes must multiply to their number.
  """
  devices = jax.devices() if devices is None else list(devices)
  if data == -1 and fsdp > 0 and model > 0 and len(devices) % (fsdp * model) == 0:
    data = len(devices) // (fsdp * model)
  shape = (data, fsdp, model)
  if min(shape) < 1 or int(np.prod(shape)) != len(devices):
    raise UserError(
      f'mesh data={data} x fsdp={fsdp} x model={model} does not cover {len(devices)} devices; '
      'make the product equal, or set mesh.data=-1'
    )
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of an array [B, ...] over all devices that see different samples."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def synchronize(tree: object, mesh: Mesh) -> None:
  """Waits for a program's results on several CPU devices; elsewhere returns at once.

  CPU devices share a pool of threads, and a collective blocks one thread per device. Two programs that overlap can
  exhaust the pool and deadlock.
  """
  if mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu':
    jax.block_until_ready(tree)


def data_parallel_size(mesh: Mesh) -> int:
  """Returns over how many devices a batch is divided."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def process_local_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
  """Returns the rows of a global batch that this process's devices hold, ascending.

  They need not be contiguous, because a mesh may order devices differently from processes. Processes among which heads
  and hidden units are split hold the same rows.
  """
  parts = _local_parts(batch_size, mesh)
  return tuple(row for start in sorted(parts) for row in range(start, parts[start]))


def make_global_array(rows: np.ndarray, mesh: Mesh) -> jax.Array:
  """Returns a global array [B, ...] made of each process's rows [b, ...], those of `process_local_rows`."""
  size = len(rows) // len(_local_parts(data_parallel_size(mesh), mesh))  # of a device
  parts = _local_parts(size * data_parallel_size(mesh), mesh)
  offsets = {start: size * i for i, start in enumerate(sorted(parts))}
  part = lambda index: rows[offsets[index[0].start or 0] :][:size]
  return jax.make_array_from_callback((size * data_parallel_size(mesh), *rows.shape[1:]), batch_sharding(mesh), part)


def _local_parts(batch_size: int, mesh: Mesh) -> dict[int, int]:
  """Returns start and end of the parts of a batch on this process's devices."""
  indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
  return {index.start or 0: batch_size if index.stop is None else index.stop for (index,) in indices}


def evaluation_mesh(mesh: Mesh) -> Mesh:
  """Returns a mesh of the same devices on which parameters are replicated and each device has its own rows."""
  return Mesh(mesh.devices.reshape(-1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
  """Raises UserError when the devices do not divide a batch."""
  ways = data_parallel_size(mesh)
  if batch_size < 1 or batch_size % ways:
    raise UserError(
      f'{name}={batch_size} is not a positive multiple of the {ways} devices it is divided over; '
      f'use {max(1, batch_size // ways) * ways} or {(batch_size // ways + 1) * ways}'
    )


def check_micro_batches(batch_size: int, num_steps: int, mesh: Mesh) -> None:
  """Raises UserError when the micro-batches do not divide a device's samples."""
  rows = batch_size // data_parallel_size(mesh)
  if num_steps < 1 or rows % num_steps:
    fitting = [steps for steps in range(1, rows + 1) if rows % steps == 0]
    nearest = min(fitting, key=lambda steps: abs(steps - num_steps))
    raise UserError(
      f'grad_accum_steps={num_steps} does not divide the {rows} samples that each device has of '
      f'batch_size={batch_size}; use {nearest}'
    )


def state_shardings(abstract_state: object, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> object:
  """Returns a NamedSharding for each leaf of a tree of shapes, by the first rule that its path matches."""

  def sharding_of(path, leaf):
    spec = next(spec for pattern, spec in rules if re.search(pattern, path_name(path)))
    return NamedSharding(mesh, _fitting(spec, leaf.shape, mesh))

  return jax.tree_util.tree_map_with_path(sharding_of, abstract_state)


def path_name(path: tuple) -> str:
  """A tree path as 'params/vision/positions'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _fitting(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
  """Drops the axes of `spec` that do not divide their dimension, or that are of size 1."""
  fits = lambda axis, size: axis is not None and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0
  return PartitionSpec(*(axis if fits(axis, size) else None for axis, size in zip(spec, shape)))
