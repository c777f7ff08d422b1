"""Reads images on threads ahead of the devices; a bad image ends an evaluation on every process."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
import os
from typing import TypeVar

import jax

from groupvit_jax.errors import UserError
from groupvit_jax.running import processes

_MAX_THREADS = 16  # decode more images a second than an accelerator labels; each thread holds two images

T = TypeVar('T')
R = TypeVar('R')


class BadImage(UserError):
  """An image cannot be read, or does not fit its label map. A benchmark leaves no image out."""


class BadImages:
  """The bad images that this process has met."""

  def __init__(self):
    self._messages: list[str] = []

  def guard(self, read: Callable[[int], R]) -> Callable[[int], R | None]:
    """Wraps a function of an image's index: it returns None for a bad image, and notes it for `check`.

    A process that raised would leave the others waiting in a collective. A single process raises BadImage at once.
    """

    def guarded(index: int) -> R | None:
      try:
        return read(index)
      except (ValueError, OSError, RuntimeError) as error:  # the last is what ArrayRecord raises
        message = ' '.join(str(error).split())
        if jax.process_count() == 1:
          raise BadImage(message) from error
        self._messages.append(message)
        return None

    return guarded

  def check(self) -> None:
    """Raises BadImage on every process if any has met a bad image; a collective."""
    messages = [message for process in processes.all_gather_objects(self._messages) for message in process]
    if messages:
      others = f' ({len(messages)} images in all)' if len(messages) > 1 else ''
      raise BadImage(f'{messages[0]}{others}')


def decode_threads() -> int:
  """Threads that decode and resize ahead of the devices: one for each core, at most 16."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  return min(cores, _MAX_THREADS)


def prefetch(function: Callable[[T], R], items: Iterable[T], *, num_threads: int) -> Iterator[R]:
  """Yields `map(function, items)` in order, computed ahead on threads; with 0 threads in the caller.

  At most two results per thread wait, which bounds the memory.
  """
  if not num_threads:
    yield from map(function, items)
    return
  waiting: collections.deque[Future[R]] = collections.deque()
  with ThreadPoolExecutor(num_threads) as pool:
    try:
      for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > 2 * num_threads:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)
