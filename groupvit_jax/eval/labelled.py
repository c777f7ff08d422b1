"""Labelled images: benchmarks and ImageNet as prepared TFDS data sets, tars or folders, and held-out scenes.

All are read in any order from any number of threads. Images on disk stay encoded: `prefetch` decodes them on threads.
"""

from collections.abc import Sequence
import dataclasses
import functools
import io
import json
from typing import Any, Protocol

from etils import epath
import ml_collections
import numpy as np
from PIL import Image

from groupvit_jax.data import tfds
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.sources import build_scenes
from groupvit_jax.data.tars import open_webdataset, WebDataset
from groupvit_jax.errors import UserError
from groupvit_jax.eval.benchmarks import Benchmark, find_benchmark, IGNORE_LABEL, make_benchmark
from groupvit_jax.eval.draw import spread_palette
from groupvit_jax.eval.protocols import NATIVE

# Benchmark -> the data set that holds its images and labels; see groupvit_jax/prepare.
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
IMAGENET = 'imagenet'
SPLIT = 'validation'
VALIDATION, TEST = 'validation', 'test'  # of held-out scenes; no choice may depend on the score of TEST
_IMAGENET_STORED_IN = 'imagenet2012'
_BACKGROUND = 'background'
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')


class LabelledSource(Protocol):
  """Random access to labelled images."""

  classes: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': uint8 [H, W, 3] or bytes, 'label': uint8 [H, W], 'key': name}."""
    ...


class ClassifiedSource(Protocol):
  """Random access to images with a class."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': uint8 [H, W, 3] or bytes, 'label': int, 'key': name}."""
    ...


def decode_label(data: bytes, key: str) -> np.ndarray:
  """The indices in a label map's file, uint8 [H, W].

  Raises:
    ValueError: it is no image of 8-bit indices.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      mode, labels = image.mode, np.asarray(image)
  except Exception as error:  # which one depends on where the damage is
    raise UserError(f'{key} cannot be read; it must be a PNG of indices') from error
  if labels.dtype == bool or mode not in ('L', 'P', 'I;16', 'I'):
    raise UserError(f'{key} is an image of mode {mode}; it must be a PNG of indices (mode L or P), not of colours')
  if labels.size and labels.max() > IGNORE_LABEL:
    raise UserError(f'{key} holds the index {labels.max()}; at most {IGNORE_LABEL} (ignore) is possible')
  return labels.astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class PreparedSet:
  """Images of a prepared TFDS data set, labelled as a benchmark asks."""

  path: str  # folder of the data set's version
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
    return tfds.open_records(self.path, SPLIT, ('image', 'label'))


@dataclasses.dataclass(frozen=True)
class LabelledFolder:
  """Images of a folder, with label maps of the same names."""

  path: str  # folder with `images`, `labels` and the list of classes
  names: tuple[str, ...]  # of the images, with their suffixes
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
class PreparedImagenet:
  """Images of ImageNet, prepared as a TFDS data set."""

  path: str

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': bytes, 'label': int, 'key': name}."""
    record = self._records[index]
    return {'image': record['image'], 'label': int(record['label']), 'key': f'{SPLIT}[{index}]'}

  @functools.cached_property
  def _records(self) -> Sequence[dict[str, object]]:
    return tfds.open_records(self.path, SPLIT, ('image',))


@dataclasses.dataclass(frozen=True)
class ImagenetTars:
  """Images of webdataset tars, the class of each in its `.cls` file."""

  tars: WebDataset

  def __len__(self) -> int:
    return len(self.tars)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': bytes, 'label': int, 'key': name}."""
    try:
      record = self.tars[index]
      return {'image': record['image'], 'label': int(record['text']), 'key': record['key']}
    except BadRecord as bad:
      raise UserError(f'{bad.key}: {bad.cause}; a benchmark leaves no image out, so fetch it again') from bad
    except ValueError as error:
      text = record['text'][:40]
      raise UserError(f'{record["key"]}.cls holds {text!r}; it must hold the class, 0 to 999') from error


@dataclasses.dataclass(frozen=True)
class Subset:
  """Some of the images of a source, in the order given."""

  source: Any
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


def take(source: Any, num_images: int) -> Any:
  """So many images of a source, spread evenly, the same ones every time; 0 for all.

  Raises:
    ValueError: the source is empty, or the number below 0.
  """
  if num_images < 0 or not len(source):
    raise UserError(f'of {len(source)} images {num_images} cannot be taken; use 0 for all')
  if not 0 < num_images < len(source):
    return source
  return Subset(source, tuple(np.linspace(0, len(source) - 1, num_images).round().astype(int).tolist()))


def open_benchmark(name: str, data_dir: epath.PathLike, num_images: int = 0) -> tuple[Benchmark, LabelledSource]:
  """A benchmark and its labelled images.

  Args:
    name: one of `STORED_IN`, or 'folder'.
    data_dir: where TFDS data sets are kept; of 'folder' the folder itself (see `open_folder`).
    num_images: so many, spread evenly, the same ones every time; 0 for all.

  Raises:
    ValueError: there is no such benchmark, or no whole data set of it in `data_dir`.
  """
  if name != FOLDER and name not in STORED_IN:
    raise UserError(f'there is no benchmark {name!r}; choose one of {", ".join([*STORED_IN, FOLDER])}')
  source = open_folder(data_dir) if name == FOLDER else open_prepared(find_benchmark(name), data_dir)
  return source.benchmark, take(source, num_images)


def default_protocol(benchmark: Benchmark) -> str:
  """The protocol of the first published result; the native one where there is none."""
  return benchmark.published[0].protocol if benchmark.published else NATIVE


def open_prepared(benchmark: Benchmark, data_dir: epath.PathLike) -> PreparedSet:
  """The images of a public benchmark, from the newest version of its data set in `data_dir`.

  Raises:
    ValueError: it has not been built there, or is damaged.
  """
  name = STORED_IN[benchmark.name]
  newest = tfds.newest_version(data_dir, name)
  if newest is None:
    raise UserError(
      f'--data_dir={data_dir} holds no {name}, which {benchmark.name} needs; make it with '
      f'python -m groupvit_jax.prepare {name} --manual_dir=... --data_dir={data_dir}'
    )
  source = PreparedSet(str(newest), benchmark)
  len(source)  # damage shows here, not in a thread
  return source


def open_imagenet(data_dir: str) -> ClassifiedSource:
  """ImageNet's validation images, with classes numbered in the order of their WordNet ids.

  Args:
    data_dir: where TFDS data sets are kept, one of which is `imagenet2012` in ArrayRecord files; or a pattern of tars.

  Raises:
    ValueError: there is neither, or it is not whole.
  """
  if data_dir.endswith('.tar'):
    return ImagenetTars(open_webdataset((data_dir,), 'cls', '', f'--data_dir={data_dir}'))
  newest = tfds.newest_version(data_dir, _IMAGENET_STORED_IN)
  if newest is None:
    raise UserError(
      f'--data_dir={data_dir} holds no {epath.Path(data_dir) / _IMAGENET_STORED_IN} with a version in it; prepare it '
      "with TFDS (file_format='array_record'), or name tars with .cls files: "
      '--data_dir=FOLDER/{000000..000063}.tar'
    )
  source = PreparedImagenet(str(newest))
  len(source)  # damage shows here, not in a thread
  return source


def open_scenes(config: ml_collections.ConfigDict, split: str) -> tuple[Benchmark, LabelledSource]:
  """The held-out scenes of a run's config, `VALIDATION` or `TEST`, as a benchmark without a background.

  Raises:
    ValueError: the config's scenes have a mistake.
  """
  source = build_scenes(config.data.scenes, tuple(config.model.vision.image_size), split).labelled()
  benchmark = make_benchmark('scenes', source.classes)
  return dataclasses.replace(benchmark, palette=spread_palette(benchmark.num_classes)), source


def open_folder(path: epath.PathLike) -> LabelledFolder:
  """Anyone's labelled images.

  Args:
    path: folder with `images/NAME.jpg` (or .png and others), `labels/NAME.png` (indices, 255 to ignore) and the
      classes in label order, as `classes.txt` (one a line) or `classes.json` (a list). A first class called
      'background' is whatever the others are not.

  Raises:
    ValueError: one of these is missing or has a mistake.
  """
  folder = epath.Path(path)
  images, labels = folder / 'images', folder / 'labels'
  for part, what in ((images, 'the images'), (labels, 'a PNG of indices for each image')):
    if not part.is_dir():
      raise UserError(f'there is no folder {part}; put {what} there')
  classes = _read_classes(folder)
  benchmark = make_benchmark(folder.resolve().name, classes, background=classes[0] == _BACKGROUND)
  names = sorted(p.name for p in images.iterdir() if p.suffix.lower() in _SUFFIXES)
  if not names:
    raise UserError(f'{images} holds no images ({", ".join(_SUFFIXES)}); put them there')
  present = {p.name for p in labels.iterdir()}
  missing = [name for name in names if f'{epath.Path(name).stem}.png' not in present]
  if missing:
    raise UserError(
      f'there is no {labels / epath.Path(missing[0]).stem}.png, the label map of images/{missing[0]} '
      f'({len(missing)} of {len(names)} are missing); add it, or remove the image'
    )
  owners: dict[str, str] = {}
  for name in names:
    other = owners.setdefault(epath.Path(name).stem, name)
    if other != name:
      raise UserError(f'{images} holds {other} and {name}, which share a label map; rename one')
  return LabelledFolder(str(folder), tuple(names), benchmark)


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
