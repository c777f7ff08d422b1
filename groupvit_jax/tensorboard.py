"""TensorBoard files: scalars, texts and images by step."""

from collections.abc import Iterator, Mapping
import contextlib
import html
import pathlib
import sys
import time

from etils import epath
import numpy as np


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
  """Hides torch from an import that takes it along wherever it is installed, for seconds and hundreds of MB."""
  hidden = sys.modules.setdefault('torch', None) is None  # what is None cannot be imported
  try:
    yield
  finally:
    if hidden:
      del sys.modules['torch']


with _without_torch():
  from tensorboardX import summary
  from tensorboardX.event_file_writer import EventsWriter
  from tensorboardX.proto import event_pb2


class Board:
  """A TensorBoard file that grows.

  Events are written by who adds them. tensorboardX's own writer leaves that to a thread: on a full disk it ends, and
  whoever adds the tenth event after that waits for ever.
  """

  def __init__(self, folder: epath.PathLike, purge_step: int | None = None):
    """Opens a new file in a local folder, of whose earlier files TensorBoard forgets `purge_step` and what follows."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    self._events = EventsWriter(str(folder / 'events'))
    if purge_step is not None:
      start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._events.write_event(event_pb2.Event(wall_time=time.time(), step=purge_step, session_log=start))

  def scalar(self, step: int, name: str, value: float) -> None:
    """Adds a scalar."""
    self._add(step, summary.scalar(name, value))

  def text(self, step: int, name: str, text: str) -> None:
    """Adds a text, to be shown as it is."""
    self._add(step, summary.text(name, f'<pre>{html.escape(text)}</pre>'))

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Adds an image, uint8 [H, W, 3]."""
    self._add(step, summary.image(name, image, dataformats='HWC'))

  def flush(self) -> None:
    """Writes what has been added, so that neither a kill nor an error loses it."""
    self._events.flush()

  def close(self) -> None:
    """Ends the file."""
    self._events.close()

  def _add(self, step: int, values: object) -> None:
    self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, summary=values))


def write_board(
  folder: epath.PathLike,
  step: int,
  metrics: Mapping[str, float],
  texts: Mapping[str, str],
  images: Mapping[str, np.ndarray],
) -> None:
  """Writes a TensorBoard file at once: scalars, texts and images by name; see `Board`."""
  board = Board(folder)
  for add, values in ((board.scalar, metrics), (board.text, texts), (board.image, images)):
    for name, value in values.items():
      add(step, name, value)
  board.close()
