"""SIGTERM and Ctrl-C: finish what must be finished, save, and say that the run can go on."""

from collections.abc import Iterator
import contextlib
import os
import signal
import types

import jax
from jax.experimental import multihost_utils


class Preempted(BaseException):
  """The process was asked to stop.

  No Exception: it comes up wherever the signal finds the main thread, and code there that handles "whatever a library
  raises" must not take it for that.
  """


class Interrupts:
  """Turns signals into a flag, or, inside `immediately()`, into `Preempted`.

  Between two steps the loop looks at the flag. Phases that hold nothing unsaved (set-up, evaluation) run inside
  `immediately()`, so that they do not keep the machine waiting.

  Several processes must stop after the same step. There JAX receives SIGTERM and lets all of them know, and phases are
  not left early, because others would wait in them.
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
      handlers = {signal.SIGINT: lambda number, frame: os.kill(os.getpid(), signal.SIGTERM)}
    else:
      handlers = {signal.SIGTERM: self._handle, signal.SIGINT: self._handle}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
      yield self
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)

  def stop_after_step(self) -> bool:
    """Whether the run stops here; the same in all processes, each of which asks after every step that it takes.

    A signal stops them at one more than the largest number that one of them has asked with, or at 1 when none has asked
    yet. So the numbers are those of the questions: a run that goes on after step 500 would ask with 501 and never stop.
    """
    if self._several:
      self._asked += 1
      self.requested = multihost_utils.reached_preemption_sync_point(self._asked)
    return self.requested

  @contextlib.contextmanager
  def immediately(self) -> Iterator[None]:
    """A phase that a signal ends at once, by `Preempted`."""
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
