"""The training loop: steps, logs, evaluates and saves until the last step or a signal."""

import collections
from collections.abc import Callable
import contextlib
import functools
import time

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from groupvit_jax import cli
from groupvit_jax.data import pipeline
from groupvit_jax.errors import UserError
from groupvit_jax.running import folder_lock, processes, sharding
from groupvit_jax.running.interrupts import Interrupts, Preempted
from groupvit_jax.running.profile import StepTrace
from groupvit_jax.train import restored_run
from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.bad_record_tally import BadRecordTally
from groupvit_jax.train.checkpoint import BestCheckpoint, Checkpoints
from groupvit_jax.train.evals import RunEvals, schedule_evaluations
from groupvit_jax.train.log import RunLog
from groupvit_jax.train.run import jit_step, read_batches, restore_or_init, Run, set_up
from groupvit_jax.train.state import TrainState
from groupvit_jax.train.step import StepMetrics

MAX_SKIPPED_IN_A_ROW = 10  # updates that are not finite; then the run ends


def train(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> int:
  """Trains the run in a workdir, from its start or its newest checkpoint.

  Returns the exit code: 0, or `cli.EXIT_PREEMPTED` after a signal.
  """
  with contextlib.ExitStack() as stack:
    interrupts = stack.enter_context(Interrupts().installed())
    try:
      with interrupts.immediately():
        check_lock = stack.enter_context(folder_lock.hold(str(workdir), '--workdir'))
        undo = stack.enter_context(workdir_lib.undo_start(workdir))
        run = set_up(config, workdir)
        checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
        state = restore_or_init(run, checkpoints)
      return _loop(run._replace(weights=None), state, checkpoints, workdir, interrupts, check_lock, undo)
    except Preempted:
      return cli.EXIT_PREEMPTED


def _loop(
  run: Run,
  state: TrainState,
  checkpoints: Checkpoints,
  workdir: epath.PathLike,
  interrupts: Interrupts,
  check_lock: Callable[[], None],
  undo: contextlib.ExitStack,
) -> int:
  """Runs the evaluations that an earlier start did not finish, then steps until the end or a signal.

  Metrics are fetched while the next step runs, so no step waits for them.
  """
  config, first_step = run.config, int(state.step)
  log = RunLog(workdir, first_step=first_step, total_steps=config.total_steps, batch_size=config.batch_size)
  with contextlib.closing(log):  # also after an error
    _log_start(log, run, state)
    provenance = functools.partial(
      restored_run.provenance, workdir, weights='ema' if run.averages else 'trained', model=run.model, mesh=run.mesh
    )
    eval_mesh = sharding.evaluation_mesh(run.mesh)
    scheduled = schedule_evaluations(config, run.source, run.benchmarks, run.model, run.tokenizer, eval_mesh)
    best = BestCheckpoint(workdir, config.checkpoint.best)
    evals = RunEvals(scheduled, config, log, best, interrupts, provenance)
    tally = BadRecordTally(
      workdir, first_step, batch_size=config.batch_size, max_share=config.data.max_fault_share, mesh=run.mesh
    )
    log_step = functools.partial(_log_step, log, tally, _learning_rates(run))
    all_evaluated = evals.run(evals.missing(first_step), state)
    step_fn = jit_step(run, state)
    trace = StepTrace(workdir, first_step, config.profile, log.message)
    pending: tuple[int, StepMetrics, jax.Array | None] | None = None
    started = time.perf_counter()
    for step, batch in enumerate(read_batches(run, first_step) if all_evaluated else (), start=first_step + 1):
      tally.add(batch.pop('bad_records'))
      batch = pipeline.to_devices(batch, run.mesh)
      if step == first_step + 1:
        step_fn = step_fn.lower(state, batch).compile()
        processes.barrier('compiled')
      with trace.step(step):
        state, metrics = step_fn(state, batch)
      sharding.synchronize(state, run.mesh)
      checkpoints.check()
      check_lock()
      trace.stop_after(step, metrics)
      if pending is not None:
        log_step(*pending)
      logged = step % config.log_every == 0 or step == config.total_steps
      pending = (step, metrics, tally.total() if logged else None)
      if step == first_step + 1:
        jax.block_until_ready(state)
        undo.pop_all()
        log.message(f'first step after {time.perf_counter() - started:.1f} s (compiled)')
        if not logged:
          log.restart_clock(step)
      due = evals.due(step)
      if interrupts.stop_after_step():
        all_evaluated = not any(each.evaluate for each in due)
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
          all_evaluated = evals.run(due, state)
      if not all_evaluated:
        break
    if pending is not None:
      log_step(*pending)
    trace.close(state)
    _save(log, tally, checkpoints, state, config)
    checkpoints.wait()
    checkpoints.close()
    best.close()
    if all_evaluated and int(state.step) >= config.total_steps:
      log.message(_describe_end(config, workdir, first_step))
      return 0
    log.message(f'stopped by a signal after step {int(state.step)}; the same command resumes there')
    return cli.EXIT_PREEMPTED


def _save(
  log: RunLog, tally: BadRecordTally, checkpoints: Checkpoints, state: TrainState, config: ml_collections.ConfigDict
) -> None:
  """Starts saving a state and its count of bad records; the log up to it is uploaded first."""
  with log.paused():
    tally.save(int(state.step))
    checkpoints.save(state, config)


def _learning_rates(run: Run) -> np.ndarray:
  """The learning rate of each update, float32 [total_steps]; computed step by step it would wait for the device."""
  return np.asarray(run.schedule(jnp.arange(run.config.total_steps)))


def _log_start(log: RunLog, run: Run, state: TrainState) -> None:
  """Logs devices, data, parameters and the restored step."""
  step = int(state.step)
  if not jax.distributed.is_initialized():
    log.message(processes.describe_single_process())
  log.message(
    f'mesh {dict(run.mesh.shape)} of {run.mesh.devices.flat[0].device_kind}; '
    f'{run.source.describe_size()}; vocabulary {run.tokenizer.vocab_size:,}'
  )
  for part in run.source.sets:
    if part.num_shards > 1 or len(run.source.sets) > 1:
      log.message(f'{part.describe()}, weight {part.weight:g}')
  log.message(f'attention by {run.attention.implementation}: {run.attention.reason}')
  log.message(_parameter_table(state.params))
  log.message(f'resumes after step {step}' if step else 'starts at step 0')
  for line in run.changed:
    log.message(f'changed since the first start: {line}')


def _parameter_table(params: dict[str, object]) -> str:
  """Parameters of each module, in lines for people."""
  sizes: collections.Counter[str] = collections.Counter()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    sizes['/'.join(str(key.key) for key in path[:2])] += leaf.size
  width = max(map(len, sizes))
  return '\n'.join(f'{name:{width}} {size:13,}' for name, size in [*sizes.items(), ('parameters', sizes.total())])


def _describe_end(config: ml_collections.ConfigDict, workdir: epath.PathLike, first_step: int) -> str:
  """That the run is done, and the command that comes next."""
  already = ' already' if first_step >= config.total_steps else ''
  what = '' if config.data.source == 'scenes' else "--images='*.jpg' --classes=dog,cat,grass "
  return (
    f'the run is done{already}, at step {config.total_steps:,}; next: '
    f'python -m groupvit_jax eval --workdir={workdir} {what}--output={epath.Path(workdir) / "eval"}'
  )


def _log_step(
  log: RunLog, tally: BadRecordTally, rates: np.ndarray, step: int, metrics: StepMetrics, bad_records: jax.Array | None
) -> None:
  """Waits for a step, and logs its metrics if it is one of those that are logged (then there are `bad_records`).

  Nothing is computed on devices, which run the next step already. Ends the run when a parameter is not finite, updates
  keep being skipped, or too many records were replaced.
  """
  in_a_row, bad_parameters = map(
    int, jax.device_get((metrics.scalars['skipped_in_a_row'], metrics.scalars['bad_parameters']))
  )
  if bad_parameters:
    raise UserError(
      f'{bad_parameters:,} parameters are not finite after step {step}; lower optim.peak_lr; '
      'the last checkpoint is from before'
    )
  diverged = in_a_row >= MAX_SKIPPED_IN_A_ROW
  if bad_records is not None or diverged:
    metrics = jax.device_get(metrics)
    scalars = {name: float(value) for name, value in metrics.scalars.items()}
    updates = step - int(scalars['skipped'])
    log.train(step, scalars | metrics.health.compute() | {'learning_rate': float(rates[max(updates - 1, 0)])})
  if bad_records is not None:
    counts = tally.counts(bad_records)
    if counts:
      log.metrics(step, {f'data/faults/{cause}': count for cause, count in counts.items()})
    tally.check(step, counts)
  if diverged:
    raise UserError(
      f'the loss or its gradient was not finite in {in_a_row} steps in a row up to step {step}; lower optim.peak_lr; '
      'the last checkpoint is from before'
    )
