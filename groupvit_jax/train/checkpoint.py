"""Checkpoints: the training state and its config, saved atomically and restored onto shardings.

Orbax writes to disks and to gs:// from every process in parallel. It cannot write to s3://: see `_S3Manager`.
"""

from collections.abc import Iterable, Iterator, Mapping
import concurrent.futures
import contextlib
import dataclasses
import json
import logging as python_logging
import math
import os
import re
import shutil
import sys
from typing import NamedTuple

from absl import logging
from etils import epath
import fsspec
import jax
from jax.experimental import multihost_utils
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from groupvit_jax import storage
from groupvit_jax.errors import ResourceError, Unavailable, UserError
from groupvit_jax.running import processes
from groupvit_jax.train.state import TrainState

BEST_FOLDER = 'best'  # in the workdir; best.json beside it holds the metric and its value

_ATTEMPTS = 2  # at reading a checkpoint: a disk or a network may be busy once
_COMPLETE = 'complete'  # the last object of a step in s3://
_BY_ORBAX = re.compile('/orbax/|OCDBT|tensorstore')  # in the path of a log's call, or in what asyncio logs of a task


class Restored(NamedTuple):
  """A checkpoint that was read."""

  state: TrainState | dict[str, object]  # all of it, or {'params': ..., 'batch_stats': ...}
  step: int
  skipped: tuple[int, ...]  # newer steps that could not be read


class Checkpoints:
  """The checkpoints of a workdir, under `checkpoints/STEP/` (or another folder's)."""

  def __init__(self, workdir: epath.PathLike, *, keep: int, read_only: bool = False, folder: str = 'checkpoints'):
    """Opens the folder and keeps the newest checkpoints; `read_only` creates, deletes and renames nothing.

    Raises OSError where nothing can be saved.
    """
    for name in ('absl', 'asyncio'):
      python_logging.getLogger(name).addFilter(_is_not_raised_anyway)
    _hide_closed_loops()
    self._read_only = read_only
    self.folder = epath.Path(workdir) / folder
    self._remote = '://' in str(workdir)
    if str(workdir).startswith('s3://'):
      self._manager = _S3Manager(str(self.folder), keep=keep, read_only=read_only)
      return
    if not self._remote:
      self.folder = self.folder.resolve()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else keep,
      create=not read_only,
      read_only=read_only,
      cleanup_tmp_directories=not read_only,
      enable_async_checkpointing=not read_only,
    )
    self._manager = _OrbaxManager(self.folder, options=options)
    if not read_only:
      with _save_errors(self.folder):
        self._check_writable()

  def steps(self) -> list[int]:
    """Steps of complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, state: TrainState, config: ml_collections.ConfigDict) -> None:
    """Starts saving in the background; a checkpoint counts only once it is complete.

    Raises OSError where this or the previous save failed; Unavailable where a bucket's store did, after all retries.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(_present_fields(state)), config=ocp.args.JsonSave(json.loads(config.to_json()))
    )
    with _save_errors(self.folder):
      self._manager.check_for_errors()
      self._check_writable()
      saved = self._manager.save(step, args=args, force=True)  # Orbax declines what is older than its newest step
      assert saved, step

  def check(self) -> None:
    """Raises OSError when a save in the background has failed; does not wait."""
    with _save_errors(self.folder):
      if not self._manager.is_saving_in_progress():
        self._manager.wait_until_finished()  # raises the error of a save that is over

  def wait(self) -> None:
    """Blocks until the last save is complete. Raises OSError if it failed."""
    with _save_errors(self.folder):
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    if isinstance(self._manager, _S3Manager):
      processes.barrier('saved')  # only process 0 uploads

  def restore(self, abstract_state: TrainState) -> Restored | None:
    """Restores the newest readable checkpoint onto the shardings of `abstract_state`; None where there is none.

    Raises UserError where there are checkpoints and none of them can be read.
    """
    restored = self._restore_newest(ocp.args.StandardRestore(_present_fields(abstract_state)))
    return restored and restored._replace(state=TrainState(**restored.state))

  def restore_variables(self, abstract_variables: dict[str, object]) -> Restored | None:
    """Restores only the given entries of the state (the variables, or the moving average); otherwise as `restore`."""
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_variables)
    return self._restore_newest(ocp.args.PyTreeRestore(abstract_variables, restore_args, partial_restore=True))

  def close(self) -> None:
    """Ends the background threads."""
    self._manager.close()

  def _check_writable(self) -> None:
    """Creates and deletes a folder: where permission is missing, Orbax would wait for ever."""
    if jax.process_index() == 0 and not self._remote:
      probe = self.folder / f'.writable-{os.getpid()}'
      probe.mkdir(exist_ok=True)  # a killed process of this number may have left it
      probe.rmdir()

  def _restore_newest(self, restore_args: ocp.args.CheckpointArgs) -> Restored | None:
    failures = {}
    for step in reversed(self.steps()):
      for _ in range(_ATTEMPTS):
        state, error = self._read(step, restore_args)
        if all(processes.all_gather_objects(error is None)):  # each process reads its own shards
          self._quarantine(failures)
          return Restored(state, step, tuple(failures))
      failures[step] = error or OSError('another process cannot read it')
      logging.warning('checkpoint %d in %s is damaged; skipped: %s', step, self.folder, _shorten(failures[step]))
    if failures:
      step, error = next(iter(failures.items()))
      raise UserError(
        f'none of the checkpoints {sorted(failures)} in {self.folder} can be read; {step} says: {_shorten(error)}'
      )
    return None

  def _read(self, step: int, restore_args: ocp.args.CheckpointArgs) -> tuple[object, Exception | None]:
    """The state of a step, or why this process cannot read it."""
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(state=restore_args))
      return jax.block_until_ready(restored.state), None
    except Exception as error:  # which one a damaged file raises depends on the file
      return None, error

  def _quarantine(self, steps: Iterable[int]) -> None:
    """Renames damaged checkpoints to `damaged-STEP`, so that the run can write those steps again."""
    if self._read_only or not steps:
      return
    with processes.first_process_first():
      for step in steps if jax.process_index() == 0 else ():
        target = self.folder / f'damaged-{step}'
        if target.exists():  # from an earlier visit to this step
          target.rmtree()
        (self.folder / str(step)).rename(target)
    self._manager.reload()


class BestCheckpoint:
  """Keeps the state with the highest value of one metric, in `best/` of the workdir."""

  def __init__(self, workdir: epath.PathLike, metric: str):
    """Reads what an interrupted run kept; the metric is named as it is logged, '' keeps nothing."""
    self._metric, self._path = metric, epath.Path(workdir) / 'best.json'
    self._checkpoints = Checkpoints(workdir, keep=1, folder=BEST_FOLDER) if metric else None
    self.value, self.step = -math.inf, 0
    if metric and self._path.exists():
      kept = json.loads(self._path.read_text())
      if kept['metric'] == metric and kept['step'] in self._checkpoints.steps():
        self.value, self.step = kept['value'], kept['step']

  def offer(
    self,
    metrics: Mapping[str, float],
    state: TrainState,
    config: ml_collections.ConfigDict,
    settings: Mapping[str, object],
  ) -> bool:
    """Saves a state if its metric is among these and higher than before; returns whether it was.

    `metrics` were just measured, the same in every process; `settings` are what they depend on, for best.json.
    """
    prefix = self._metric.rpartition('/')[0]
    if not self._metric or not any(name.startswith(f'{prefix}/') for name in metrics):
      return False
    if self._metric not in metrics:
      raise UserError(f'checkpoint.best={self._metric!r} is not measured; there are {", ".join(metrics)}')
    value = float(metrics[self._metric])
    if not value > self.value:  # nan is never best
      return False
    self.value, self.step = value, int(state.step)
    self._checkpoints.save(state, config)
    self._checkpoints.wait()  # best.json must not name a checkpoint that is not there
    if jax.process_index() == 0:
      kept = {'metric': self._metric, 'value': value, 'step': self.step, 'settings': dict(settings)}
      storage.write_atomic(str(self._path), (json.dumps(kept, indent=2) + '\n').encode())
    return True

  def close(self) -> None:
    """Ends the background threads."""
    if self._checkpoints is not None:
      self._checkpoints.close()


class _OrbaxManager(ocp.CheckpointManager):
  """Orbax's manager, which leaves SIGTERM to the training loop: JAX counts how often processes ask for it."""

  def reached_preemption(self, step: int) -> bool:
    return False


class _S3Manager:
  """The part of a CheckpointManager that `Checkpoints` uses, for a folder in s3://.

  Orbax knows no s3://, and S3 cannot rename. Process 0 gathers the state, writes it to a local disk and uploads it,
  last of all an empty object named `complete`, without which a step does not count. Each process downloads what it
  restores.
  """

  def __init__(self, url: str, *, keep: int, read_only: bool):
    self._system, self._root = fsspec.core.url_to_fs(url)
    self._keep, self._process = keep, jax.process_index()
    self._disk = storage.temporary_folder(
      'read' if read_only else 'checkpoints', None if read_only else url, self._process
    )
    self._alone = ocp.options.MultiprocessingOptions(
      primary_host=self._process,
      active_processes={self._process},
      barrier_sync_key_prefix=f'{self._process}-{self._disk.name}',
    )
    self._writer = self._local_manager(max_to_keep=1) if not read_only and self._process == 0 else None
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'upload')
    self._upload = concurrent.futures.Future()
    self._upload.set_result(None)
    self.reload()

  def all_steps(self) -> list[int]:
    """Steps that are complete or being saved, the same in all processes."""
    return self._steps

  def reload(self) -> None:
    """Lists the steps again. Raises Unavailable where the store does not answer."""
    try:
      files = storage.with_retries(self._files)
    except Unavailable as error:
      raise Unavailable(f'cannot look into {self._root} {error}') from error
    self._steps = sorted(step for step, names in files.items() if _COMPLETE in names)

  def save(self, step: int, args: ocp.args.Composite, *, force: bool) -> bool:
    """Gathers the state, and writes and uploads it in the background; all processes take part. Returns True."""
    self.wait_until_finished()
    state = jax.tree.map(_gather_on_first_process, args['state'].item)
    self._steps = [*self._steps, step][-self._keep :]
    if self._process == 0:
      args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), config=args['config'])
      saved = self._writer.save(step, args=args, force=force)
      assert saved, step
      self._upload = self._thread.submit(self._upload_step, step)
    return True

  def is_saving_in_progress(self) -> bool:
    return not self._upload.done()

  def wait_until_finished(self) -> None:
    """Waits for the last save, and raises its error."""
    self._upload.result()

  def check_for_errors(self) -> None:
    """Raises the error of the last save, if it is over."""
    if self._upload.done():
      self._upload.result()

  def restore(self, step: int, args: ocp.args.Composite) -> ocp.args.Composite:
    """Downloads and reads a step."""
    folder, names = self._disk / str(step), sorted(storage.with_retries(self._files)[step] - {_COMPLETE})
    try:
      for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
      remote, local = [f'{self._root}/{step}/{name}' for name in names], [str(folder / name) for name in names]
      storage.with_retries(self._system.get, remote, local)
      with contextlib.closing(self._local_manager(read_only=True)) as reader:
        return reader.restore(step, args=args)
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  def close(self) -> None:
    """Ends the thread and clears the disk."""
    self._thread.shutdown()
    if self._writer is not None:
      self._writer.close()
    shutil.rmtree(self._disk, ignore_errors=True)

  def _local_manager(self, **options) -> _OrbaxManager:
    """Reads or writes whole checkpoints in this process alone: Orbax would otherwise divide the work."""
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    handlers = {
      'state': ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=self._alone),
      'config': ocp.JsonCheckpointHandler(multiprocessing_options=self._alone),
    }
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=self._alone, **options)
    return _OrbaxManager(self._disk, options=options, item_handlers=None if options.read_only else handlers)

  def _files(self) -> dict[int, set[str]]:
    """Names of the files of each step."""
    self._system.invalidate_cache()
    files: dict[int, set[str]] = {}
    for path in self._system.find(self._root):
      step, _, name = path[len(self._root) :].strip('/').partition('/')
      if step.isdigit():
        files.setdefault(int(step), set()).add(name)
    return files

  def _upload_step(self, step: int) -> None:
    """Uploads a step from the disk; deletes steps that are too many, or were never completed."""
    self._writer.wait_until_finished()
    self._writer.check_for_errors()
    storage.with_retries(self._delete, step)  # what an interrupted save left
    folder, target = self._disk / str(step), f'{self._root}/{step}'
    paths = [path for path in folder.rglob('*') if path.is_file()]
    names = [f'{target}/{path.relative_to(folder).as_posix()}' for path in paths]
    storage.with_retries(self._system.put, list(map(str, paths)), names)
    storage.with_retries(self._system.pipe_file, f'{target}/{_COMPLETE}', b'')
    for old in storage.with_retries(self._files).keys() - set(self._steps):
      storage.with_retries(self._delete, old)

  def _delete(self, step: int) -> None:
    """Deletes a step, which first ceases to count."""
    files = self._files().get(step, set())
    for names in ({_COMPLETE} & files, files - {_COMPLETE}):
      if names:
        self._system.rm([f'{self._root}/{step}/{name}' for name in sorted(names)])


def _gather_on_first_process(leaf: jax.Array) -> jax.Array | np.ndarray | None:
  """A leaf that process 0 holds whole, and None in the other processes; all of them must call."""
  if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return None if jax.process_index() else leaf


def _present_fields(state: TrainState) -> dict[str, object]:
  """The fields of a state that are not None: Orbax would keep an entry for a missing average."""
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return {name: value for name, value in fields.items() if value is not None}


@contextlib.contextmanager
def _save_errors(folder: epath.Path) -> Iterator[None]:
  """Turns whatever a failed write raises (tensorstore's are ValueErrors) into one OSError with the reason."""
  try:
    yield
  except Exception as error:
    kind = Unavailable if isinstance(error, Unavailable) or _is_unavailable(error) else ResourceError
    raise kind(
      f'cannot save a checkpoint in {folder}: {_shorten(error)}; the checkpoints already there are untouched'
    ) from error


def _is_unavailable(error: Exception) -> bool:
  """Whether TensorStore gave up on gs:// after its retries."""
  return 'UNAVAILABLE' in str(error) or 'DEADLINE_EXCEEDED' in str(error)


def _shorten(error: Exception) -> str:
  """The first line of an error; of a long one both ends, for the reason may come last."""
  line = (str(error).strip() or type(error).__name__).splitlines()[0]
  return line if len(line) < 300 else f'{line[:100]} ... {line[-200:]}'


def _hide_closed_loops() -> None:
  """Keeps Python from printing what each write of TensorStore reports that ends after a save has failed."""
  previous = sys.unraisablehook
  if getattr(previous, '__name__', '') == 'print_all_but_closed_loops':
    return

  def print_all_but_closed_loops(unraisable: object) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':
      previous(unraisable)

  sys.unraisablehook = print_all_but_closed_loops


def _is_not_raised_anyway(record: python_logging.LogRecord) -> bool:
  """Filters logs: of one save or restore that fails, Orbax's threads and tasks log hundreds of tracebacks.

  That a folder is opened to be read it warns of as well, and we ask for that.
  """
  source = record.pathname if record.name == 'absl' else record.getMessage()
  if not _BY_ORBAX.search(source):
    return True
  return record.levelno < python_logging.ERROR and not re.search('read[_ ]only', record.getMessage())
