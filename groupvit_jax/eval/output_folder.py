"""The folder of results that eval.py writes; files of others are left alone."""

from collections.abc import Mapping, Sequence
import functools
import io
import json
import pathlib
import sys
import tempfile
from typing import Any

from etils import epath
import numpy as np
from PIL import Image

from groupvit_jax import storage, tensorboard
from groupvit_jax.errors import UserError
from groupvit_jax.running import folder_lock

REPORT = 'results.json'
# What only some evaluations write: it must not stand beside the results of another evaluation.
_OPTIONAL = (
  'table.*',
  'confusion.csv',
  'pictures.json',
  'thresholds.png',
  'scenes.png',
  'masks/*.png',
  'tensorboard/events.*',
  'scores/*.json',
  'scores/*/*/*.json',
)
_MADE_BY = 'groupvit_jax/eval.py'  # identifies a folder of ours
_writing = functools.partial(storage.writing, cure='make room, or name another --output')


class OutputFolder:
  """A folder of results, marked by a report that says whether they are complete."""

  def __init__(self, path: epath.PathLike, *, overwrite: bool):
    """Checks the folder; writes nothing.

    Args:
      path: a folder that does not exist, is empty, or holds an earlier evaluation's results, which
        will be replaced.
      overwrite: whether to accept any other folder as well.

    Raises:
      ValueError: it is none of these.
    """
    self.path = epath.Path(path)
    if self.path.exists() and not self.path.is_dir():
      raise UserError(f'--output={path} is a file; name a folder')
    holds_files = self.path.exists() and any(path.name != folder_lock.NAME for path in self.path.iterdir())
    self.replaces = holds_files
    if holds_files and not overwrite and not self._is_ours():
      raise UserError(
        f'--output={path} holds files that are not results of eval.py; name an empty folder, or add '
        '--overwrite to replace those with the same names'
      )

  def begin(self, keep: Sequence[str] = ()) -> None:
    """Creates the folder with a report marked incomplete; deletes what an earlier evaluation left, but for `keep`."""
    if self.replaces:
      print(f'{self.path}: earlier results are replaced', file=sys.stderr)
    self.make()
    if self.replaces and self._is_ours():
      for path in {path for pattern in _OPTIONAL for path in self.path.glob(pattern)} - {self.path / k for k in keep}:
        with _writing(path):
          path.unlink()
    self.write_report({}, complete=False)

  def make(self, name: str = '') -> None:
    """Creates a folder in it, or itself."""
    with _writing(path := self.path / name):
      path.mkdir(parents=True, exist_ok=True)

  def write_report(self, report: Mapping[str, Any], *, complete: bool = True) -> None:
    """Writes the report, last of all."""
    self.write_json(REPORT, {'made_by': _MADE_BY, 'complete': complete, **report})

  def read_json(self, name: str) -> Any:
    """The value in a file; None where there is no whole one."""
    try:
      return json.loads((self.path / name).read_text())
    except (OSError, ValueError):
      return None

  def write_json(self, name: str, value: Any) -> None:
    """Writes a value as JSON."""
    self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + '\n')

  def write_text(self, name: str, text: str) -> None:
    """Writes a text file."""
    self._write(name, text.encode())

  def write_image(self, name: str, image: np.ndarray | Image.Image) -> None:
    """Writes an image as PNG, with the palette of an indexed one."""
    self._write(name, encode_png(image))

  def write_board(
    self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str], images: Mapping[str, np.ndarray]
  ) -> None:
    """Writes a TensorBoard file by way of a local folder: its library knows no buckets."""
    with tempfile.TemporaryDirectory() as local:
      tensorboard.write_board(local, step, scalars, texts, images)
      self.make('tensorboard')
      for path in pathlib.Path(local).iterdir():
        self._write(f'tensorboard/{path.name}', path.read_bytes())

  def _write(self, name: str, data: bytes) -> None:
    with _writing(path := self.path / name):
      path.write_bytes(data)

  def _is_ours(self) -> bool:
    try:
      return self.read_json(REPORT)['made_by'] == _MADE_BY
    except (KeyError, TypeError):
      return False


def encode_png(image: np.ndarray | Image.Image) -> bytes:
  """An image as PNG, with the palette of an indexed one."""
  data = io.BytesIO()
  (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(data, 'PNG', optimize=True)
  return data.getvalue()
