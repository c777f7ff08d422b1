"""The fastest implementation of attention for blocks of the image tower, on TPUs also of the text tower.

Cross-attention always uses XLA's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from groupvit_jax.model.attention import attend, Implementation
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.tpu_attention import TpuAttention
from groupvit_jax.model.vision import VisionTower
from groupvit_jax.running import processes


class AttentionChoice(NamedTuple):
  """An implementation, and why."""

  implementation: Implementation
  reason: str


def choose_attention(tower: VisionTower, mesh: Mesh, *, train: bool) -> AttentionChoice:
  """Returns the fastest implementation, the same in all processes, which must all call it; `train` adds gradients."""
  platform = mesh.devices.flat[0].platform
  if platform == 'cpu' and mesh.size == 1 and not train:
    return AttentionChoice('xla_in_parts', 'on one CPU device encoders take 6 to 10 % less time with it')
  if platform == 'tpu':
    return AttentionChoice(TpuAttention(mesh), "on TPUs its scores need no main memory, by the compiler's estimate")
  if platform != 'gpu':
    return AttentionChoice('xla', f'cuDNN is for NVIDIA GPUs, this is a {platform}')
  if tower.dtype == jnp.float32:
    return AttentionChoice('xla', 'cuDNN does not take float32')
  return choose_for_gpus(tower)


def choose_for_gpus(tower: VisionTower) -> AttentionChoice:
  """cuDNN's implementation, if it runs in all processes for the tower's heads."""
  errors = processes.all_gather_objects(_cudnn_error(tower))
  if error := next(filter(None, errors), ''):
    return AttentionChoice('xla', f'cuDNN does not run: {error}')
  return AttentionChoice('cudnn', 'a step with it takes two thirds of the time on an H100')


def with_fastest_attention(model: ImageTextModel, mesh: Mesh) -> ImageTextModel:
  """Returns the model with the implementation that is fastest without gradients."""
  return model.with_attention(choose_attention(model.vision, mesh, train=False).implementation)


def _cudnn_error(tower: VisionTower) -> str:
  """Why cuDNN computes neither attention nor its gradients in this process; '' if it does."""
  x = jnp.ones((1, 8, tower.num_heads, tower.width // tower.num_heads), tower.dtype)
  try:
    jax.block_until_ready(jax.jit(jax.grad(lambda x: attend(x, x, x, implementation='cudnn').sum()))(x))
  except Exception as error:  # of a driver or a library
    return ' '.join(str(error).split())[:200]
  return ''
