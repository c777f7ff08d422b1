"""Memory of the losses by batch size, in blocks and as one matrix of logits.

Compiles loss and gradients of captions and three prompts an image for 8 devices and asks the compiler; runs nothing.
"""

from collections.abc import Callable
import functools
import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import plain_losses
from groupvit_jax.model import losses
from groupvit_jax.running import sharding

BATCH_SIZES = (4096, 8192, 16384, 32768, 65536)
PROMPTS, WIDTH = 3, 256  # M, E


def temporaries_mb(loss: Callable, batch: int, rows: NamedSharding) -> float:
  """MiB a device needs for the losses of a global batch and their gradients, beside inputs and results."""

  def total(images, texts, scales):
    return loss(images, texts[:, :1], scales[0]).loss + loss(images, texts[:, 1:], scales[1]).loss

  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  args = (
    shape((batch, WIDTH), sharding=rows),
    shape((batch, 1 + PROMPTS, WIDTH), sharding=rows),
    shape((2,), sharding=NamedSharding(rows.mesh, PartitionSpec())),
  )
  step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)), out_shardings=(None, (rows, rows, None)))
  return step.lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
  """Prints a row of a table per batch size."""
  rows = sharding.batch_sharding(sharding.make_mesh())
  blocked = functools.partial(losses.multi_label_loss, sharding=rows)
  print('| batch | of a device | in blocks, MiB a device | one matrix, MiB a device |\n|--:|--:|--:|--:|')
  for batch in BATCH_SIZES:
    ours, plain = (temporaries_mb(loss, batch, rows) for loss in (blocked, plain_losses.multi_label_loss))
    print(f'| {batch:,} | {batch // rows.mesh.size:,} | {ours:,.0f} | {plain:,.0f} |', flush=True)
