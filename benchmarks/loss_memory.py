"""Memory of the losses by batch size, in blocks and as one matrix of logits.

Compiles loss and gradients of captions and three prompts an image for 8 devices and asks the compiler; runs nothing.
'one matrix' is the same loss as one matrix of logits, whose division is left to the compiler. Of the loss of the best
segment an image has 8 segments.
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
PROMPTS = 3  # M
SEGMENTS = 8  # S
WIDTH = 256  # E


def pooled(loss: Callable) -> Callable:
  """Captions and prompts with the pooled feature, by one loss."""
  return lambda images, segments, in_use, texts, words, scales: (
    loss(images, texts[:, :1], scales[0]).loss + loss(images, texts[:, 1:], scales[1]).loss
  )


def best_segment(caption_loss: Callable, prompt_loss: Callable) -> Callable:
  """Captions with the pooled feature, prompts with the best segment."""
  return lambda images, segments, in_use, texts, words, scales: (
    caption_loss(images, texts[:, :1], scales[0]).loss
    + prompt_loss(segments, in_use, texts[:, 1:], words, scales[1]).loss
  )


def measure(loss: Callable, batch: int, rows: NamedSharding) -> float:
  """MiB that the losses of a global batch and their gradients need on a device, beside inputs and results."""
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=rows)
  args = (
    shape((batch, WIDTH), jnp.float32),
    shape((batch, SEGMENTS, WIDTH), jnp.float32),
    shape((batch, SEGMENTS), jnp.bool),
    shape((batch, 1 + PROMPTS, WIDTH), jnp.float32),
    shape((batch, PROMPTS, 2), jnp.int32),
    jax.ShapeDtypeStruct((2,), jnp.float32, sharding=NamedSharding(rows.mesh, PartitionSpec())),
  )
  gradients = rows, rows, rows, None
  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 3, 5)), out_shardings=(None, gradients))
  return step.lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20


def main() -> None:
  """Prints a row of a table per batch size."""
  rows = sharding.batch_sharding(sharding.make_mesh())
  blocked = [functools.partial(loss, sharding=rows) for loss in (losses.multi_label_loss, losses.best_segment_loss)]
  plain = plain_losses.multi_label_loss, plain_losses.best_segment_loss
  variants = [pooled(blocked[0]), pooled(plain[0]), best_segment(*blocked), best_segment(*plain)]
  print('| batch | pooled, MiB per device | one matrix | best segment | one matrix |\n|--:|--:|--:|--:|--:|')
  for batch in BATCH_SIZES:
    cells = [f'{measure(loss, batch, rows):,.0f}' for loss in variants]
    print(f'| {batch:,} | {" | ".join(cells)} |', flush=True)
