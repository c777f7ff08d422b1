"""What writes and reads checkpoints: Orbax on a disk that all processes see, and for buckets Orbax on a local one.

Buckets have no folders that could be renamed once they are complete, and Orbax knows but one kind of buckets. Here a
step's files are copied first, and an empty object named `complete` last; without it the step does not count.
"""

import concurrent.futures
import contextlib
import pathlib
import shutil

import fsspec
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from groupvit_jax import storage
from groupvit_jax.errors import Unavailable

_COMPLETE = 'complete'


class DiskManager(ocp.CheckpointManager):
  """Leaves signals to the loop: JAX counts the questions for them, and these would be asked with other numbers."""

  def reached_preemption(self, step: int) -> bool:
    return False

  def set_aside(self, step: int) -> None:
    """Renames a step to `damaged-STEP`."""
    kept = self.directory / f'damaged-{step}'
    if kept.exists():  # the run came to this step before
      kept.rmtree()
    (self.directory / str(step)).rename(kept)


class BucketManager:
  """What `Checkpoints` uses of a DiskManager, for a folder in a bucket.

  One process writes: it gathers what others hold. Every process reads for itself, a whole checkpoint.
  """

  def __init__(self, url: str, *, keep: int, read_only: bool):
    """Opens a folder such as 's3://bucket/run/checkpoints'.

    Args:
      url: of the folder; it need not exist.
      keep: how many of the newest checkpoints stay.
      read_only: nothing is changed.
    """
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
    self._writer = None if read_only or self._process else _make_writer(self._disk, self._alone)
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'upload')
    self._upload: concurrent.futures.Future | None = None
    self.reload()

  def all_steps(self) -> list[int]:
    """Steps that are complete, or being saved: the same in all processes, of which one knows how far it is."""
    return self._steps

  def reload(self) -> None:
    """Looks which steps there are. Raises Unavailable where the store does not say."""
    try:
      found = storage.with_retries(self._files)
    except Unavailable as error:
      raise Unavailable(f'cannot look into {self._root} {error}') from error
    self._steps = sorted(step for step, files in found.items() if _COMPLETE in files)

  def save(self, step: int, args: ocp.args.Composite) -> None:
    """Copies the state to the host, and in the background to the disk and to the bucket; all processes take part."""
    self.wait_until_finished()
    state = jax.tree.map(_gathered, args['state'].item)
    self._steps = [*self._steps, step][-self._keep :]
    if self._process == 0:
      taken = self._writer.save(step, args=ocp.args.Composite(state=ocp.args.PyTreeSave(state), config=args['config']))
      assert taken, step  # Orbax may decline
      self._upload = self._thread.submit(self._put, step)

  def is_saving_in_progress(self) -> bool:
    return self._upload is not None and not self._upload.done()

  def check_for_errors(self) -> None:
    """Raises what the last save did, if it is over."""
    if self._upload is not None and self._upload.done():
      self._upload.result()

  def wait_until_finished(self) -> None:
    """Waits for the last save, and raises what it did."""
    if self._upload is not None:
      self._upload.result()

  def restore(self, step: int, args: ocp.args.Composite) -> ocp.args.Composite:
    """Fetches and reads a step."""
    folder, names = self._disk / str(step), sorted(storage.with_retries(self._files)[step] - {_COMPLETE})
    try:
      for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
      storage.with_retries(
        self._system.get, [f'{self._root}/{step}/{name}' for name in names], [str(folder / name) for name in names]
      )
      options = ocp.CheckpointManagerOptions(read_only=True, create=False, multiprocessing_options=self._alone)
      with contextlib.closing(DiskManager(self._disk, options=options)) as reader:
        return reader.restore(step, args=args)
    finally:
      shutil.rmtree(folder, ignore_errors=True)

  def set_aside(self, step: int) -> None:
    """Renames a step to `damaged-STEP`."""
    kept = f'{self._root}/damaged-{step}'
    if self._system.exists(kept):  # what an interrupted start moved, or an earlier run of this step
      self._system.rm(kept, recursive=True)
    self._system.mv(f'{self._root}/{step}', kept, recursive=True)

  def close(self) -> None:
    """Ends the thread and clears the disk."""
    self._thread.shutdown()
    if self._writer is not None:
      self._writer.close()
    shutil.rmtree(self._disk, ignore_errors=True)

  def _files(self) -> dict[int, set[str]]:
    """Names of the files of each step."""
    self._system.invalidate_cache()
    found: dict[int, set[str]] = {}
    for path in self._system.find(self._root):
      step, _, name = path[len(self._root) :].strip('/').partition('/')
      if step.isdigit():
        found.setdefault(int(step), set()).add(name)
    return found

  def _put(self, step: int) -> None:
    """Copies a step from the disk, and removes those that are too many, or were never completed."""
    self._writer.wait_until_finished()
    self._writer.check_for_errors()
    storage.with_retries(self._remove, step)  # what an earlier start left, if anything
    folder = self._disk / str(step)
    paths = [path for path in folder.rglob('*') if path.is_file()]
    names = [path.relative_to(folder).as_posix() for path in paths]
    assert names, folder
    storage.with_retries(self._system.put, list(map(str, paths)), [f'{self._root}/{step}/{name}' for name in names])
    storage.with_retries(self._system.pipe_file, f'{self._root}/{step}/{_COMPLETE}', b'')
    for old in storage.with_retries(self._files).keys() - set(self._steps):
      storage.with_retries(self._remove, old)

  def _remove(self, step: int) -> None:
    """Removes a step, which first ceases to count."""
    files = self._files().get(step, set())  # none where an earlier attempt came so far
    for names in ({_COMPLETE} & files, files - {_COMPLETE}):
      if names:
        self._system.rm([f'{self._root}/{step}/{name}' for name in sorted(names)])


def _make_writer(disk: pathlib.Path, alone: ocp.options.MultiprocessingOptions) -> DiskManager:
  """For the process that writes alone what all of them have: Orbax would have each of them write a part."""
  arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
  kinds = ocp.type_handlers.create_type_handler_registry(
    (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
  )
  options = ocp.CheckpointManagerOptions(max_to_keep=1, create=False, multiprocessing_options=alone)
  return DiskManager(
    disk,
    options=options,
    item_handlers={
      'state': ocp.PyTreeCheckpointHandler(type_handler_registry=kinds, multiprocessing_options=alone),
      'config': ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    },
  )


def _gathered(leaf: jax.Array) -> jax.Array | np.ndarray | None:
  """A leaf that process 0 holds whole, and None in the others, which drop it; all must ask for the same."""
  if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return None if jax.process_index() else leaf
