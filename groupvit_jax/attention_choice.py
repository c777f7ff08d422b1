"""Which implementation of attention the image tower trains with: the one that is fastest on this hardware."""

from collections.abc import Callable
import statistics
import time
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from groupvit_jax.models.attention import attend, Implementation
from groupvit_jax.models.vision import VisionTower

# cuDNN must save so much of the time: two starts of a run should not differ for a difference that is noise.
_WORTH = 0.95
_ROUNDS = 10


class Choice(NamedTuple):
  """An implementation, and why."""

  implementation: Implementation
  reason: str


def choose_attention(tower: VisionTower, samples: int) -> Choice:
  """Measures what this hardware offers; every process of a run gets the choice of the first.

  Args:
    tower: whose first stage, the one with the most tokens, is measured.
    samples: of a device, at a time.

  Returns:
    The choice; 'xla' where there is none.
  """
  platform = jax.default_backend()
  if platform != 'gpu':
    return Choice('xla', f'cuDNN is for NVIDIA GPUs, this is a {platform}')
  if tower.dtype == jnp.float32:
    return Choice('xla', 'cuDNN does not take float32')
  grid = tower.image_size[0] // tower.patch_size * (tower.image_size[1] // tower.patch_size)
  shape = (samples, grid + tower.stages[0].num_group_tokens, tower.num_heads, tower.width // tower.num_heads)
  choice = fastest(lambda implementation: seconds(implementation, shape, tower.dtype))
  if jax.process_count() > 1:
    taken = int(multihost_utils.broadcast_one_to_all(np.int32(choice.implementation == 'cudnn')))
    choice = choice._replace(implementation=('xla', 'cudnn')[taken])
  return choice


def fastest(measure: Callable[[Implementation], float]) -> Choice:
  """Chooses by a function that returns seconds, or raises where an implementation does not run."""
  xla = measure('xla')
  try:
    cudnn = measure('cudnn')
  except Exception as error:  # whatever a driver or a library says of itself
    return Choice('xla', f'cuDNN does not run: {" ".join(str(error).split())[:200]}')
  figures = f'forward and backward take {1e3 * cudnn:.2f} ms with cuDNN, {1e3 * xla:.2f} ms with XLA'
  return Choice('cudnn' if cudnn < _WORTH * xla else 'xla', figures)


def seconds(implementation: Implementation, shape: tuple[int, int, int, int], dtype: jnp.dtype) -> float:
  """Median time of attention and its gradients among arrays [B, N, h, k]."""
  query, key, value = jax.random.normal(jax.random.key(0), (3, *shape), dtype)
  total = lambda *args: attend(*args, implementation=implementation).astype(jnp.float32).sum()
  run = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
  jax.block_until_ready(run(query, key, value))
  found = []
  for _ in range(_ROUNDS):
    started = time.perf_counter()
    jax.block_until_ready(run(query, key, value))
    found.append(time.perf_counter() - started)
  return statistics.median(found)
