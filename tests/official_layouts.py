"""Tiny segmentation data sets in their official layouts, odd files included."""

import json
import pathlib

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
import scipy.io

from tests.photos import photo

# Of each data set, three pictures (H, W): RGB, grey and CMYK JPEGs where the set has JPEGs.
SIZES = ((20, 30), (33, 17), (24, 24))
KEYS = ('2007_000033', '2007_000042', '2007_000061')
CONTEXT_CATEGORIES = (2, 284, 458)  # aeroplane, person, wood


def save(path: pathlib.Path, pixels: np.ndarray, mode: str = '') -> None:
  """Writes a picture, converted to a mode."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(pixels)
  (image.convert(mode) if mode else image).save(path)


def save_indices(path: pathlib.Path, labels: np.ndarray) -> None:
  """Writes a label map with a palette, as VOC's are."""
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(labels).convert('P')
  image.putpalette(list(range(256)) * 3)
  image.save(path)


def labels_of(number: int, values: tuple[int, ...]) -> np.ndarray:
  """Vertical stripes of some labels, of 16 bits where one does not fit 8."""
  height, width = SIZES[number]
  columns = np.array(values, np.min_scalar_type(max(values)))[np.arange(width) * len(values) // width]
  return np.broadcast_to(columns, (height, width)).copy()


def save_pictures(paths: list[pathlib.Path]) -> None:
  """RGB, grey and CMYK."""
  for number, (path, mode) in enumerate(zip(paths, ('', 'L', 'CMYK'), strict=True)):
    save(path, photo(*SIZES[number], seed=number), '' if path.suffix == '.png' else mode)


def voc2012(root: pathlib.Path) -> list[np.ndarray]:
  """VOCdevkit/VOC2012; labels with 255 at the borders."""
  base = root / 'VOCdevkit' / 'VOC2012'
  save_pictures([base / 'JPEGImages' / f'{key}.jpg' for key in KEYS])
  maps = [labels_of(n, (0, 255, 1 + n, 255, 20)) for n in range(3)]
  for key, labels in zip(KEYS, maps):
    save_indices(base / 'SegmentationClass' / f'{key}.png', labels)
  (base / 'ImageSets' / 'Segmentation').mkdir(parents=True)
  (base / 'ImageSets' / 'Segmentation' / 'val.txt').write_text('\n'.join(KEYS) + '\n')
  return maps


def pascal_context(root: pathlib.Path) -> list[np.ndarray]:
  """VOCdevkit/VOC2010 with the JSON, which also has a picture for training."""
  base = root / 'VOCdevkit' / 'VOC2010'
  save_pictures([base / 'JPEGImages' / f'{key}.jpg' for key in KEYS])
  maps, areas, images = [], [], [dict(image_id=99, file_name='x.jpg', phase='train', height=4, width=4)]
  for n, key in enumerate(KEYS):
    labels = labels_of(n, (0, 1, 37, 59))
    for label, category in zip((1, 37, 59), CONTEXT_CATEGORIES):
      area = coco_mask.encode(np.asfortranarray(labels == label, np.uint8))
      areas.append(dict(image_id=n, category_id=category, segmentation=area | {'counts': area['counts'].decode()}))
    images.append(dict(image_id=n, file_name=f'{key}.jpg', phase='val', height=SIZES[n][0], width=SIZES[n][1]))
    maps.append(labels)
  areas.append(dict(areas[0], image_id=99))
  (base / 'trainval_merged.json').write_text(json.dumps(dict(images=images, annos_segmentation=areas)))
  return maps


def pascal_context_459(root: pathlib.Path) -> list[np.ndarray]:
  """VOCdevkit/VOC2010 with MATLAB files: accordion 1, 256 (a label that 8 bits hold not), wool 459."""
  base = root / 'VOCdevkit' / 'VOC2010'
  save_pictures([base / 'JPEGImages' / f'{key}.jpg' for key in KEYS])
  maps = [labels_of(n, (1, 256, 459)) for n in range(3)]
  (base / 'trainval').mkdir()
  for key, labels in zip(KEYS, maps):
    scipy.io.savemat(base / 'trainval' / f'{key}.mat', {'LabelMap': labels})
  (base / 'ImageSets' / 'Main').mkdir(parents=True)
  (base / 'ImageSets' / 'Main' / 'val.txt').write_text('\n'.join(KEYS) + '\n')
  return maps


def coco_stuff(
  root: pathlib.Path, images='val2017', labels='stuffthingmaps/val2017', ending='.png'
) -> list[np.ndarray]:
  """Raw ids: person 0, stop sign 12, banner 91, wood 181, unlabelled 255."""
  save_pictures([root / images / f'{n:012}.jpg' for n in range(3)])
  maps = [labels_of(n, (0, 12, 255, 91, 181)) for n in range(3)]
  for n, values in enumerate(maps):
    save(root / labels / f'{n:012}{ending}', values)
  return maps


def ade20k(root: pathlib.Path) -> list[np.ndarray]:
  """0 is 'other'."""
  base = root / 'ADEChallengeData2016'
  names = [f'ADE_val_{n:08}' for n in range(3)]
  save_pictures([base / 'images' / 'validation' / f'{name}.jpg' for name in names])
  maps = [labels_of(n, (0, 1, 150)) for n in range(3)]
  for name, labels in zip(names, maps):
    save(base / 'annotations' / 'validation' / f'{name}.png', labels)
  return maps


def ade20k_full(root: pathlib.Path) -> list[np.ndarray]:
  """Objects: 0 unlabelled, 1 no class, wall 2978, plane (aircraft) 14, and the highest, 3156."""
  base = root / 'ADE20K_2021_17_01' / 'images' / 'ADE' / 'validation' / 'urban' / 'street'
  names = [f'ADE_val_{n:08}' for n in range(3)]
  save_pictures([base / f'{name}.jpg' for name in names])
  maps = [labels_of(n, (0, 1, 2978, 14, 3156)) for n in range(3)]
  for name, labels in zip(names, maps):
    instances = np.arange(labels.size, dtype=np.uint16).reshape(labels.shape) % 10  # in red's last digit, and in blue
    save(
      base / f'{name}_seg.png', np.stack([labels // 256 * 10 + instances, labels % 256, instances], -1).astype(np.uint8)
    )
  return maps


def cityscapes_fine(root: pathlib.Path) -> list[np.ndarray]:
  """labelIds: road 7, sky 23, bicycle 33, and some that are not evaluated."""
  names = [('ulm', 'ulm_000000_000019'), ('ulm', 'ulm_000001_000019'), ('bonn', 'bonn_000000_000019')]
  places = [root / 'leftImg8bit' / 'val' / city / f'{name}_leftImg8bit.png' for city, name in names]
  save_pictures(places)
  maps = [labels_of(n, (7, 23, 33, 0, 5)) for n in range(3)]
  for (city, name), labels in zip(names, maps):
    save(root / 'gtFine' / 'val' / city / f'{name}_gtFine_labelIds.png', labels)
  return maps


def folder(root: pathlib.Path) -> list[np.ndarray]:
  """Anyone's pictures of three classes, the first one the background."""
  save_pictures([root / 'images' / name for name in ('a.jpg', 'b.jpg', 'c.d.jpg')])
  maps = [labels_of(n, (0, 1, 2, 255)) for n in range(3)]
  for name, labels in zip(('a', 'b', 'c.d'), maps):
    save_indices(root / 'labels' / f'{name}.png', labels)
  (root / 'classes.txt').write_text('background\ndog\ngrass\n')
  return maps
