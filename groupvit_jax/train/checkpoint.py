"""Checkpoints: the whole state and the config it belongs to, written atomically, restored onto shardings."""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import gc
import io
import json
import logging as python_logging
import os
import time
import traceback
from typing import NamedTuple

from absl import logging
from etils import epath
import jax
import ml_collections
import orbax.checkpoint as ocp

from groupvit_jax.errors import ResourceError, Unavailable, UserError
from groupvit_jax.running import processes
from groupvit_jax.train.checkpoint_managers import BucketManager, DiskManager
from groupvit_jax.train.state import TrainState

_ATTEMPTS = 2  # at a checkpoint: what fails once may be a disk or a network that was busy


class Restored(NamedTuple):
  """A checkpoint that was read."""

  state: TrainState | dict[str, object]  # all of it, or {'params': ..., 'batch_stats': ...}
  step: int
  skipped: tuple[int, ...]  # newer steps that could not be read


class Checkpoints:
  """The checkpoints of a workdir, under `checkpoints/STEP/` (or another folder's)."""

  def __init__(self, workdir: epath.PathLike, *, keep: int, read_only: bool = False, folder: str = 'checkpoints'):
    """Opens (and unless `read_only` creates) the folder.

    Args:
      workdir: of the run.
      keep: how many of the newest checkpoints stay.
      read_only: for evaluation.
      folder: in the workdir.

    Raises:
      OSError: nothing can be saved there.
    """
    logging.get_absl_logger().addFilter(_is_not_orbaxs)  # what it raises is reported by who catches it
    self._read_only = read_only
    self.folder = epath.Path(workdir) / folder
    self._in_bucket = '://' in str(workdir)
    if self._in_bucket:
      self._manager = BucketManager(str(self.folder), keep=keep, read_only=read_only)
      return
    self.folder = self.folder.resolve()
    with _quiet():
      options = ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else keep,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        enable_async_checkpointing=not read_only,
      )
      self._manager = DiskManager(self.folder, options=options)
    if not read_only:
      with _disk_errors(self.folder):
        self._check_writable()

  def steps(self) -> list[int]:
    """Steps there are checkpoints of, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, config: ml_collections.ConfigDict) -> None:
    """Starts saving in the background; a checkpoint counts only once it is complete.

    Raises:
      OSError: this or the previous save failed; Unavailable where a bucket's store did, again and again.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    with _disk_errors(self.folder):
      self._manager.check_for_errors()
      self._check_writable()
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(_entries(state)), config=ocp.args.JsonSave(json.loads(config.to_json()))
        ),
      )

  def check(self) -> None:
    """Waits for nothing, but raises OSError when a save in the background has failed."""
    with _disk_errors(self.folder):
      if not self._manager.is_saving_in_progress():
        self._manager.wait_until_finished()  # it is over; only here does its error come out

  def wait(self) -> None:
    """Blocks until the last save is complete. Raises OSError if it failed."""
    with _disk_errors(self.folder):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    if self._in_bucket:
      processes.barrier('saved')  # only the first process knows

  def restore(self, abstract_state: TrainState) -> Restored | None:
    """Restores the newest checkpoint that is whole, onto the shardings of `abstract_state`.

    Returns:
      The state, or None when there is no checkpoint at all.

    Raises:
      ValueError: there are checkpoints and none of them can be read.
    """
    restored = self._newest(ocp.args.StandardRestore(_entries(abstract_state)))
    return restored and restored._replace(state=TrainState(**restored.state))

  def restore_variables(self, abstract_variables: dict[str, object]) -> Restored | None:
    """Restores what `model.apply` takes and leaves the rest, above all the optimiser's moments, unread.

    Args:
      abstract_variables: `TrainState.variables` of an abstract state.

    Returns:
      The variables as `state`, or None when there is no checkpoint at all.

    Raises:
      ValueError: there are checkpoints and none of them can be read.
    """
    return self._newest(
      ocp.args.PyTreeRestore(
        abstract_variables, ocp.checkpoint_utils.construct_restore_args(abstract_variables), partial_restore=True
      )
    )

  def _check_writable(self) -> None:
    """Makes a folder here, as a save will: where Orbax may not, it waits for ever instead of saying so."""
    if jax.process_index() == 0 and not self._in_bucket:
      probe = self.folder / f'.writable-{os.getpid()}'
      probe.mkdir(exist_ok=True)  # a killed process of this number may have left it
      probe.rmdir()

  def _newest(self, restore_args: ocp.args.CheckpointArgs) -> Restored | None:
    """The newest checkpoint that can be read."""
    failures = {}
    for step in reversed(self.steps()):
      for _ in range(_ATTEMPTS):
        state, error = self._read(step, restore_args)
        if processes.true_in_all_processes(error is None):  # each process reads its own parts
          self._set_aside(failures)
          return Restored(state, step, tuple(failures))
      failures[step] = error or OSError('another process cannot read it')
      logging.warning(
        'checkpoint %d in %s is damaged and was passed over: %s', step, self.folder, _line(failures[step])
      )
    if failures:
      step, error = next(iter(failures.items()))
      raise UserError(
        f'none of the checkpoints {sorted(failures)} in {self.folder} can be read; {step} says: {_line(error)}'
      )
    return None

  def _read(self, step: int, restore_args: ocp.args.CheckpointArgs) -> tuple[object, Exception | None]:
    """The state of a step, or why this process cannot read it."""
    try:
      with _quiet():
        restored = self._manager.restore(step, args=ocp.args.Composite(state=restore_args))
        return jax.block_until_ready(restored.state), None
    except Exception as error:  # pylint: disable=broad-except
      # Which exception a damaged file raises depends on the file; every one means "not this checkpoint".
      return None, error

  def close(self) -> None:
    """Ends the background threads."""
    self._manager.close()

  def _set_aside(self, steps: Iterable[int]) -> None:
    """Renames damaged checkpoints, so that the run can write those steps again and nothing is lost."""
    if self._read_only or not steps:
      return
    with processes.first_process_first():
      for step in steps if jax.process_index() == 0 else ():
        self._manager.set_aside(step)
    self._manager.reload()


def _entries(state: TrainState) -> dict[str, object]:
  """The entries of a state that are there: Orbax would otherwise keep a place for an average that is not."""
  return {field.name: value for field in dataclasses.fields(state) if (value := getattr(state, field.name)) is not None}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps a library's asides off the terminal; what it raises is reported by who catches it.

  Of one damaged file Orbax's readers print a hundred tracebacks, some of them when their tasks are collected.
  """
  asyncio_log, verbosity = python_logging.getLogger('asyncio'), logging.get_verbosity()
  disabled = asyncio_log.disabled
  asyncio_log.disabled = True
  logging.set_verbosity(logging.ERROR)
  try:
    with contextlib.redirect_stderr(io.StringIO()):
      try:
        yield
      except Exception as error:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        time.sleep(0.3)  # readers that are still at work print when they find that nobody waits
        raise
  finally:
    asyncio_log.disabled = disabled
    logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _disk_errors(folder: epath.Path) -> Iterator[None]:
  """Turns whatever a failed write raises (tensorstore's are ValueErrors) into one OSError with the reason."""
  try:
    yield
  except Exception as error:
    kind = Unavailable if isinstance(error, Unavailable) else ResourceError
    raise kind(
      f'cannot save a checkpoint in {folder}: {_line(error)}; the checkpoints already there are untouched'
    ) from error


def _line(error: Exception) -> str:
  """The first line of an error; of a long one both ends, for the reason may come last."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) < 300 else f'{line[:100]} ... {line[-200:]}'


def _is_not_orbaxs(record: python_logging.LogRecord) -> bool:
  """Whether a line of the log is not Orbax's: of a save that fails it prints a traceback per thread."""
  return '/orbax/' not in record.pathname
