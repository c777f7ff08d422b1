"""AdamW with the paper's schedule, clipping and decay mask."""

import jax
import ml_collections
import optax

from groupvit_jax.sharding import path_name

# The paper's learning rates belong to this batch size and scale linearly with it.
REFERENCE_BATCH = 4096


def decay_mask(params: object) -> object:
  """True for what weight decay applies to: everything but biases and norms.

  That is every tensor with two or more axes in the reference, and the two scalar log temperatures.
  """
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path_name(path).rsplit('/', 1)[-1] not in ('bias', 'scale'), params)


def build_schedule(config: ml_collections.ConfigDict, total_steps: int, batch_size: int) -> optax.Schedule:
  """Linear warm-up, then cosine, per step; all rates scale with batch_size / 4096.

  Args:
    config: the `optim` part of a config: warmup_lr, peak_lr, end_lr (at batch 4096) and warmup_steps.
    total_steps: where the cosine ends.
    batch_size: the global batch.

  Returns:
    step -> learning rate.

  Raises:
    ValueError: the warm-up is as long as the run or longer.
  """
  if not 0 <= config.warmup_steps < total_steps:
    raise ValueError(f'optim.warmup_steps={config.warmup_steps} must be less than total_steps={total_steps}')
  factor = batch_size / REFERENCE_BATCH
  return optax.warmup_cosine_decay_schedule(
      config.warmup_lr * factor, config.peak_lr * factor, config.warmup_steps, total_steps, config.end_lr * factor)


def build_optimizer(config: ml_collections.ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
  """AdamW after clipping by global norm, once per optimiser step."""
  return optax.chain(
      optax.clip_by_global_norm(config.clip_norm),
      optax.adamw(schedule, b1=config.beta1, b2=config.beta2, eps=config.eps, weight_decay=config.weight_decay,
                  mask=decay_mask))
