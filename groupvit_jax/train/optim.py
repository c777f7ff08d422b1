"""AdamW with the paper's schedule, clipping and decay mask; and which parameters are frozen."""

import re

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import optax

from groupvit_jax.errors import UserError
from groupvit_jax.running.sharding import path_name

# The paper's learning rates belong to this batch size and scale linearly with it.
REFERENCE_BATCH = 4096
_WARMUP_SHARE = 15


def decay_mask(params: object) -> object:
  """True for what weight decay applies to: everything but biases and norms.

  That is every tensor with two or more axes in the reference, and the two scalar log temperatures.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path_name(path).rsplit('/', 1)[-1] not in ('bias', 'scale'), params
  )


def steps_from_pairs(config: ml_collections.ConfigDict, num_pairs: int) -> ml_collections.ConfigDict:
  """The config with the steps that it leaves to the data.

  `total_steps` 0 becomes `data.epochs` epochs, and `optim.warmup_steps` -1 a fifteenth of all steps, as in the paper
  (2 of 30 epochs).
  """
  config = config.copy_and_resolve_references()
  if not config.total_steps:
    if config.data.source != 'pairs':
      raise UserError(f'total_steps=0: data.source={config.data.source!r} has no epochs; name the steps')
    config.total_steps = max(1, round(config.data.epochs * num_pairs / config.batch_size))
  if config.optim.warmup_steps < 0:
    config.optim.warmup_steps = config.total_steps // _WARMUP_SHARE
  return config


def build_schedule(config: ml_collections.ConfigDict, total_steps: int, batch_size: int) -> optax.Schedule:
  """Linear warm-up, then cosine, per step; all rates scale with batch_size / 4096.

  Args:
    config: the `optim` part of a config: warmup_lr, peak_lr, end_lr (at batch 4096), warmup_steps and cosine. 'run' is
      the paper's: one cosine over all steps, which the warm-up replaces at its start. 'after_warmup' starts it at the
      peak, when the warm-up ends.
    total_steps: where the cosine ends.
    batch_size: the global batch.

  Returns:
    step -> learning rate.
  """
  if not 0 <= config.warmup_steps < total_steps:
    hint = '' if total_steps else '; without data both must be named'
    raise UserError(f'optim.warmup_steps={config.warmup_steps} must be less than total_steps={total_steps}{hint}')
  factor = batch_size / REFERENCE_BATCH
  warmup, peak, end = config.warmup_lr * factor, config.peak_lr * factor, config.end_lr * factor
  if config.cosine == 'after_warmup':
    return optax.warmup_cosine_decay_schedule(warmup, peak, config.warmup_steps, total_steps, end)
  return optax.join_schedules(
    [
      optax.linear_schedule(warmup, peak, config.warmup_steps),
      lambda count: cosine_of_run(count + config.warmup_steps, total_steps, peak, end),
    ],
    [config.warmup_steps],
  )


def cosine_of_run(step: jax.Array, total_steps: int, peak: float, end: float) -> jax.Array:
  """The rate of the published runs from the end of the warm-up: of the step before, on a cosine from step 0."""
  return end + (peak - end) / 2 * (1 + jnp.cos(jnp.pi * jnp.minimum(step - 1, total_steps) / total_steps))


def split_frozen(tree: dict[str, object], freeze: str) -> tuple[dict[str, object], dict[str, object]]:
  """Splits parameters, statistics or both into trainable and frozen ones.

  Args:
    tree: nested dicts with paths such as 'vision/stage0_block0/mlp/fc1/kernel'.
    freeze: a regular expression of the frozen paths, or of what they start with before a '/'; '' freezes nothing.

  Returns:
    Two trees, which `merge` puts together again.
  """
  flat = traverse_util.flatten_dict(tree, sep='/')
  frozen = {path for path in flat if freeze and re.match(f'(?:{freeze})(?:/|$)', path)}
  parts = {path: leaf for path, leaf in flat.items() if path not in frozen}, {path: flat[path] for path in frozen}
  return tuple(traverse_util.unflatten_dict(part, sep='/') for part in parts)


def merge(trainable: dict[str, object], frozen: dict[str, object]) -> dict[str, object]:
  """The tree that `split_frozen` has split."""
  flat = (traverse_util.flatten_dict(tree, sep='/') for tree in (trainable, frozen))
  return traverse_util.unflatten_dict({path: leaf for part in flat for path, leaf in part.items()}, sep='/')


def check_freeze(freeze: str, params: dict[str, object]) -> None:
  """Raises UserError for an expression that is none, that freezes none of the parameters, or all of them."""
  try:
    trainable, frozen = split_frozen(params, freeze)
  except re.error as error:
    raise UserError(f'freeze={freeze!r} is no regular expression: {error}') from error
  if freeze and not frozen:
    raise UserError(f'freeze={freeze!r} matches no parameter; at the top there are {", ".join(sorted(params))}')
  if not trainable:
    raise UserError(f'freeze={freeze!r} matches every parameter; leave one to train')


def select(chosen: jax.Array, new: object, old: object) -> object:
  """The new tree if `chosen`, bool [], else the old one."""
  return jax.tree.map(lambda new, old: jnp.where(chosen, new, old), new, old)


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` with one factor for all gradients.

  There each number is divided by the norm. A division is too dear for compilers for CPUs to do it twice, once for each
  moment; so they do it in a pass of its own, and write down what it gives."""

  def update(grads: object, state: optax.EmptyState, params: object = None) -> tuple[object, optax.EmptyState]:
    del params
    factor = jnp.minimum(1, most / optax.tree.norm(grads))
    return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
  """Adam (Kingma and Ba, 2015, algorithm 1) as `optax.scale_by_adam`, with its state, which `finite=False` keeps.

  Updates are computed from the moments that are kept, whichever these are. Where they are computed from new moments
  and the old ones are selected afterwards, compilers for CPUs copy the old ones before replacing them.
  """
  adam = optax.scale_by_adam(b1, b2, eps)

  def update(
    grads: object, state: optax.ScaleByAdamState, params: object = None, *, finite: jax.Array, **_
  ) -> tuple[object, optax.ScaleByAdamState]:
    del params
    state = select(
      finite,
      optax.ScaleByAdamState(
        optax.safe_increment(state.count),
        optax.tree.update_moment(grads, state.mu, b1, 1),
        optax.tree.update_moment(grads, state.nu, b2, 2),
      ),
      state,
    )
    mu, nu = (
      optax.tree.bias_correction(moment, decay, state.count) for moment, decay in ((state.mu, b1), (state.nu, b2))
    )
    return jax.tree.map(lambda mu, nu: mu / (jnp.sqrt(nu) + eps), mu, nu), state

  return optax.GradientTransformationExtraArgs(adam.init, update)


def keep_unless_finite(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """The same transformation, whose state `finite=False` keeps."""

  def update(updates: object, state: object, params: object = None, *, finite: jax.Array, **_) -> tuple[object, object]:
    updates, new = tx.update(updates, state, params)
    return updates, select(finite, new, state)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def build_optimizer(
  config: ml_collections.ConfigDict, schedule: optax.Schedule, freeze: str = ''
) -> optax.GradientTransformationExtraArgs:
  """`optax.adamw` after clipping by global norm, once per optimiser step.

  Its update takes `finite`, bool []: whether the gradients are. If not, its state stays as it was, and the updates are
  not to be applied. It starts from all parameters, keeps a state of the trainable ones (see `split_frozen`), and
  updates those.
  """
  adamw = optax.chain(
    scale_by_adam(config.beta1, config.beta2, config.eps),
    optax.add_decayed_weights(config.weight_decay, decay_mask),
    keep_unless_finite(optax.scale_by_learning_rate(schedule)),
  )
  tx = optax.chain(clip_by_global_norm(config.clip_norm), adamw)
  return optax.GradientTransformationExtraArgs(lambda params: tx.init(split_frozen(params, freeze)[0]), tx.update)
