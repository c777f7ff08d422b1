"""Labelled pictures on disk: prepared TFDS data sets of the benchmarks, and one's own folders.

Both are read in any order from any number of threads, and hand on files as they are: what decodes them runs ahead of
the devices.
"""

from collections.abc import Sequence
import dataclasses
import functools
import io
import json
from typing import Any

from etils import epath
import numpy as np
from PIL import Image

from groupvit_jax.data import prepared
from groupvit_jax.errors import UserError
from groupvit_jax.eval.benchmarks import Benchmark, find_benchmark, IGNORE_LABEL, make_benchmark
from groupvit_jax.eval.protocols import NATIVE
from groupvit_jax.eval.semantic_seg import LabelledSource

# Benchmark -> the data set that its pictures and labels are kept in; see groupvit_jax/prepare.
STORED_IN = {
  'voc21': 'voc2012',
  'voc20': 'voc2012',
  'context60': 'pascal_context',
  'context59': 'pascal_context',
  'coco_object': 'coco_stuff',
  'coco_stuff': 'coco_stuff',
  'ade20k': 'ade20k',
  'cityscapes': 'cityscapes_fine',
}
FOLDER = 'folder'
SPLIT = 'validation'
_BACKGROUND = 'background'
_PICTURES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')


def decode_label(data: bytes, key: str) -> np.ndarray:
  """The indices in a label map's file, uint8 [H, W].

  Raises:
    ValueError: it is no picture of 8-bit indices.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      mode, labels = image.mode, np.asarray(image)
  except Exception as error:  # which one depends on where the damage is
    raise UserError(f'{key} cannot be read; it must be a PNG of indices') from error
  if labels.dtype == bool or mode not in ('L', 'P', 'I;16', 'I'):
    raise UserError(f'{key} is a picture of mode {mode}; it must be a PNG of indices (mode L or P), not of colours')
  if labels.size and labels.max() > IGNORE_LABEL:
    raise UserError(f'{key} holds the index {labels.max()}; at most {IGNORE_LABEL} (ignore) is possible')
  return labels.astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class PreparedSet:
  """Pictures of a prepared TFDS data set, labelled as a benchmark asks.

  Attributes:
    path: folder of the data set's version.
    benchmark: whose labels.
  """

  path: str
  benchmark: Benchmark

  @property
  def classes(self) -> tuple[str, ...]:
    """C names in label order."""
    return self.benchmark.classes

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': bytes, 'label': uint8 [H, W], 'key': name}."""
    record = self._records[index]
    key = record['key'].decode()
    label = decode_label(record['label'], f'the label map of {key!r} in {self.path}')
    return {'image': record['image'], 'label': self.benchmark.train_labels(label), 'key': key}

  @functools.cached_property
  def _records(self) -> Sequence[dict[str, bytes]]:
    return prepared.open_records(self.path, SPLIT, ('image', 'label'))


@dataclasses.dataclass(frozen=True)
class LabelledFolder:
  """Anyone's pictures with label maps of the same names.

  Attributes:
    path: folder with `images`, `labels` and the list of classes.
    names: of the pictures, with their endings.
    benchmark: the classes.
  """

  path: str
  names: tuple[str, ...]
  benchmark: Benchmark

  @property
  def classes(self) -> tuple[str, ...]:
    """C names in label order."""
    return self.benchmark.classes

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': bytes, 'label': uint8 [H, W], 'key': name}."""
    image = epath.Path(self.path) / 'images' / self.names[index]
    label = epath.Path(self.path) / 'labels' / f'{image.stem}.png'
    labels = decode_label(label.read_bytes(), str(label))
    return {'image': image.read_bytes(), 'label': labels, 'key': image.stem}


@dataclasses.dataclass(frozen=True)
class Subset:
  """Some of the pictures of a source, in the order given."""

  source: LabelledSource
  indices: tuple[int, ...]

  @property
  def classes(self) -> tuple[str, ...]:
    """C names in label order."""
    return self.source.classes

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the record of the source."""
    return self.source[self.indices[index]]


def open_benchmark(name: str, data_dir: epath.PathLike, num_pictures: int = 0) -> tuple[Benchmark, LabelledSource]:
  """A benchmark and its labelled pictures.

  Args:
    name: one of `STORED_IN`, or 'folder'.
    data_dir: where TFDS data sets are kept; of 'folder' the folder itself (see `open_folder`).
    num_pictures: so many, spread evenly, the same ones every time; 0 for all.

  Returns:
    Benchmark and source.

  Raises:
    ValueError: there is no such benchmark, or no whole data set of it in `data_dir`.
  """
  if name != FOLDER and name not in STORED_IN:
    raise UserError(f'there is no benchmark {name!r}; choose one of {", ".join([*STORED_IN, FOLDER])}')
  source = open_folder(data_dir) if name == FOLDER else open_prepared(find_benchmark(name), data_dir)
  return source.benchmark, take(source, num_pictures)


def default_protocol(benchmark: Benchmark) -> str:
  """The protocol of the first published figure; the native one where there is none."""
  return benchmark.published[0].protocol if benchmark.published else NATIVE


def take(source: LabelledSource, num_pictures: int) -> LabelledSource:
  """So many pictures of a source, spread evenly, the same ones every time; 0 for all.

  Raises:
    ValueError: the source is empty, or the number below 0.
  """
  if num_pictures < 0 or not len(source):
    raise UserError(f'of {len(source)} pictures {num_pictures} cannot be taken; use 0 for all')
  if not 0 < num_pictures < len(source):
    return source
  return Subset(source, tuple(np.linspace(0, len(source) - 1, num_pictures).round().astype(int).tolist()))


def open_prepared(benchmark: Benchmark, data_dir: epath.PathLike) -> PreparedSet:
  """The pictures of a public benchmark, from the newest version of its data set in `data_dir`.

  Raises:
    ValueError: it has not been built there, or is damaged.
  """
  name = STORED_IN[benchmark.name]
  newest = prepared.newest_version(data_dir, name)
  if newest is None:
    raise UserError(
      f'--data_dir={data_dir} holds no {name}, which {benchmark.name} needs; make it with '
      f'python -m groupvit_jax.prepare {name} --manual_dir=... --data_dir={data_dir}'
    )
  source = PreparedSet(str(newest), benchmark)
  len(source)  # what is damaged shows here, not in a thread
  return source


def open_folder(path: epath.PathLike) -> LabelledFolder:
  """Anyone's labelled pictures.

  Args:
    path: folder with `images/NAME.jpg` (or .png and others), `labels/NAME.png` (indices, 255 to ignore) and the
      classes in label order, as `classes.txt` (one a line) or `classes.json` (a list). A first class called
      'background' is whatever the others are not.

  Raises:
    ValueError: one of these is missing or has a mistake.
  """
  folder = epath.Path(path)
  images, labels = folder / 'images', folder / 'labels'
  for part, what in ((images, 'the pictures'), (labels, 'a PNG of indices for each picture')):
    if not part.is_dir():
      raise UserError(f'there is no folder {part}; put {what} there')
  names = _read_classes(folder)
  benchmark = make_benchmark(folder.resolve().name, names, background=names[0] == _BACKGROUND)
  pictures = sorted(p.name for p in images.iterdir() if p.suffix.lower() in _PICTURES)
  if not pictures:
    raise UserError(f'{images} holds no pictures ({", ".join(_PICTURES)}); put them there')
  present = {p.name for p in labels.iterdir()}
  missing = [name for name in pictures if f'{epath.Path(name).stem}.png' not in present]
  if missing:
    raise UserError(
      f'there is no {labels / epath.Path(missing[0]).stem}.png, the label map of images/{missing[0]} '
      f'({len(missing)} of {len(pictures)} are missing); add it, or remove the picture'
    )
  owners: dict[str, str] = {}
  for name in pictures:
    other = owners.setdefault(epath.Path(name).stem, name)
    if other != name:
      raise UserError(f'{images} holds {other} and {name}, which share a label map; rename one')
  return LabelledFolder(str(folder), tuple(pictures), benchmark)


def _read_classes(folder: epath.Path) -> tuple[str, ...]:
  """The names in classes.json or classes.txt."""
  listed, lines = folder / 'classes.json', folder / 'classes.txt'
  if listed.exists():
    try:
      names = json.loads(listed.read_text())
    except ValueError as error:
      raise UserError(f'{listed} is not JSON ({error}); make it a list of names') from error
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
      raise UserError(f'{listed} is not a list of names; write ["background", "dog", ...]')
    return tuple(names)
  if not lines.exists():
    raise UserError(f'there is no {lines} nor {listed}; list the classes in label order, one a line')
  names = tuple(line.strip() for line in lines.read_text().splitlines() if line.strip())
  if not names:
    raise UserError(f'{lines} is empty; list the classes in label order, one a line')
  return names
