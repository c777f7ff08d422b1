"""The fastest implementation of attention for blocks of the image tower, on TPUs also of the text tower.

Cross-attention always uses XLA's.
"""

from collections.abc import Callable
import math
import statistics
import time
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from groupvit_jax.model.attention import attend, Implementation
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.tpu_attention import TpuAttention
from groupvit_jax.model.vision import VisionTower
from groupvit_jax.running import sharding

# cuDNN is chosen below this share of XLA's time, so that noise does not make two starts of a run differ.
_MAX_SHARE = 0.95
_ROUNDS = 10
_SAMPLES = 16  # per device, for timing the forward pass

Measure = Callable[[Implementation], float]


class AttentionChoice(NamedTuple):
  """An implementation, and why."""

  implementation: Implementation
  reason: str
  measured: bool = False  # rather than known


def choose_attention(tower: VisionTower, samples: int, mesh: Mesh, *, train: bool) -> AttentionChoice:
  """Returns the fastest implementation for a global batch, the same in all processes, which must all call it.

  Where nothing else decides, the blocks of all stages of the tower are timed, with the backward pass if `train`.
  """
  platform = mesh.devices.flat[0].platform
  if platform == 'cpu' and mesh.size == 1 and not train:
    return AttentionChoice('xla_in_parts', 'on one CPU device encoders take 6 to 10 % less time with it')
  if platform == 'tpu':
    return AttentionChoice(TpuAttention(mesh), "on TPUs its scores need no main memory, by the compiler's estimate")
  if platform != 'gpu':
    return AttentionChoice('xla', f'cuDNN is for NVIDIA GPUs, this is a {platform}')
  if tower.dtype == jnp.float32:
    return AttentionChoice('xla', 'cuDNN does not take float32')
  heads = 'model' if tower.num_heads % mesh.shape['model'] == 0 else None
  spread = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, heads))
  stages = stage_shapes(tower, samples)
  measure = lambda implementation: sum(
    depth * time_attention(implementation, shape, tower.dtype, spread, train) for depth, shape in stages
  )
  return choose_fastest(measure, 'forward and backward' if train else 'forward')


def with_fastest_attention(model: ImageTextModel, mesh: Mesh) -> ImageTextModel:
  """Returns the model with the implementation whose forward pass is fastest."""
  choice = choose_attention(model.vision, _SAMPLES * sharding.data_parallel_size(mesh), mesh, train=False)
  return model.with_attention(choice.implementation)


def stage_shapes(tower: VisionTower, samples: int) -> list[tuple[int, tuple[int, int, int, int]]]:
  """Returns for each stage the number of its blocks and the shape [B, N, h, k] of their queries."""
  tokens, found = math.prod(side // tower.patch_size for side in tower.image_size), []
  for stage in tower.stages:
    shape = samples, tokens + stage.num_group_tokens, tower.num_heads, tower.width // tower.num_heads
    found.append((stage.depth, shape))
    tokens = stage.num_segments
  return found


def choose_fastest(measure: Measure, work: str) -> AttentionChoice:
  """Chooses by a function that returns seconds, or raises where an implementation does not run.

  The slowest process counts. An implementation must run in all of them.
  """
  times, errors = zip(*(_time_or_error(measure, implementation) for implementation in ('xla', 'cudnn')))
  if jax.process_count() > 1:
    times = multihost_utils.process_allgather(np.array(times)).max(axis=0)
  xla, cudnn = times
  why = lambda error: error or 'not in another process'
  if math.isinf(cudnn):
    return AttentionChoice('xla', f'cuDNN does not run: {why(errors[1])}', measured=True)
  if math.isinf(xla):
    return AttentionChoice('cudnn', f"XLA's does not run: {why(errors[0])}", measured=True)
  reason = f'{work} take {1e3 * cudnn:.2f} ms with cuDNN, {1e3 * xla:.2f} ms with XLA'
  return AttentionChoice('cudnn' if cudnn < _MAX_SHARE * xla else 'xla', reason, measured=True)


def _time_or_error(measure: Measure, implementation: Implementation) -> tuple[float, str]:
  """Returns seconds and no error, or infinity and the error."""
  try:
    return measure(implementation), ''
  except Exception as error:  # of a driver or a library
    return math.inf, ' '.join(str(error).split())[:200]


def time_attention(
  implementation: Implementation, shape: tuple[int, int, int, int], dtype: jnp.dtype, spread: NamedSharding, train: bool
) -> float:
  """Returns the median seconds of attention among arrays [B, N, h, k]; `train` adds its gradients."""
  draw = lambda key: tuple(jax.random.normal(key, (3, *shape), dtype))
  arrays = jax.jit(draw, out_shardings=spread)(jax.random.key(0))
  forward = lambda *args: attend(*args, implementation=implementation)

  def forward_and_backward(*args):
    out, pull = jax.vjp(forward, *args)
    return out, pull(out)

  run = jax.jit(forward_and_backward if train else forward)
  jax.block_until_ready(run(*arrays))
  seconds = []
  for _ in range(_ROUNDS):
    started = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    seconds.append(time.perf_counter() - started)
  return statistics.median(seconds)
