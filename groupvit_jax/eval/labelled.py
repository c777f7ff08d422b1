"""Labelled images: benchmarks and ImageNet as prepared TFDS data sets, tars or folders, and held-out scenes.

All are read in any order from any number of threads. Images on disk stay encoded: `prefetch` decodes them on threads,
ahead of the devices. A bad image ends an evaluation on every process.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
import dataclasses
import functools
import io
import json
import os
from typing import Any, Protocol, TypeVar

from etils import epath
import jax
import ml_collections
import numpy as np
from PIL import Image

from groupvit_jax.data import tfds
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.sources import build_scenes
from groupvit_jax.data.tars import open_webdataset, WebDataset
from groupvit_jax.errors import UserError
from groupvit_jax.eval.benchmarks import Benchmark, find_benchmark, make_benchmark
from groupvit_jax.eval.protocols import NATIVE, SHIFTED, TCL
from groupvit_jax.model.metrics import ignore_label, label_dtype
from groupvit_jax.running import processes

# Benchmark -> the data set that holds its images and labels; see groupvit_jax/prepare.
STORED_IN = {
  'voc21': 'voc2012',
  'voc20': 'voc2012',
  'context60': 'pascal_context',
  'context59': 'pascal_context',
  'context459': 'pascal_context_459',
  'coco_object': 'coco_stuff',
  'coco_stuff': 'coco_stuff',
  'ade20k': 'ade20k',
  'ade20k_847': 'ade20k_full',
  'cityscapes': 'cityscapes_fine',
}
FOLDER = 'folder'
SCENES = 'scenes'  # those that a run itself holds out
IMAGENET = 'imagenet'
SPLIT = 'validation'
VALIDATION, TEST = 'validation', 'test'  # of held-out scenes; no choice may depend on the score of TEST
IMAGENET_STORED_IN = 'imagenet2012'
_BACKGROUND = 'background'
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff')
_MAX_THREADS = 16  # decode more images a second than an accelerator labels; each thread holds two images

T = TypeVar('T')
R = TypeVar('R')


class LabelledSource(Protocol):
  """Random access to labelled images."""

  classes: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': uint8 [H, W, 3] or bytes, 'label': uint8 or uint16 [H, W] or a class, 'key': name}."""
    ...


@dataclasses.dataclass(frozen=True)
class Source:
  """A `LabelledSource` that reads its records with a function of their index."""

  classes: tuple[str, ...]  # C names in label order; none of ImageNet, whose labels are classes
  length: int
  read: Callable[[int], dict[str, Any]]

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the record."""
    return self.read(index)


def decode_label(data: bytes, key: str) -> np.ndarray:
  """The indices in a label map's file, uint8 or uint16 [H, W].

  Raises:
    ValueError: it is no image of 8-bit or 16-bit indices.
  """
  try:
    with Image.open(io.BytesIO(data)) as image:
      mode, labels = image.mode, np.asarray(image)
  except Exception as error:  # which one depends on where the damage is
    raise UserError(f'{key} cannot be read; it must be a PNG of indices') from error
  if mode not in ('L', 'P', 'I;16'):
    raise UserError(f'{key} is an image of mode {mode}; it must be a PNG of indices of 8 or 16 bits (L, P or I;16)')
  return labels


def subset(source: LabelledSource, indices: Sequence[int]) -> Source:
  """Some of the images of a source, in the order given."""
  return Source(source.classes, len(indices), lambda index: source[indices[index]])


def spread_indices(length: int, count: int) -> list[int]:
  """So many of the indices below `length`, spread evenly, the same ones every time."""
  return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def take(source: LabelledSource, num_images: int) -> LabelledSource:
  """So many images of a source, spread evenly, the same ones every time; 0 for all.

  Raises:
    ValueError: the source is empty, or the number below 0.
  """
  if num_images < 0 or not len(source):
    raise UserError(f'of {len(source)} images {num_images} cannot be taken; use 0 for all')
  return subset(source, spread_indices(len(source), num_images)) if 0 < num_images < len(source) else source


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
  if name == FOLDER:
    benchmark, source = open_folder(data_dir)
  else:
    benchmark = find_benchmark(name)
    source = with_train_labels(open_prepared(benchmark, data_dir), benchmark)
  return benchmark, take(source, num_images)


def default_protocol(benchmark: Benchmark) -> str:
  """The protocol of the first published result; without one 'tcl', for scenes 'shifted', for a folder 'native'."""
  if benchmark.published:
    return benchmark.published[0].protocol
  return TCL.name if benchmark.name in STORED_IN else SHIFTED if benchmark.name == SCENES else NATIVE


def open_prepared(benchmark: Benchmark, data_dir: epath.PathLike) -> Source:
  """The images of a public benchmark and its files' labels, from the newest version of its data set in `data_dir`.

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
  records = tfds.open_records(str(newest), SPLIT, ('image', 'label'))

  def read(index: int) -> dict[str, Any]:
    record = records[index]
    key = record['key'].decode()
    label = decode_label(record['label'], f'the label map of {key!r} in {newest}')
    return {'image': record['image'], 'label': label, 'key': key}

  return Source((), len(records), read)


def is_stored(name: str, data_dir: epath.PathLike) -> bool:
  """Whether a data set is in `data_dir`."""
  return tfds.newest_version(data_dir, name) is not None


def with_train_labels(source: Source, benchmark: Benchmark) -> Source:
  """The images of a data set with a benchmark's labels instead of its files'."""

  def read(index: int) -> dict[str, Any]:
    record = source[index]
    return record | {'label': benchmark.train_labels(record['label'])}

  return Source(benchmark.classes, len(source), read)


def open_imagenet(data_dir: str) -> Source:
  """ImageNet's validation images, with classes numbered in the order of their WordNet ids.

  Args:
    data_dir: where TFDS data sets are kept, one of which is `imagenet2012` in ArrayRecord files; or a pattern of tars.

  Raises:
    ValueError: there is neither, or it is not whole.
  """
  if data_dir.endswith('.tar'):
    tars = open_webdataset((data_dir,), 'cls', '', f'--data_dir={data_dir}')
    return Source((), len(tars), functools.partial(_read_classified, tars))
  newest = tfds.newest_version(data_dir, IMAGENET_STORED_IN)
  if newest is None:
    raise UserError(
      f'--data_dir={data_dir} holds no {epath.Path(data_dir) / IMAGENET_STORED_IN} with a version in it; prepare it '
      "with TFDS (file_format='array_record'), or name tars with .cls files: "
      '--data_dir=FOLDER/{000000..000063}.tar'
    )
  records = tfds.open_records(str(newest), SPLIT, ('image',))
  fields = lambda record, index: {'image': record['image'], 'label': int(record['label']), 'key': f'{SPLIT}[{index}]'}
  return Source((), len(records), lambda index: fields(records[index], index))


def _read_classified(tars: WebDataset, index: int) -> dict[str, Any]:
  """An image of a tar, with the class in its `.cls` file."""
  try:
    record = tars[index]
    return {'image': record['image'], 'label': int(record['text']), 'key': record['key']}
  except BadRecord as bad:
    raise UserError(f'{bad.key}: {bad.cause}; a benchmark leaves no image out, so fetch it again') from bad
  except ValueError as error:
    text = record['text'][:40]
    raise UserError(f'{record["key"]}.cls holds {text!r}; it must hold the class, 0 to 999') from error


def open_scenes(config: ml_collections.ConfigDict, split: str) -> tuple[Benchmark, LabelledSource]:
  """The held-out scenes of a run's config, `VALIDATION` or `TEST`, as a benchmark without a background.

  Raises:
    ValueError: the config's scenes have a mistake.
  """
  source = build_scenes(config.data.scenes, tuple(config.model.vision.image_size), split)
  return make_benchmark(SCENES, source.classes), source


def open_folder(path: epath.PathLike) -> tuple[Benchmark, Source]:
  """Anyone's labelled images, as a benchmark.

  Args:
    path: folder with `images/NAME.jpg` (or .png and others), `labels/NAME.png` (indices of 8 or 16 bits, of which
      the highest, 255 or 65535, is ignored) and the
      classes in label order, as `classes.txt` (one a line) or `classes.json` (a list). A first class called
      'background' is whatever the others are not. Either may list synonyms, see `class_names.find_names`.

  Raises:
    ValueError: one of these is missing or has a mistake.
  """
  folder = epath.Path(path)
  images, labels = folder / 'images', folder / 'labels'
  for part, what in ((images, 'the images'), (labels, 'a PNG of indices for each image')):
    if not part.is_dir():
      raise UserError(f'there is no folder {part}; put {what} there')
  lines = _read_classes(folder)
  classes = [line.partition('|')[0].strip() for line in lines]
  benchmark = make_benchmark(folder.resolve().name, classes, background=classes[0] == _BACKGROUND)
  benchmark = dataclasses.replace(benchmark, own_names=lines)
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
  stems = {epath.Path(name).stem for name in names}
  if spare := sorted(name for name in present if name.endswith('.png') and name.removesuffix('.png') not in stems):
    raise UserError(
      f'there is no image of {labels / spare[0]} ({len(spare)} of {len(present)} label maps have none); '
      'add it, or remove the label map'
    )
  owners: dict[str, str] = {}
  for name in names:
    other = owners.setdefault(epath.Path(name).stem, name)
    if other != name:
      raise UserError(f'{images} holds {other} and {name}, which share a label map; rename one')

  def read(index: int) -> dict[str, Any]:
    image = images / names[index]
    label = labels / f'{image.stem}.png'
    found = decode_label(label.read_bytes(), str(label))
    if found.dtype != label_dtype(len(classes)) == np.uint16:  # where 255 is a class
      found = np.where(found == ignore_label(found.dtype), np.uint16(ignore_label(np.uint16)), found)
    return {'image': image.read_bytes(), 'label': found, 'key': image.stem}

  return benchmark, Source(benchmark.classes, len(names), read)


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
