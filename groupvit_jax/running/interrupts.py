"""Handling of SIGTERM and Ctrl-C.

A run stops after the same step in all processes, or at once where nothing is unsaved.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading
import types

import jax
from jax.experimental import multihost_utils

from groupvit_jax import cli


class Preempted(BaseException):
  """The process was asked to stop.

  Not an Exception: it is raised wherever the main thread is, and must not be caught there by `except Exception`.
  """


class Interrupts:
  """Turns signals into a flag, or, inside `immediately()`, into `Preempted`.

  The loop reads the flag between two steps. Phases without unsaved results (set-up, evaluation) run inside
  `immediately()`.

  Several processes must stop after the same step. There JAX receives SIGTERM and notifies all of them, and
  `immediately()` ends no phase early, because the others would wait in it. A second Ctrl-C ends the process.
  """

  def __init__(self):
    self.requested = False
    self._raise = False
    self._several = jax.process_count() > 1
    self._asked = 0

  @contextlib.contextmanager
  def installed(self) -> Iterator['Interrupts']:
    """Handles SIGTERM and SIGINT while the context lasts."""
    if self._several:
      handlers = {signal.SIGINT: lambda number, frame: None}  # see `_announce`
    else:
      handlers = {signal.SIGTERM: self._handle, signal.SIGINT: self._handle}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    previous_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=self._announce, args=(reader,), name='signals', daemon=True)
    thread.start()
    try:
      yield self
    finally:
      signal.set_wakeup_fd(previous_writer)
      for number, handler in previous.items():
        signal.signal(number, handler)
      os.close(writer)
      thread.join()
      os.close(reader)

  def _announce(self, reader: int) -> None:
    """Prints at once what a signal will lead to; handlers wait until a compilation in the main thread is over."""
    received = []
    while numbers := os.read(reader, 1):
      if numbers[0] not in (signal.SIGINT, signal.SIGTERM):
        continue
      received.append(numbers[0])
      if received.count(signal.SIGINT) > 1:
        print('ended by the second Ctrl-C; the same command resumes from the last checkpoint', file=sys.stderr)
        sys.stderr.flush()
        os._exit(cli.EXIT_INTERRUPTED)
      if len(received) == 1:
        print(
          f'{signal.Signals(numbers[0]).name}: saves and ends after what runs now (a step, a compilation, a save); '
          'Ctrl-C again ends at once and loses the steps since the last checkpoint',
          file=sys.stderr,
          flush=True,
        )
      if self._several and numbers[0] == signal.SIGINT:
        os.kill(os.getpid(), signal.SIGTERM)  # which JAX handles

  def stop_after_step(self) -> bool:
    """Whether the run stops here: the same in all processes, each of which must ask after every step.

    JAX stops them at one more than the largest number that one of them has asked with, or at 1 when none has asked. So
    the numbers count questions: a run resumed at step 500 would ask with 501 and never stop.
    """
    if self._several:
      self._asked += 1
      self.requested = multihost_utils.reached_preemption_sync_point(self._asked)
    return self.requested

  @contextlib.contextmanager
  def immediately(self) -> Iterator[None]:
    """A phase that a signal ends at once, with `Preempted`."""
    if self.requested:
      raise Preempted
    self._raise = True
    try:
      yield
    finally:
      self._raise = False

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    del number, frame
    self.requested = True
    if self._raise:
      raise Preempted
