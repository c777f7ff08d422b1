"""Official layouts of segmentation data sets: the image and label files of one split.

Each function takes the folder in which the archives were unpacked. A missing file is an error that names it.
"""

from collections.abc import Callable, Iterable
import functools
import io
import json
import sys
from typing import NamedTuple

from etils import epath
import numpy as np
from PIL import Image
import scipy.io

from groupvit_jax.errors import UserError
from groupvit_jax.eval.benchmarks import find_benchmark

# Context's 459 category ids that its 60 classes have, in the order of the classes; 0 is the background.
_CONTEXT_IDS = (
  0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158,
  159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368,
  397, 415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip


class LabelledFile(NamedTuple):
  """An image file and its label map."""

  key: str
  image: epath.Path
  read_label: Callable[[], bytes]  # a PNG of indices


def voc2012(manual_dir: epath.PathLike) -> list[LabelledFile]:
  """VOC 2012 val: `VOCdevkit/VOC2012/{ImageSets/Segmentation/val.txt,JPEGImages,SegmentationClass}`."""
  listing = 'ImageSets/Segmentation/val.txt'
  root = _find(manual_dir, [f'{folder}{listing}' for folder in ('VOCdevkit/VOC2012/', 'VOC2012/', '')]).parents[2]
  keys = (root / listing).read_text().split()
  return _pairs(
    root / listing,
    [(key, root / 'JPEGImages' / f'{key}.jpg', root / 'SegmentationClass' / f'{key}.png') for key in keys],
  )


def pascal_context(manual_dir: epath.PathLike) -> list[LabelledFile]:
  """Pascal Context val: `VOCdevkit/VOC2010/{JPEGImages,trainval_merged.json}`; labels are drawn from the JSON."""
  name = 'trainval_merged.json'
  path = _find(manual_dir, [f'{folder}{name}' for folder in ('VOCdevkit/VOC2010/', 'VOC2010/', '')])
  try:
    merged = json.loads(path.read_text())
    images = [image for image in merged['images'] if image['phase'] == 'val']
    areas: dict[int, list[dict]] = {image['image_id']: [] for image in images}
    for area in merged['annos_segmentation']:
      areas.get(area['image_id'], []).append(area)
    bare = sum(not found for found in areas.values())
    files = [
      (
        image['file_name'].removesuffix('.jpg'),
        path.parent / 'JPEGImages' / image['file_name'],
        functools.partial(_draw_context, path, image, areas[image['image_id']]),
      )
      for image in images
    ]
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f'{path} is not the trainval_merged.json of Pascal Context ({error!r}); fetch it again') from error
  if bare:
    print(f'{path}: {bare:,} of {len(images):,} images have no area; they are all background', file=sys.stderr)
  return _pairs(path, files)


def pascal_context_459(manual_dir: epath.PathLike) -> list[LabelledFile]:
  """Pascal Context val with all 459 classes: `VOCdevkit/VOC2010/{ImageSets/Main/val.txt,JPEGImages,trainval/*.mat}`."""
  listing = 'ImageSets/Main/val.txt'
  root = _find(manual_dir, [f'{folder}{listing}' for folder in ('VOCdevkit/VOC2010/', 'VOC2010/', '')]).parents[2]
  keys = (root / listing).read_text().split()
  files = [(key, root / 'JPEGImages' / f'{key}.jpg', root / 'trainval' / f'{key}.mat') for key in keys]
  return _pairs(root / listing, files, _read_mat)


def coco_stuff(manual_dir: epath.PathLike) -> list[LabelledFile]:
  """COCO-Stuff val2017: `[images/]val2017/*.jpg` and `stuffthingmaps/val2017/*.png`, or `annotations/val2017/*.png`.

  `*_labelTrainIds.png`, which mmsegmentation makes of them, will do as well. The archive of label maps has no folder of
  its own: unpacked beside the images it would mix with them.
  """
  images = _find(manual_dir, ['images/val2017', 'val2017'])
  folders = ('stuffthingmaps/val2017', 'annotations/val2017', 'stuffthingmaps_trainvaltest2017/val2017')
  labels = _find(manual_dir, folders, f'unzip stuffthingmaps_trainval2017.zip -d {manual_dir}/stuffthingmaps')
  present = {path.name for path in labels.iterdir()}
  files = []
  for image in _sorted(images, '.jpg'):
    converted = labels / f'{image.stem}_labelTrainIds.png'
    raw = labels / f'{image.stem}.png'
    made = raw.name not in present and converted.name in present
    files.append((image.stem, image, functools.partial(_raw_ids, converted) if made else raw))
  return _pairs(images, files)


def ade20k(manual_dir: epath.PathLike) -> list[LabelledFile]:
  """ADE20K validation: `ADEChallengeData2016/{images,annotations}/validation`."""
  images = _find(manual_dir, ['ADEChallengeData2016/images/validation', 'images/validation'])
  labels = images.parents[1] / 'annotations' / 'validation'
  return _pairs(images, [(i.stem, i, labels / f'{i.stem}.png') for i in _sorted(images, '.jpg')])


def ade20k_full(manual_dir: epath.PathLike) -> list[LabelledFile]:
  """All objects of ADE20K, validation: `ADE20K_2021_17_01/images/ADE/validation/*/*/ADE_val_*{.jpg,_seg.png}`."""
  root = _find(manual_dir, [f'{folder}images/ADE/validation' for folder in ('ADE20K_2021_17_01/', '')])
  images = sorted(root.glob('*/*/ADE_val_*.jpg'), key=lambda path: path.name)
  return _pairs(root, [(i.stem, i, i.parent / f'{i.stem}_seg.png') for i in images], _read_objects)


def cityscapes_fine(manual_dir: epath.PathLike) -> list[LabelledFile]:
  """Cityscapes val: `leftImg8bit/val/CITY/*_leftImg8bit.png` and `gtFine/val/CITY/*_gtFine_labelIds.png`."""
  images = _find(manual_dir, ['leftImg8bit/val'])
  ending = '_leftImg8bit.png'
  files = []
  for city in sorted(folder for folder in images.iterdir() if folder.is_dir()):
    for image in _sorted(city, ending):
      key = image.name.removesuffix(ending)
      label = images.parents[1] / 'gtFine' / 'val' / city.name / f'{key}_gtFine_labelIds.png'
      files.append((key, image, label))
  return _pairs(images, files)


def decode_run_lengths(counts: str | bytes, size: tuple[int, int]) -> np.ndarray:
  """The mask, bool [H, W], of the compressed run lengths that COCO's tools write.

  Runs alternate between outside and inside, column by column. From the third on a run is stored as its difference
  to the last but one; a number takes groups of 5 bits, low ones first, in characters from '0' on, of which the sixth
  bit tells that another follows and the last one's fifth is the sign.

  Raises:
    UserError: the runs do not fill the mask.
  """
  runs: list[int] = []
  value = shift = 0
  for char in counts if isinstance(counts, bytes) else counts.encode():
    bits = char - ord('0')
    value |= (bits & 0x1F) << shift
    shift += 5
    if bits & 0x20:
      continue
    if bits & 0x10:
      value -= 1 << shift
    runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    value = shift = 0
  if sum(runs) != size[0] * size[1] or min(runs, default=0) < 0:
    raise UserError(f'run lengths of {sum(runs)} pixels do not fill a mask of {size[0]} x {size[1]}')
  inside = np.arange(len(runs)) % 2 == 1
  return np.repeat(inside, runs).reshape(size[::-1]).T


def _find(manual_dir: epath.PathLike, paths: Iterable[str], remedy: str = '') -> epath.Path:
  """The first path below a folder that exists; where none does, `remedy` tells what to do."""
  candidates = [epath.Path(manual_dir) / path for path in paths]
  for path in candidates:
    if path.exists():
      return path
  raise UserError(
    'there is no '
    + ' nor '.join(map(str, candidates))
    + '; '
    + (remedy or f'unpack the official archives in --manual_dir={manual_dir}')
  )


def _sorted(folder: epath.Path, ending: str) -> list[epath.Path]:
  return sorted(path for path in folder.iterdir() if path.name.endswith(ending))


def _pairs(
  source: epath.Path,
  files: list[tuple[str, epath.Path, epath.Path | Callable[[], bytes]]],
  read: Callable[[epath.Path], bytes] = epath.Path.read_bytes,
) -> list[LabelledFile]:
  """The labelled images, after a check that each file exists; a folder is listed once. `read` reads label maps.

  Raises:
    UserError: there are none, or a file is missing.
  """
  if not files:
    raise UserError(f'{source} names no images of the split; unpack the official archives again')
  expected = [path for _, image, label in files for path in (image, label) if not callable(label) or path is image]
  present = {
    folder: {path.name for path in folder.iterdir()} if folder.exists() else set()
    for folder in {path.parent for path in expected}
  }
  missing = [path for path in expected if path.name not in present[path.parent]]
  if missing:
    others = f', and {len(missing) - 1} more files are missing' if len(missing) > 1 else ''
    raise UserError(f'there is no {missing[0]}{others}; unpack the official archives again')
  reader = lambda label: label if callable(label) else functools.partial(read, label)
  return [LabelledFile(key, image, reader(label)) for key, image, label in files]


def _read_mat(path: epath.Path) -> bytes:
  """The label map in a MATLAB file of Pascal Context: 1 to 459."""
  try:
    labels = scipy.io.loadmat(io.BytesIO(path.read_bytes()))['LabelMap'].astype(np.uint16)
  except Exception as error:  # which one depends on where the damage is
    raise UserError(f'{path} holds no LabelMap of Pascal Context ({error!r}); fetch it again') from error
  return _encode(labels)


def _read_objects(path: epath.Path) -> bytes:
  """The objects in a label map of colours: red // 10 * 256 + green, as ADE20K numbers them from 1; 0 is unlabelled."""
  try:
    with Image.open(io.BytesIO(path.read_bytes())) as image:
      red, green, _ = np.moveaxis(np.asarray(image).astype(np.uint16), -1, 0)
  except ValueError as error:
    raise UserError(f'{path} is no label map of red, green and blue; fetch it again') from error
  return _encode(red // 10 * 256 + green)


def _raw_ids(path: epath.Path) -> bytes:
  """COCO-Stuff's own ids again, of a label map of train ids."""
  table = np.full(256, 255, np.uint8)
  ids = find_benchmark('coco_stuff').raw_label_ids
  table[: len(ids)] = ids
  with Image.open(io.BytesIO(path.read_bytes())) as image:
    return _encode(table[np.asarray(image)])


def _draw_context(path: epath.Path, image: dict, areas: list[dict]) -> bytes:
  """Draws the label map of an image: its areas in the order of the file."""
  labels = np.zeros((image['height'], image['width']), np.uint8)
  for area in areas:
    if area['category_id'] not in _CONTEXT_IDS:
      raise UserError(
        f'{path}: {image["file_name"]} has the category {area["category_id"]}, none of the 60 classes; fetch it again'
      )
    mask = decode_run_lengths(area['segmentation']['counts'], tuple(area['segmentation']['size']))
    labels[mask] = _CONTEXT_IDS.index(area['category_id'])
  return _encode(labels)


def _encode(labels: np.ndarray) -> bytes:
  data = io.BytesIO()
  Image.fromarray(labels).save(data, 'PNG')
  return data.getvalue()
