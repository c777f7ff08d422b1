"""The training step, a pure function of state and batch: loss, micro-batches, update and moving average."""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import optax

from groupvit_jax.model import losses, segmentation
from groupvit_jax.model.image_text import ImageTextModel, Projected
from groupvit_jax.model.layers import sample_keys
from groupvit_jax.model.losses import MultiLabel
from groupvit_jax.model.metrics import GroupingHealth
from groupvit_jax.model.pixels import normalize_images, RandomErasing
from groupvit_jax.model.text_packing import Encoders, text_features, text_load, TextLoad
from groupvit_jax.running import sharding
from groupvit_jax.train import optim
from groupvit_jax.train.state import TrainState

# 'image': uint8 [B, H, W, 3], 'tokens': int32 [B, T, L], and 'words': int32 [B, M, 2] where the loss asks for them
Batch = dict[str, jax.Array]


class StepMetrics(NamedTuple):
  """Metrics of a step."""

  scalars: dict[str, jax.Array]
  health: GroupingHealth


class LossOutput(NamedTuple):
  """Auxiliary output of the loss."""

  batch_stats: object
  metrics: StepMetrics


class Segments(NamedTuple):
  """A grouping stage's segments, as the loss of the best segment sees them."""

  embeds: jax.Array  # [B, S, E]
  in_use: jax.Array  # bool [B, S]


def prompt_loss(
  out: Projected, stages: Sequence[Segments], words: jax.Array | None, batch_sharding: NamedSharding | None
) -> jax.Array:
  """The multi-label loss []: the sum of those of each stage's best segment; without words [B, M, 2] the paper's."""
  prompts, scale = out.text_embeds[:, 1:], out.multi_label_logit_scale
  if words is None:
    return losses.multi_label_loss(out.image_embeds, prompts, scale, sharding=batch_sharding).loss
  stages = stages or [Segments(out.image_embeds[:, None], jnp.ones((len(prompts), 1), bool))]
  best_segment = functools.partial(losses.best_segment_loss, sharding=batch_sharding)
  return sum(best_segment(*segments, prompts, words, scale).loss for segments in stages)


def total_loss(
  out: Projected,
  multi_label_weight: float,
  batch_sharding: NamedSharding | None,
  stages: Sequence[Segments] = (),
  words: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Caption loss plus weighted multi-label loss (paper section 3.3), and metrics of both."""
  with jax.named_scope('caption_loss'):
    caption = losses.contrastive_loss(out.image_embeds, out.text_embeds[:, 0], out.logit_scale, sharding=batch_sharding)
  loss = caption.loss
  logged = {
    'caption_loss': caption.loss,
    'image_to_text_accuracy': caption.image_to_text_accuracy,
    'text_to_image_accuracy': caption.text_to_image_accuracy,
    'logit_scale': losses.clamped_scale(out.logit_scale),
  }
  if out.multi_label_logit_scale is not None:
    with jax.named_scope('multi_label_loss'):
      prompts = prompt_loss(out, stages, words, batch_sharding)
    loss = loss + multi_label_weight * prompts
    logged |= {
      'multi_label_loss': prompts,
      'multi_label_logit_scale': losses.clamped_scale(out.multi_label_logit_scale),
    }
  return loss, logged | {'loss': loss}


def map_micro_batches(
  function: Callable[[dict[str, jax.Array]], tuple[object, object]], batch: dict[str, jax.Array], num_steps: int
) -> tuple[object, object]:
  """Applies `function`, in which samples do not meet, to a batch in micro-batches.

  Differentiated, each micro-batch is computed a second time when its gradient is due, and only its inputs are kept
  until then: the memory of one micro-batch, for one more forward pass.

  Micro-batch i holds the rows r with r % num_steps == i. So each device computes rows that it has already.

  Args:
    function: batch -> (rows, sums): arrays [b, ...] of the samples in order, and sums over them.
    batch: arrays [B, ...]; num_steps divides B.
    num_steps: micro-batches; with 1 the function is simply called.

  Returns:
    Rows [B, ...] and sums of the whole batch.
  """
  if num_steps == 1:
    return function(batch)
  split = jax.tree.map(lambda x: x.reshape(-1, num_steps, *x.shape[1:]), batch)
  pick = lambda i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), split)
  # The compiler cannot merge the two computations across loops, so it need not be kept from it.
  apply = jax.checkpoint(lambda i: function(pick(i)), prevent_cse=False)
  rows, sums = lax.map(apply, jnp.arange(num_steps))  # [num_steps, B / num_steps, ...] and [num_steps, ...]
  rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)
  return rows, jax.tree.map(lambda x: x.sum(axis=0), sums)


def loss_and_grads(
  state: TrainState,
  batch: Batch,
  *,
  model: ImageTextModel,
  multi_label_weight: float = 1.0,
  grad_accum_steps: int,
  text_budget: int,
  random_erasing: RandomErasing | None,
  batch_sharding: NamedSharding | None,
  multi_label_loss: MultiLabel = 'pooled',
  freeze: str = '',
) -> tuple[LossOutput, object]:
  """Loss, metrics and updated BatchNorm statistics of a batch, and the gradient for the trainable parameters.

  The towers see the batch in `grad_accum_steps` micro-batches, projectors and losses see it whole; so neither result
  depends on their number. Arguments as in `train_step`.
  """
  groups = 1 if batch_sharding is None else sharding.data_parallel_size(batch_sharding.mesh)
  read = lambda model: lambda params, texts: model.apply({'params': params}, texts, method='text_features')
  readers = Encoders(read(model), read(model.clone(text=model.text.clone(scan_layers=True))))
  keys = sample_keys(jax.random.fold_in(state.rng, state.step), len(batch['image']))

  packed = dict(eos_id=model.text.eos_id, budget=text_budget, groups=groups)

  best_segment = multi_label_loss == 'best_segment' and model.multi_label

  def encode(params, rows: Batch) -> tuple[tuple[jax.Array, ...], tuple[GroupingHealth, TextLoad]]:
    images = normalize_images(rows['image'])
    if random_erasing is not None:
      images = random_erasing(images, rows['keys'])
    vision = model.apply({'params': params}, images, keys=rows['keys'], method='vision_features')
    text = text_features(readers, params, rows['tokens'], **packed)
    health = GroupingHealth.from_assignments(vision.assignments)
    image, in_use = vision.pooled, ()
    if best_segment:
      image = jnp.concatenate([image[:, None], *vision.earlier_segments, vision.segments], axis=1)
      in_use = tuple(
        segmentation.segments_in_use(vision.assignments[:i]) for i in range(1, len(vision.assignments) + 1)
      )
    return (image, text, in_use), (health, text_load(rows['tokens'], **packed))

  words = batch['words'] if multi_label_loss != 'pooled' and model.multi_label else None

  trainable, frozen = optim.split_frozen(state.params, freeze)

  def loss_fn(trainable):
    params = optim.merge(trainable, frozen)
    (*features, in_use), (health, load) = map_micro_batches(
      functools.partial(encode, params), batch | {'keys': keys}, grad_accum_steps
    )
    out, updated = model.apply(
      state.variables | {'params': params}, *features, train=True, method='project', mutable=['batch_stats']
    )
    stages = ()
    if best_segment:
      ends = np.cumsum([1, *(mask.shape[1] for mask in in_use)])
      stages = [Segments(*pair) for pair in zip(jnp.split(out.image_embeds, ends, axis=1)[1:], in_use)]
      out = out._replace(image_embeds=out.image_embeds[:, 0])
    loss, logged = total_loss(out, multi_label_weight, batch_sharding, stages, words)
    logged |= {'text_tokens': load.tokens / len(batch['image']), 'text_turns': load.turns}
    stats = optim.split_frozen(updated['batch_stats'], freeze)[0], optim.split_frozen(state.batch_stats, freeze)[1]
    return loss, LossOutput(optim.merge(*stats), StepMetrics(logged, health))

  grads, out = jax.grad(loss_fn, has_aux=True)(trainable)
  return out, grads


def average_variables(state: TrainState, decay: float, freeze: str = '') -> dict[str, object]:
  """The moving average after an update: `d * average + (1 - d) * variables`.

  After n updates d is min(decay, (1 + n) / (10 + n)), so that the average soon forgets where the run started. A
  skipped update leaves it as it was.

  Args:
    state: after the update, with the average from before it.
    decay: the d of a long run.
    freeze: what of it stays, as in `train_step`.
  """
  updates = (state.step - state.skipped).astype(jnp.float32)
  rate = jnp.minimum(decay, (1 + updates) / (10 + updates))
  weight = jnp.where(state.skipped_in_a_row > 0, 0, 1 - rate)
  average = {}
  for name, variables in state.variables.items():
    (new, _), (old, frozen) = (optim.split_frozen(tree, freeze) for tree in (variables, state.ema[name]))
    average[name] = optim.merge(optax.incremental_update(new, old, weight), frozen)
  return average


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  model: ImageTextModel,
  tx: optax.GradientTransformationExtraArgs,
  multi_label_weight: float = 1.0,
  grad_accum_steps: int,
  text_budget: int,
  random_erasing: RandomErasing | None,
  batch_sharding: NamedSharding | None,
  ema_decay: float = 0.0,
  multi_label_loss: MultiLabel = 'pooled',
  freeze: str = '',
) -> tuple[TrainState, StepMetrics]:
  """Applies one update.

  An update with a non-finite loss or gradient is skipped and counted: parameters, statistics and optimiser stay as
  they were, the step (and so the position in the data) moves on. Parameters that are not finite are counted, too.

  Args:
    state: the state, which may be donated.
    batch: images and tokens.
    model: the model (static).
    tx: the optimiser, of `optim.build_optimizer` (static).
    multi_label_weight: weight of the multi-label loss (static).
    grad_accum_steps: micro-batches in which the towers see the batch (static); divides B.
    text_budget: tokens an image that the text tower computes at once (static); 0 for padded texts.
    random_erasing: what some images lose (static); None when no image loses anything.
    batch_sharding: how B is divided over devices (static); None when there is but one.
    ema_decay: of the moving average, in a state that has one (static).
    multi_label_loss: how prompts are contrasted with images (static); all but 'pooled' need the batch's words.
    freeze: parameters, and running statistics, that stay as they are (static); see `optim.split_frozen`. The
      optimiser's state holds none of them.

  Returns:
    The next state and the step's metrics.
  """
  out, grads = loss_and_grads(
    state,
    batch,
    model=model,
    multi_label_weight=multi_label_weight,
    grad_accum_steps=grad_accum_steps,
    text_budget=text_budget,
    random_erasing=random_erasing,
    batch_sharding=batch_sharding,
    multi_label_loss=multi_label_loss,
    freeze=freeze,
  )
  with jax.named_scope('optimizer'):
    trainable, frozen = optim.split_frozen(state.params, freeze)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(out.metrics.scalars['loss']) & jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, trainable, finite=finite)
    updated = (optax.apply_updates(trainable, updates), out.batch_stats)
    trainable, batch_stats = optim.select(finite, updated, (trainable, state.batch_stats))
    params = optim.merge(trainable, frozen)
    bad_parameters = sum(jnp.sum(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, batch_stats)))

  bad = 1 - finite.astype(jnp.int32)
  state = state.replace(
    step=state.step + 1,
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    skipped=state.skipped + bad,
    skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
  )
  if state.ema is not None:
    state = state.replace(ema=average_variables(state, ema_decay, freeze))
  scalars = out.metrics.scalars | {
    'grad_norm': grad_norm,
    'skipped': state.skipped,
    'skipped_in_a_row': state.skipped_in_a_row,
    'bad_parameters': bad_parameters,
  }
  return state, StepMetrics(scalars, out.metrics.health)
