"""A run: restore, step, log, evaluate, save, until the last step or a signal."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import time
from typing import get_args, NamedTuple

from clu import parameter_overview
from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from groupvit_jax import cli
from groupvit_jax.data import augment, pipeline
from groupvit_jax.data.mixture import Mixture
from groupvit_jax.data.sources import build_source
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.interop import licence as licence_lib
from groupvit_jax.interop.licence import Licence
from groupvit_jax.model import text_packing
from groupvit_jax.model.build import build_model, build_random_erasing
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.losses import MultiLabel
from groupvit_jax.running import processes, sharding
from groupvit_jax.running.attention_choice import AttentionChoice, choose_attention
from groupvit_jax.running.interrupts import Interrupts, Preempted
from groupvit_jax.running.profile import StepTrace
from groupvit_jax.train import evals as run_evals
from groupvit_jax.train import initial_weights, open_run, optim
from groupvit_jax.train import state as train_state
from groupvit_jax.train import step as train_step
from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.bad_record_tally import FaultTally
from groupvit_jax.train.checkpoint import BestCheckpoint, Checkpoints
from groupvit_jax.train.evals import RunEvals
from groupvit_jax.train.log import RunLog
from groupvit_jax.train.state import TrainState


class Run(NamedTuple):
  """What a run is made of, before its first step."""

  config: ml_collections.ConfigDict
  mesh: jax.sharding.Mesh
  source: Mixture | None  # like the tokenizer None where a step is compiled and no data are read
  tokenizer: Tokenizer | None
  model: ImageTextModel
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  changed: list[str]  # config keys that differ from the first start
  benchmarks: tuple[run_evals.OpenedBenchmark, ...]
  attention: AttentionChoice | None  # of the image tower; None where a step is compiled for hardware that is not there

  @property
  def text_shape(self) -> tuple[int, int]:
    """(T, L) of the tokens of one image."""
    return 1 + self.config.data.num_prompts, self.config.model.text.context_length

  @property
  def averages(self) -> bool:
    """Whether a moving average of the variables is kept."""
    return self.config.ema_decay > 0


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> int:
  """Trains, or goes on training, the run in a workdir.

  Args:
    config: the experiment.
    workdir: where everything goes.

  Returns:
    The exit code: 0, or `cli.EXIT_PREEMPTED` after a signal.

  Raises:
    ValueError: the config has a mistake or does not fit the workdir.
    OSError: a checkpoint could not be saved.
  """
  with Interrupts().installed() as interrupts:
    try:
      with interrupts.immediately():
        run = set_up(config, workdir)
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
        state = restore_or_init(run, checkpoints)
      return _loop(run, state, checkpoints, workdir, interrupts)
    except Preempted:
      return cli.EXIT_PREEMPTED


def set_up(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Run:
  """Checks the config from cheap to dear, claims the workdir, and builds everything but the state."""
  _check_rhythm(config)
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch_size('batch_size', config.batch_size, mesh)
  sharding.check_micro_batches(config.batch_size, config.grad_accum_steps, mesh)
  text_packing.check_budget(config.text_budget)
  if not 0 <= config.ema_decay < 1:
    raise UserError(f'ema_decay={config.ema_decay}: use 0 for no average, or a number below 1, as in 0.9998')
  if config.multi_label_loss not in get_args(MultiLabel):
    raise UserError(f'multi_label_loss={config.multi_label_loss!r}: use {", ".join(map(repr, get_args(MultiLabel)))}')
  schedule = optim.build_schedule(config.optim, config.total_steps, config.batch_size)
  source = build_source(config.data, tuple(config.model.vision.image_size))
  pipeline.check_batch_size(source, config.batch_size)
  augment.build_augment(config.data.augment, tuple(config.model.vision.image_size))
  build_random_erasing(config.data.augment)
  build = functools.partial(
    build_model,
    config.model,
    multi_label=config.data.num_prompts > 0,
    remat=config.remat,
    scan_layers=config.scan_layers,
  )
  benchmarks = run_evals.open_benchmarks(config.benchmarks, tuple(config.model.vision.image_size))
  scenes = config.data.source == 'scenes' and config.eval.every_steps > 0
  run_evals.check_best(config.checkpoint.best, benchmarks, (run_evals.SCENES,) if scenes else ())
  build(vocab_size=2, eos_id=1)  # like the augmentation: a mistake in the config shows before anything is written
  starts_from_weights = config.init_from and not (epath.Path(workdir) / 'config.json').exists()
  # By all processes together: each reads its part of a checkpoint.
  licence = initial_weights.check(config, build) if starts_from_weights else Licence()
  with processes.first_process_first():
    changed = workdir_lib.claim(workdir, config)
    licence_lib.keep(workdir, licence)
    workdir_lib.record_data(workdir, source.metadata())
    tokenizer = workdir_lib.prepare_tokenizer(workdir, initial_weights.with_tokenizer(config), source)
  model = build(vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
  samples = config.batch_size // config.grad_accum_steps
  attention = workdir_lib.prepare_attention(
    workdir,
    f'{mesh.size} x {mesh.devices.flat[0].device_kind}, {samples} samples, {config.model.dtype}',
    lambda: choose_attention(model.vision, samples, mesh, train=True),
  )
  model = model.clone(vision=model.vision.clone(attention=attention.implementation))
  tx = optim.build_optimizer(config.optim, schedule)
  return Run(config, mesh, source, tokenizer, model, tx, schedule, changed, benchmarks, attention)


def _check_rhythm(config: ml_collections.ConfigDict) -> None:
  """Raises ValueError for a number of steps that nothing can happen after."""
  counts = {
    'log_every': config.log_every,
    'checkpoint.every_steps': config.checkpoint.every_steps,
    'checkpoint.keep': config.checkpoint.keep,
    'max_skipped_in_a_row': config.max_skipped_in_a_row,
  }
  for key, value in counts.items():
    if value < 1:
      raise UserError(f'{key}={value}: use 1 or more')
  if config.eval.every_steps < 0:
    raise UserError(f'eval.every_steps={config.eval.every_steps}: use 0 for never, or more')


def restore_or_init(run: Run, checkpoints: Checkpoints) -> TrainState:
  """The state to start from.

  1. The newest whole checkpoint in the workdir: everything goes on, the position in the data included.
  2. Otherwise the weights that `config.init_from` names, at step 0 and without the optimiser's moments.
  3. Otherwise the config's seed.
  """
  restored = checkpoints.restore(train_state.abstract_state(run.model, run.tx, run.text_shape, run.mesh, run.averages))
  if restored is not None:
    return restored.state
  return initial_weights.initial_state(
    run.model, run.tx, run.config.seed, run.text_shape, run.mesh, init_from=run.config.init_from, average=run.averages
  )


def jit_step(run: Run, state: TrainState) -> Callable[..., tuple[TrainState, train_step.StepMetrics]]:
  """The training step, compiled for the places where `state` lies; it takes over the state it is given."""
  step = functools.partial(
    train_step.train_step,
    model=run.model,
    tx=run.tx,
    multi_label_weight=run.config.multi_label_weight,
    grad_accum_steps=run.config.grad_accum_steps,
    text_budget=run.config.text_budget,
    random_erasing=build_random_erasing(run.config.data.augment),
    batch_sharding=sharding.batch_sharding(run.mesh),
    ema_decay=run.config.ema_decay,
    multi_label_loss=run.config.multi_label_loss,
  )
  return jax.jit(step, donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), None))


def read_batches(run: Run, first_batch: int) -> Iterator[dict[str, np.ndarray]]:
  """This process's rows of the run's batches, from the given one to the last."""
  config = run.config
  examples = pipeline.build_examples(
    config,
    run.source,
    run.tokenizer,
    first_batch=first_batch,
    rows=sharding.process_local_rows(config.batch_size, run.mesh),
  )
  return pipeline.iterate(
    examples,
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
    prefetch_batches=config.data.prefetch_batches,
  )


def _loop(
  run: Run, state: TrainState, checkpoints: Checkpoints, workdir: epath.PathLike, interrupts: Interrupts
) -> int:
  """Evaluates what an earlier start left, then steps until the end or a signal.

  Figures are fetched while the next step runs, so no step waits for them.
  """
  config, first_step = run.config, int(state.step)
  log = RunLog(workdir, first_step=first_step, total_steps=config.total_steps, batch_size=config.batch_size)
  with contextlib.closing(log):  # whatever ends the run: what was logged can be read
    _announce(log, run, state)
    scheduled = run_evals.schedule(
      config, run.source, run.benchmarks, run.model, run.tokenizer, sharding.evaluation_mesh(run.mesh)
    )
    facts = functools.partial(
      open_run.provenance, workdir, weights='ema' if run.averages else 'trained', model=run.model, mesh=run.mesh
    )
    best = BestCheckpoint(workdir, config.checkpoint.best)
    evals = RunEvals(scheduled, config, log, best, interrupts, facts)
    tally = FaultTally(
      workdir, first_step, batch_size=config.batch_size, max_share=config.data.max_fault_share, mesh=run.mesh
    )
    log_step = functools.partial(_log_step, log, tally, _learning_rates(run), config.max_skipped_in_a_row)
    whole = evals.run(evals.missing(first_step), state)  # whether all that was due is evaluated
    step_fn = jit_step(run, state)
    trace = StepTrace(workdir, first_step, config.profile, log.say)
    pending: tuple[int, train_step.StepMetrics, jax.Array | None] | None = None
    started = time.perf_counter()
    for step, batch in enumerate(read_batches(run, first_step) if whole else (), start=first_step + 1):
      tally.add(batch.pop('bad_records'))
      batch = pipeline.to_devices(batch, run.mesh)
      if step == first_step + 1:
        step_fn = step_fn.lower(state, batch).compile()
        processes.barrier('compiled')
      with trace.step(step):
        state, figures = step_fn(state, batch)
      sharding.synchronize(state, run.mesh)
      checkpoints.check()
      trace.stop_after(step, figures)
      if pending is not None:
        log_step(*pending)
      logged = step % config.log_every == 0 or step == config.total_steps
      pending = (step, figures, tally.total() if logged else None)
      if step == first_step + 1:
        jax.block_until_ready(state)
        log.say(f'first step after {time.perf_counter() - started:.1f} s (compiled)')
        if not logged:
          log.restart_clock(step)
      due = evals.due(step)
      if interrupts.stop_after_step():
        whole = not any(each.evaluate for each in due)
        break
      # Saved before it is evaluated: with several processes a signal has to wait for the evaluation.
      saving = step % config.checkpoint.every_steps == 0 or any(each.evaluate for each in due)
      if due or saving:
        log_step(*pending)
        pending = None
      if saving:
        _save(log, tally, checkpoints, state, config)
      if due:
        with log.paused():
          whole = evals.run(due, state)
      if not whole:
        break
    if pending is not None:
      log_step(*pending)
    trace.close(state)
    _save(log, tally, checkpoints, state, config)
    checkpoints.wait()
    checkpoints.close()
    best.close()
    if whole and int(state.step) >= config.total_steps:
      return 0
    log.say(f'stopped by a signal after step {int(state.step)}; the same command goes on from there')
    return cli.EXIT_PREEMPTED


def _save(
  log: RunLog, tally: FaultTally, checkpoints: Checkpoints, state: TrainState, config: ml_collections.ConfigDict
) -> None:
  """Starts to save a state, after what was logged up to it."""
  with log.paused():
    tally.save(int(state.step))
    checkpoints.save(state, config)


def _learning_rates(run: Run) -> np.ndarray:
  """The learning rate of each update, float32 [total_steps], computed once: asked for step by step, a device would
  answer only after the step that it is at."""
  return np.asarray(run.schedule(jnp.arange(run.config.total_steps)))


def _announce(log: RunLog, run: Run, state: TrainState) -> None:
  """What a person needs to trust a run, once."""
  step = int(state.step)
  log.say(parameter_overview.get_parameter_overview(state.params, include_stats=False))
  if not jax.distributed.is_initialized():
    log.say(processes.describe_single_process())
  log.say(
    f'mesh {dict(run.mesh.shape)} of {run.mesh.devices.flat[0].device_kind}, {jax.process_count()} process(es); '
    f'{len(run.source):,} records; vocabulary {run.tokenizer.vocab_size:,}'
  )
  for part in run.source.sets:
    if part.num_shards:
      log.say(f'{part.name}: {len(part.source):,} records in {part.num_shards:,} shards, weight {part.weight:g}')
  log.say(f'attention by {run.attention.implementation}: {run.attention.reason}')
  log.say(f'goes on after step {step}' if step else 'starts at step 0')
  for line in run.changed:
    log.say(f'changed since the first start: {line}')


def _log_step(
  log: RunLog,
  tally: FaultTally,
  rates: np.ndarray,
  max_skipped_in_a_row: int,
  step: int,
  figures: train_step.StepMetrics,
  faults: jax.Array | None,
) -> None:
  """Waits for a step, logs its figures when it is their turn (then there are `faults`).

  Nothing is computed on devices, which are at the next step already. Ends the run when updates keep being skipped, or
  too many records were replaced.
  """
  in_a_row = int(jax.device_get(figures.scalars['skipped_in_a_row']))
  hopeless = in_a_row >= max_skipped_in_a_row
  if faults is not None or hopeless:
    found = jax.device_get(figures)
    scalars = {name: float(value) for name, value in found.scalars.items()}
    updates = step - int(scalars['skipped'])
    log.train(step, scalars | found.health.compute() | {'learning_rate': float(rates[max(updates - 1, 0)])})
  if faults is not None:
    counts = tally.counts(faults)
    if counts:
      log.figures(step, {f'data/faults/{cause}': count for cause, count in counts.items()})
    tally.check(step, counts)
  if hopeless:
    raise UserError(
      f'the loss or its gradient was not finite in {in_a_row} steps in a row up to step {step}; lower optim.peak_lr, '
      f'or raise max_skipped_in_a_row={max_skipped_in_a_row}; the last checkpoint is from before'
    )
