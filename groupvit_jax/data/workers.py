"""Worker processes of the data pipeline: signals go to their parent, and they end with it."""

from collections.abc import Iterator
import gc
import multiprocessing
from multiprocessing import resource_tracker, shared_memory
import multiprocessing.connection
import os
import secrets
import signal
import sys
import threading
from typing import TypeVar

from absl import flags
import grain

from groupvit_jax.errors import ResourceError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_T = TypeVar('_T')


def run(dataset: grain.IterDataset[_T], num_workers: int, buffer: int) -> Iterator[_T]:
  """Yields what a dataset yields, made by worker processes, of which each keeps `buffer` elements ready.

  Worker w makes elements w, w + num_workers, ..., so their number does not change the order. Without workers this
  process iterates. Raises ResourceError when a worker died.
  """
  if num_workers:
    options = grain.MultiprocessingOptions(num_workers, max(buffer, 1))
    dataset = dataset.mp_prefetch(options, worker_init_fn=_init_worker)
    if not flags.FLAGS.is_parsed():  # Grain reads some; a notebook or a test parses none
      flags.FLAGS.mark_as_parsed()
    # It deletes the shared memory that a killed run leaves, and need not warn of it.
    sys.warnoptions.append('ignore:resource_tracker')
    resource_tracker.ensure_running()  # when it starts later it unblocks what is blocked below
  iterator = iter(dataset)
  try:
    # A signal that is blocked here is blocked in the processes that the first element starts, from their first
    # instruction on. Ctrl-C and a scheduler's SIGTERM go to all processes at once; the parent decides when to end.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS if num_workers else ())
    try:
      first = next(iterator, None)
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, previous)
    if first is not None:
      yield first
      yield from iterator
  except RuntimeError as error:
    if 'terminated unexpectedly' not in str(error):
      raise
    raise ResourceError(
      'a data worker died (killed, or out of memory?): '
      f'{str(error).split(". ")[0]}; try fewer data.num_workers or '
      'data.prefetch_batches; the run resumes from its last checkpoint'
    ) from error
  finally:
    iterator.close()
    first = None
    gc.collect()  # the last elements lie in cycles, and in shared memory that should not wait for the process's end


def _init_worker(index: int, count: int) -> None:
  """Runs first in each worker."""
  del index, count
  shared_memory.SharedMemory = _SharedMemory  # Grain makes it by this name, for each array of a batch
  threading.Thread(target=_end_with_parent, name='end-with-parent', daemon=True).start()


def _end_with_parent() -> None:
  """Waits for the parent's end, which may be a kill that it cannot see coming, and ends this process."""
  multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
  _SharedMemory.creating.acquire()
  os._exit(1)  # also past threads that wait for a remote store


class _SharedMemory(shared_memory.SharedMemory):
  """Shared memory that is named after the run's process, and that this process does not end in the midst of creating.

  It exists before the resource tracker, which removes what a killed run leaves, hears of it.
  """

  creating = threading.Lock()

  def __init__(self, name: str | None = None, create: bool = False, size: int = 0) -> None:
    if create and name is None:
      name = f'groupvit-{multiprocessing.parent_process().pid}-{secrets.token_hex(8)}'
    with self.creating:
      super().__init__(name, create, size)
