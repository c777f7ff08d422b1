"""What a run tells people: metrics.jsonl, TensorBoard files, and a progress bar or plain lines."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import html
import json
import math
import pathlib
import sys
import tempfile
import time

from etils import epath
import jax
import numpy as np
import tqdm


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
  import tensorboardX


# How much of a log a run that is killed may lose in a bucket; its checkpoint is older.
_SECONDS_BETWEEN_UPLOADS = 60


class _AppendedFolder:
  """A folder whose files grow. A bucket's cannot: theirs grow on a local disk, and are written whole now and then."""

  def __init__(self, folder: epath.Path, growing: Sequence[str]):
    """Opens a folder; `growing` are the files in it that go on from what they hold."""
    self._remote = folder if '://' in str(folder) else None
    self.local = epath.Path(tempfile.mkdtemp(prefix='groupvit-log-')) if self._remote else folder
    self._uploaded, self._sizes = time.monotonic(), {}
    for name in growing if self._remote else ():
      if (folder / name).exists():
        (self.local / name).write_bytes((folder / name).read_bytes())

  def upload(self, seconds: float = 0) -> None:
    """Writes to the bucket what has grown, unless that was done less than some seconds ago."""
    if self._remote is None or time.monotonic() - self._uploaded < seconds:
      return
    self._uploaded = time.monotonic()
    for path in pathlib.Path(self.local).rglob('*'):
      if path.is_file() and self._sizes.get(path) != path.stat().st_size:
        data = path.read_bytes()
        (self._remote / path.relative_to(self.local)).write_bytes(data)  # others see it once it is whole
        self._sizes[path] = len(data)


class RunLog:
  """Writes a run's figures and pictures; silent on all hosts but the first."""

  def __init__(self, workdir: epath.PathLike, *, first_step: int, total_steps: int, batch_size: int):
    """Opens the logs of a run that starts, or goes on, after `first_step`.

    What an interrupted run logged beyond that step is dropped: it will be logged again.
    """
    self._silent = jax.process_index() != 0
    if self._silent:
      return
    self._folder = _AppendedFolder(epath.Path(workdir), ('metrics.jsonl',))
    self._path = self._folder.local / 'metrics.jsonl'
    _drop_after(self._path, first_step)
    self._board = tensorboardX.SummaryWriter(str(self._folder.local / 'tensorboard'), purge_step=first_step + 1 or None)
    self._batch_size, self._total = batch_size, total_steps
    self._last = (first_step, time.perf_counter())
    self._bar = tqdm.tqdm(total=total_steps, initial=first_step, unit='step', disable=not sys.stderr.isatty())

  def say(self, line: str) -> None:
    """Prints a line, above the bar where there is one."""
    if not self._silent:
      tqdm.tqdm.write(line, file=sys.stderr)

  def restart_clock(self, step: int) -> None:
    """Counts images/s from `step` on, so that compilation is left out."""
    if not self._silent:
      self._last = (step, time.perf_counter())

  def train(self, step: int, figures: Mapping[str, float]) -> None:
    """Logs a training step's figures, adds images/s, and moves the bar."""
    if self._silent:
      return
    now = time.perf_counter()
    rate = (step - self._last[0]) * self._batch_size / (now - self._last[1])
    self._last = (step, now)
    self.figures(step, {f'train/{name}': value for name, value in figures.items()} | {'train/images_per_s': rate})
    shown = {'loss': f'{figures["loss"]:.4f}', 'img/s': f'{rate:.0f}'}
    self._bar.update(step - self._bar.n)
    self._bar.set_postfix(shown)
    if self._bar.disable:
      left = (self._total - step) * self._batch_size / rate
      self.say(f'step {step}/{self._total}  loss {shown["loss"]}  {shown["img/s"]} images/s  {_clock(left)} left')

  def figures(self, step: int, figures: Mapping[str, float]) -> None:
    """Appends figures to metrics.jsonl and TensorBoard; what is not finite is written as null."""
    if self._silent:
      return
    values = {name: float(value) if math.isfinite(value) else None for name, value in figures.items()}
    with self._path.open('a') as file:
      file.write(json.dumps({'step': step, **values}) + '\n')
    for name, value in figures.items():
      self._board.add_scalar(name, value, step)
    self._folder.upload(_SECONDS_BETWEEN_UPLOADS)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Keeps what happens inside (evaluating, saving) out of images/s."""
    start = time.perf_counter()
    yield
    if not self._silent:
      self._last = (self._last[0], self._last[1] + time.perf_counter() - start)
      self._folder.upload()  # before what is being saved counts

  def picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds a picture, uint8 [H, W, 3], to TensorBoard."""
    if not self._silent:
      self._board.add_image(name, picture, step, dataformats='HWC')

  def text(self, step: int, name: str, text: str) -> None:
    """Adds a text, as it is, to TensorBoard."""
    if not self._silent:
      _add_text(self._board, name, text, step)

  def close(self) -> None:
    """Flushes everything."""
    if not self._silent:
      self._bar.close()
      self._board.close()
      self._folder.upload()


def write_board(folder: epath.PathLike, step: int, figures: Mapping[str, float], texts: Mapping[str, str],
                pictures: Mapping[str, np.ndarray]) -> None:
  """Writes a TensorBoard file at once: figures, texts as they are, and pictures, uint8 [H, W, 3]."""
  board = tensorboardX.SummaryWriter(str(folder))
  for name, value in figures.items():
    board.add_scalar(name, value, step)
  for name, text in texts.items():
    _add_text(board, name, text, step)
  for name, picture in pictures.items():
    board.add_image(name, picture, step, dataformats='HWC')
  board.close()


def _add_text(board: tensorboardX.SummaryWriter, name: str, text: str, step: int) -> None:
  board.add_text(name, f'<pre>{html.escape(text)}</pre>', step)


def _drop_after(path: epath.Path, step: int) -> None:
  """Drops the lines of steps after `step`, and a last line cut short by a kill."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except (json.JSONDecodeError, KeyError):
      continue
  path.write_text(''.join(kept))


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
