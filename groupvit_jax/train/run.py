"""Set-up of a run: checks the config, prepares the workdir, builds model, optimiser and data, restores the state."""

from collections.abc import Callable, Iterator
import contextlib
import functools
from typing import NamedTuple

from etils import epath
import jax
import ml_collections
import numpy as np
import optax

from groupvit_jax import config_entries
from groupvit_jax.data import pipeline
from groupvit_jax.data.mixture import Mixture
from groupvit_jax.data.sources import build_source
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.interop import licence as licence_lib
from groupvit_jax.interop import state_dicts
from groupvit_jax.model.build import build_model, build_random_erasing
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.running import processes, sharding
from groupvit_jax.running.attention_choice import AttentionChoice, choose_attention
from groupvit_jax.train import evals, initial_weights, optim
from groupvit_jax.train import state as train_state
from groupvit_jax.train import step as train_step
from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.checkpoint import Checkpoints
from groupvit_jax.train.state import TrainState


class Run(NamedTuple):
  """The parts of a run, before its first step. Parts with defaults are absent where a step is only compiled."""

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  model: ImageTextModel
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  source: Mixture | None = None
  tokenizer: Tokenizer | None = None
  changed: tuple[str, ...] = ()  # config entries that differ from the first start
  benchmarks: tuple[evals.OpenedBenchmark, ...] = ()
  attention: AttentionChoice | None = None
  weights: initial_weights.Source | None = None  # of `init_from`, where no checkpoint is resumed

  @property
  def text_shape(self) -> tuple[int, int]:
    """(T, L) of the tokens of one image."""
    return 1 + self.config.data.num_prompts, self.config.model.text.context_length

  @property
  def averages(self) -> bool:
    """Whether a moving average of the variables is kept."""
    return self.config.ema_decay > 0


def set_up(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Run:
  """Checks the config, prepares the workdir, and builds everything but the state.

  All mistakes in the config show before anything is written.
  """
  config_entries.check(config)
  image_size, patch_size = tuple(config.model.vision.image_size), config.model.vision.patch_size
  if any(side % patch_size for side in image_size):
    raise UserError(f'model.vision.patch_size={patch_size} does not divide image_size={image_size}; use a divisor')
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch_size('batch_size', config.batch_size, mesh)
  sharding.check_micro_batches(config.batch_size, config.grad_accum_steps, mesh)
  source = build_source(config.data, image_size)
  pipeline.check_batch_size(source, config.batch_size)
  config = optim.steps_from_pairs(config, len(source))
  schedule = optim.build_schedule(config.optim, config.total_steps, config.batch_size)
  tx = optim.build_optimizer(config.optim, schedule, config.freeze)
  benchmarks = evals.open_benchmarks(config.benchmarks, image_size, config.model.vision.patch_size)
  scenes = config.data.source == 'scenes' and config.eval.every_steps > 0
  evals.check_best(config.checkpoint.best, benchmarks, (evals.SCENES,) if scenes else ())
  model = build_model(
    config.model,
    vocab_size=2,  # until the tokenizer is known
    eos_id=1,
    multi_label=config.data.num_prompts > 0,
    remat=config.remat,
  )
  optim.check_freeze(config.freeze, state_dicts.abstract_variables(model)['params'])
  changed = workdir_lib.check_config(workdir, config)
  workdir_lib.check_data(workdir, source.metadata())
  weights = None
  with contextlib.closing(Checkpoints(workdir, keep=1, read_only=True)) as checkpoints:
    resumes = processes.all_gather_objects(bool(checkpoints.steps()))[0]
  if config.init_from and not resumes:
    weights = initial_weights.read_checked(config, model)  # by all processes: each reads its shards of a checkpoint
  with processes.first_process_first():
    if jax.process_index() == 0:
      workdir_lib.forget_other_start(workdir, config, source.metadata())
      workdir_lib.record_data(workdir, source.metadata())
      licence_lib.keep(workdir, weights.licence if weights else licence_lib.Licence())
    tokenizer = workdir_lib.prepare_tokenizer(workdir, initial_weights.with_tokenizer(config), source)
    workdir_lib.write_config(workdir, config)
  model = with_vocabulary(model, tokenizer.vocab_size, tokenizer.eos_id)
  attention = choose_attention(model, mesh, train=True)
  model = model.with_attention(attention.implementation)
  return Run(config, mesh, model, tx, schedule, source, tokenizer, tuple(changed), benchmarks, attention, weights)


def restore_or_init(run: Run, checkpoints: Checkpoints) -> TrainState:
  """The state to start from.

  1. The newest readable checkpoint in the workdir, with its position in the data.
  2. Otherwise the weights that `config.init_from` names, at step 0 and without the optimiser's moments.
  3. Otherwise the config's seed.
  """
  restored = checkpoints.restore(train_state.abstract_state(run.model, run.tx, run.text_shape, run.mesh, run.averages))
  if restored is not None:
    return restored.state
  return initial_weights.initial_state(
    run.model, run.tx, run.config.seed, run.text_shape, run.mesh, weights=run.weights, average=run.averages
  )


def jit_step(run: Run, state: TrainState) -> Callable[..., tuple[TrainState, train_step.StepMetrics]]:
  """The jitted training step, with the shardings of `state`, which it donates."""
  step = functools.partial(
    train_step.train_step,
    model=run.model,
    tx=run.tx,
    grad_accum_steps=run.config.grad_accum_steps,
    text_budget=run.config.text_budget,
    random_erasing=build_random_erasing(run.config.data.augment),
    batch_sharding=sharding.batch_sharding(run.mesh),
    ema_decay=run.config.ema_decay,
    multi_label_loss=run.config.multi_label_loss,
    freeze=run.config.freeze,
  )
  return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))


def read_batches(run: Run, first_batch: int) -> Iterator[dict[str, np.ndarray]]:
  """This process's rows of the run's batches, from the given one to the last."""
  config = run.config
  rows = sharding.process_local_rows(config.batch_size, run.mesh)
  examples = pipeline.build_examples(config, run.source, run.tokenizer, first_batch=first_batch, rows=rows)
  return pipeline.iterate(
    examples,
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
    prefetch_batches=config.data.prefetch_batches,
  )


def with_vocabulary(model: ImageTextModel, vocab_size: int, eos_id: int) -> ImageTextModel:
  """The same model for the pieces of a tokenizer."""
  return model.clone(text=model.text.clone(vocab_size=vocab_size, eos_id=eos_id))
