"""Logs training metrics to metrics.jsonl, TensorBoard and the terminal, and panels as images."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import io
import json
import math
import pathlib
import sys
import time

from absl import logging
from etils import epath
import jax
import numpy as np
from PIL import Image
import tqdm

from groupvit_jax import storage
from groupvit_jax.tensorboard import Board

_SECONDS_BETWEEN_UPLOADS = 60
_SECONDS_BETWEEN_FLUSHES = 10  # of TensorBoard's file


class _AppendedFolder:
  """A folder whose files grow. A bucket's cannot: theirs grow on a local disk and are uploaded whole."""

  def __init__(self, folder: epath.Path, growing: Sequence[str]):
    """Opens a folder; `growing` are the files in it that go on from what they hold."""
    self._remote = folder if '://' in str(folder) else None
    self.local = (
      epath.Path(storage.temporary_folder('log', str(folder), jax.process_index())) if self._remote else folder
    )
    self._uploaded, self._sizes = time.monotonic(), {}
    for name in growing if self._remote else ():
      if (folder / name).exists():
        (self.local / name).write_bytes((folder / name).read_bytes())

  def upload(self, seconds: float = 0) -> None:
    """Uploads the files that have grown, unless the last upload was less than so many seconds ago."""
    if self._remote is None or time.monotonic() - self._uploaded < seconds:
      return
    self._uploaded = time.monotonic()
    for path in pathlib.Path(self.local).rglob('*'):
      if path.is_file() and self._sizes.get(path) != path.stat().st_size:
        data = path.read_bytes()
        storage.write_atomic(str(self._remote / path.relative_to(self.local)), data)
        self._sizes[path] = len(data)


class RunLog:
  """Logs of a run, written by process 0 alone.

  Attributes:
    resumed_metrics: names of the metrics that an earlier start logged at the step that the run resumes from.
  """

  def __init__(self, workdir: epath.PathLike, *, first_step: int, total_steps: int, batch_size: int):
    """Opens the logs of a run that starts or resumes after `first_step`.

    Lines of later steps are dropped: those steps will be logged again. This and all other methods raise OSError where
    nothing can be written.
    """
    self._silent, self.resumed_metrics = jax.process_index() != 0, frozenset()
    if self._silent:
      return
    self._folder = _AppendedFolder(epath.Path(workdir), ('metrics.jsonl',))
    self._path = self._folder.local / 'metrics.jsonl'
    self.resumed_metrics = _drop_after(self._path, first_step)
    with storage.writing(self._path.parent):
      self._board = Board(self._folder.local / 'tensorboard', purge_step=first_step + 1)
    self._flushed = time.monotonic()
    self._batch_size, self._total = batch_size, total_steps
    self._last = (first_step, time.perf_counter())
    self._bar = tqdm.tqdm(total=total_steps, initial=first_step, unit='step', disable=not sys.stderr.isatty())

  def message(self, line: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    if not self._silent:
      tqdm.tqdm.write(line, file=sys.stderr)

  def restart_clock(self, step: int) -> None:
    """Counts images/s from `step` on, so that compilation is left out."""
    if not self._silent:
      self._last = (step, time.perf_counter())

  def train(self, step: int, metrics: Mapping[str, float]) -> None:
    """Logs a training step's metrics and images/s, and moves the bar."""
    if self._silent:
      return
    now = time.perf_counter()
    rate = (step - self._last[0]) * self._batch_size / (now - self._last[1])
    self._last = (step, now)
    self.metrics(step, {f'train/{name}': value for name, value in metrics.items()} | {'train/images_per_s': rate})
    shown = {'loss': f'{metrics["loss"]:.4f}', 'img/s': f'{rate:.0f}'}
    self._bar.update(step - self._bar.n)
    self._bar.set_postfix(shown)
    if self._bar.disable:
      left = (self._total - step) * self._batch_size / rate
      self.message(f'step {step}/{self._total}  loss {shown["loss"]}  {shown["img/s"]} images/s  {_clock(left)} left')

  def metrics(self, step: int, metrics: Mapping[str, float], settings: Mapping[str, object] | None = None) -> None:
    """Appends metrics of a step to metrics.jsonl and TensorBoard; what is not finite is written as null.

    `settings` are what they depend on, by name: JSON, for metrics.jsonl alone.
    """
    if self._silent:
      return
    values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
    with storage.writing(self._path.parent):
      with self._path.open('a') as file:
        file.write(json.dumps({'step': step, **values, **(settings or {})}) + '\n')
      for name, value in metrics.items():
        self._board.scalar(step, name, value)
      if time.monotonic() - self._flushed >= _SECONDS_BETWEEN_FLUSHES:
        self._board.flush()
        self._flushed = time.monotonic()
    try:
      self._folder.upload(_SECONDS_BETWEEN_UPLOADS)
    except OSError as error:  # no reason to end a run, as long as no checkpoint goes ahead of its log
      logging.warning('%s; tried again later', error)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Keeps what happens inside (evaluating, saving) out of images/s."""
    start = time.perf_counter()
    yield
    if not self._silent:
      self._last = (self._last[0], self._last[1] + time.perf_counter() - start)
      self._folder.upload()  # before what is being saved counts

  def image(self, step: int, name: str, image: np.ndarray) -> None:
    """Adds an image, uint8 [H, W, 3], to TensorBoard and to the workdir, as `panel_path` says."""
    if not self._silent:
      with storage.writing(self._path.parent):
        self._board.image(step, name, image)
      encoded = io.BytesIO()
      Image.fromarray(image).save(encoded, 'PNG')
      storage.write_atomic(str(panel_path(self._folder.local, name, step)), encoded.getvalue())

  def text(self, step: int, name: str, text: str) -> None:
    """Adds a text, as it is, to TensorBoard."""
    if not self._silent:
      with storage.writing(self._path.parent):
        self._board.text(step, name, text)

  def close(self) -> None:
    """Flushes everything."""
    if not self._silent:
      self._bar.close()
      with storage.writing(self._path.parent):
        self._board.close()
      self._folder.upload()


def panel_path(workdir: epath.PathLike, name: str, step: int) -> epath.Path:
  """The file of a panel: panels/NAME/STEP.png, in the order of steps when sorted."""
  return epath.Path(workdir) / 'panels' / name / f'{step:08}.png'


def _drop_after(path: epath.Path, step: int) -> frozenset[str]:
  """Drops lines after `step`, and a last one cut short by a kill; returns the names of the metrics of `step`."""
  if not path.exists():
    return frozenset()
  before, kept, names = path.read_text(), [], set()
  for line in before.splitlines():
    try:
      values = json.loads(line)
      if values['step'] > step:
        continue
    except (json.JSONDecodeError, KeyError):
      continue
    kept.append(line + '\n')
    names.update(values if values['step'] == step else ())
  if ''.join(kept) != before:
    storage.write_atomic(str(path), ''.join(kept).encode())
  return frozenset(names)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
