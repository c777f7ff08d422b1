"""Where the official archives of segmentation data sets put their pictures and label maps.

Each function takes the folder that archives were unpacked in and lists the labelled pictures of one split. What is
missing ends in one line that says which file was expected where.
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

from groupvit_jax.errors import UserError
from groupvit_jax.eval.benchmarks import find_benchmark
from groupvit_jax.prepare import coco_rle

# Context's 459 category ids that its 60 classes have, in the order of the classes; 0 is the background.
_CONTEXT_IDS = (
  0,
  2,
  9,
  18,
  19,
  22,
  23,
  25,
  31,
  33,
  34,
  44,
  45,
  46,
  59,
  65,
  68,
  72,
  80,
  85,
  98,
  104,
  105,
  113,
  115,
  144,
  158,
  159,
  162,
  187,
  189,
  207,
  220,
  232,
  258,
  259,
  260,
  284,
  295,
  296,
  308,
  324,
  326,
  347,
  349,
  354,
  355,
  360,
  366,
  368,
  397,
  415,
  416,
  420,
  424,
  427,
  440,
  445,
  454,
  458,
)


class LabelledFile(NamedTuple):
  """A picture's file and its label map."""

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
    facts = json.loads(path.read_text())
    images = [image for image in facts['images'] if image['phase'] == 'val']
    areas: dict[int, list[dict]] = {image['image_id']: [] for image in images}
    for area in facts['annos_segmentation']:
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
    print(f'{path}: {bare:,} of {len(images):,} pictures have no area; all of them is background', file=sys.stderr)
  return _pairs(path, files)


def coco_stuff(manual_dir: epath.PathLike) -> list[LabelledFile]:
  """COCO-Stuff val2017: `[images/]val2017/*.jpg` and `stuffthingmaps/val2017/*.png`, or `annotations/val2017/*.png`.

  `*_labelTrainIds.png`, which mmsegmentation makes of them, will do as well. The archive of label maps has no folder of
  its own: unpacked beside the pictures it would mix with them.
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


def _find(manual_dir: epath.PathLike, places: Iterable[str], remedy: str = '') -> epath.Path:
  """The first of several places below a folder that there is; where there is none, `remedy` says what to do."""
  candidates = [epath.Path(manual_dir) / place for place in places]
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
  place: epath.Path, files: list[tuple[str, epath.Path, epath.Path | Callable[[], bytes]]]
) -> list[LabelledFile]:
  """The pictures, after a look for each file: a folder is listed once, however many pictures are expected in it.

  Raises:
    ValueError: there are none, or a file is missing.
  """
  if not files:
    raise UserError(f'{place} names no pictures of the split; unpack the official archives again')
  expected = [path for _, image, label in files for path in (image, label) if not callable(label) or path is image]
  present = {
    folder: {path.name for path in folder.iterdir()} if folder.exists() else set()
    for folder in {path.parent for path in expected}
  }
  missing = [path for path in expected if path.name not in present[path.parent]]
  if missing:
    others = f', and {len(missing) - 1} more files are missing' if len(missing) > 1 else ''
    raise UserError(f'there is no {missing[0]}{others}; unpack the official archives again')
  return [LabelledFile(key, image, label if callable(label) else label.read_bytes) for key, image, label in files]


def _raw_ids(path: epath.Path) -> bytes:
  """COCO-Stuff's own ids again, of a label map of train ids."""
  table = np.full(256, 255, np.uint8)
  ids = find_benchmark('coco_stuff').raw_label_ids
  table[: len(ids)] = ids
  with Image.open(io.BytesIO(path.read_bytes())) as image:
    return _encode(table[np.asarray(image)])


def _draw_context(path: epath.Path, image: dict, areas: list[dict]) -> bytes:
  """Draws the label map of a picture: its areas in the order of the file."""
  labels = np.zeros((image['height'], image['width']), np.uint8)
  for area in areas:
    if area['category_id'] not in _CONTEXT_IDS:
      raise UserError(
        f'{path}: {image["file_name"]} has the category {area["category_id"]}, none of the 60 classes; fetch it again'
      )
    mask = coco_rle.decode(area['segmentation']['counts'], tuple(area['segmentation']['size']))
    labels[mask] = _CONTEXT_IDS.index(area['category_id'])
  return _encode(labels)


def _encode(labels: np.ndarray) -> bytes:
  data = io.BytesIO()
  Image.fromarray(labels).save(data, 'PNG')
  return data.getvalue()
