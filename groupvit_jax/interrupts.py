"""SIGTERM and Ctrl-C: finish what must be finished, save, and say that the run can go on."""

from collections.abc import Iterator
import contextlib
import signal
import types


class Preempted(Exception):
  """The process was asked to stop."""


class Interrupts:
  """Turns signals into a flag, or, inside `immediately()`, into `Preempted`.

  Between two steps the loop looks at the flag. Phases that hold nothing unsaved (set-up, evaluation) run inside
  `immediately()`, so that they do not keep the machine waiting.
  """

  def __init__(self):
    self.requested = False
    self._raise = False

  @contextlib.contextmanager
  def installed(self) -> Iterator['Interrupts']:
    """Handles SIGTERM and SIGINT while the context lasts."""
    previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      yield self
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)

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
