"""Prints what the losses need beside their inputs, by batch size: python -m benchmarks.loss_memory

Compiles loss and gradients of captions and three prompts an image for 8 devices and asks the compiler; runs nothing.
The other side is the same loss as one matrix of logits, whose division is left to the compiler.
"""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUM_CPU_DEVICES'] = '8'

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import plain_losses
from groupvit_jax.model import losses
from groupvit_jax.running import sharding

BATCH_SIZES = (4096, 8192, 16384, 32768, 65536)
PROMPTS = 3  # M
WIDTH = 256  # E


def temporaries_mb(loss: Callable, batch: int, place: NamedSharding) -> float:
  """MiB a device needs for the losses of a global batch and their gradients, beside inputs and results."""

  def total(images, texts, scales):
    return loss(images, texts[:, :1], scales[0]).loss + loss(images, texts[:, 1:], scales[1]).loss

  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  args = (
    shape((batch, WIDTH), sharding=place),
    shape((batch, 1 + PROMPTS, WIDTH), sharding=place),
    shape((2,), sharding=NamedSharding(place.mesh, PartitionSpec())),
  )
  step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)), out_shardings=(None, (place, place, None)))
  return step.lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
  """One line of a table per batch size."""
  place = sharding.batch_sharding(sharding.make_mesh())
  blocked = functools.partial(losses.multi_label_loss, sharding=place)
  print('| batch | of a device | in blocks, MiB a device | one matrix, MiB a device |\n|--:|--:|--:|--:|')
  for batch in BATCH_SIZES:
    ours, plain = (temporaries_mb(loss, batch, place) for loss in (blocked, plain_losses.multi_label_loss))
    print(f'| {batch:,} | {batch // place.mesh.size:,} | {ours:,.0f} | {plain:,.0f} |', flush=True)


if __name__ == '__main__':
  main()
