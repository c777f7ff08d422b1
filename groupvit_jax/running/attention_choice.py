"""The fastest implementation of attention for the blocks of both towers."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from groupvit_jax.model.attention import attend, causal_mask, Implementation
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.text_packing import ROW_LENGTH
from groupvit_jax.model.tpu_attention import TpuAttention
from groupvit_jax.running import processes

# Of the norm of gradients. Those of either differ from float32's by less than 1 %.
_CUDNN_TOLERANCE = 0.05


class AttentionChoice(NamedTuple):
  """An implementation, and why."""

  implementation: Implementation
  reason: str


def choose_attention(model: ImageTextModel, mesh: Mesh, *, train: bool, absent: bool = False) -> AttentionChoice:
  """Returns the fastest implementation, the same in all processes, which must all call it.

  Args:
    model: whose heads it is for.
    mesh: the devices.
    train: with gradients.
    absent: the devices are there for the compiler alone, so nothing is tried on them.
  """
  platform = mesh.devices.flat[0].platform
  if platform == 'cpu' and mesh.size == 1 and not train:
    return AttentionChoice('xla_in_parts', 'on one CPU device encoders take 6 to 10 % less time with it')
  if platform == 'tpu':
    return AttentionChoice(TpuAttention(mesh), "on TPUs its scores need no main memory, by the compiler's estimate")
  if platform != 'gpu':
    return AttentionChoice('xla', f'cuDNN is for NVIDIA GPUs, this is a {platform}')
  if model.dtype == jnp.float32:
    return AttentionChoice('xla', 'cuDNN does not take float32')
  if absent:
    return AttentionChoice('cudnn', 'a GPU of the data centre has it')
  return choose_for_gpus(model)


def choose_for_gpus(model: ImageTextModel) -> AttentionChoice:
  """cuDNN's implementation, if in all processes it runs for the heads of both towers and computes what XLA's does."""
  errors = processes.all_gather_objects(_cudnn_error(model))
  if error := next(filter(None, errors), ''):
    return AttentionChoice('xla', f'cuDNN does not run: {error}')
  return AttentionChoice('cudnn', 'a step with it takes two thirds of the time on an H100')


def with_fastest_attention(model: ImageTextModel, mesh: Mesh) -> ImageTextModel:
  """Returns the model with the implementation that is fastest without gradients."""
  return model.with_attention(choose_attention(model, mesh, train=False).implementation)


def _cudnn_error(model: ImageTextModel) -> str:
  """What is wrong with cuDNN's attention, or with its gradients, in this process; '' if nothing is."""
  texts = jnp.arange(ROW_LENGTH)[None] // (ROW_LENGTH // 3)
  for tower, mask in ((model.vision, None), (model.text, causal_mask(texts)[:, None])):
    shape = (3, 2, ROW_LENGTH, tower.num_heads, tower.width // tower.num_heads)
    arrays = jax.random.normal(jax.random.key(0), shape, tower.dtype)
    try:
      found, wanted = (_gradients(arrays, mask, implementation) for implementation in ('cudnn', 'xla'))
      difference = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    except Exception as error:  # of a driver or a library
      return ' '.join(str(error).split())[:200]
    if not difference < _CUDNN_TOLERANCE:
      return f'its gradients differ from those of XLA by {difference:.1%}'
  return ''


@functools.partial(jax.jit, static_argnums=2)
def _gradients(arrays: jax.Array, mask: jax.Array | None, implementation: Implementation) -> jax.Array:
  """Float32 gradients of some loss for query, key and value [3, B, N, h, k]."""
  loss = lambda arrays: jnp.square(attend(*arrays, mask, implementation).astype(jnp.float32)).sum()
  return jax.grad(loss)(arrays).astype(jnp.float32)
