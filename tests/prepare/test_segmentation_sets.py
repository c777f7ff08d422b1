"""Official layouts -> ArrayRecord -> labelled pictures, and what is wrong with a layout in one line."""

import io
import json
import pathlib
import re
import shutil

import fsspec
import numpy as np
from pycocotools import mask as coco_mask
import pytest

from groupvit_jax import cli, storage
from groupvit_jax.data import tfds
from groupvit_jax.data.images import read_image
from groupvit_jax.eval import draw, labelled
from groupvit_jax.prepare import __main__ as build
from groupvit_jax.prepare.segmentation_layouts import decode_run_lengths
from tests import official_layouts as layouts

SETS = build.SEGMENTATION_SETS


@pytest.fixture(scope='module')
def raw(tmp_path_factory) -> dict[str, tuple[pathlib.Path, list[np.ndarray]]]:
  """Per data set the folder with its archives, and the label maps in it."""
  made = {}
  for name in SETS:
    folder = tmp_path_factory.mktemp(name)
    made[name] = folder, getattr(layouts, name)(folder)
  return made


@pytest.fixture(scope='module')
def data_dir(raw, tmp_path_factory) -> pathlib.Path:
  """All of them, built."""
  data_dir = tmp_path_factory.mktemp('data')
  for name in SETS:
    build.build(name, raw[name][0], data_dir)
  assert sorted(path.name for path in data_dir.iterdir() if path.name != 'downloads') == sorted(SETS)
  return data_dir


def expected(benchmark: str, labels: np.ndarray) -> np.ndarray:
  """What a benchmark makes of the raw labels in `layouts`, written out."""
  table = {
    'voc21': {0: 0, 255: 255, 1: 1, 2: 2, 3: 3, 20: 20},
    'voc20': {0: 255, 255: 255, 1: 0, 2: 1, 3: 2, 20: 19},
    'context60': {0: 0, 1: 1, 37: 37, 59: 59},
    'context59': {0: 255, 1: 0, 37: 36, 59: 58},
    'context459': {1: 0, 256: 255, 459: 458},
    'coco_stuff': {0: 0, 12: 11, 255: 255, 91: 80, 181: 170},
    'coco_object': {0: 1, 12: 12, 255: 0, 91: 0, 181: 0},
    'ade20k': {0: 255, 1: 0, 150: 149},
    'ade20k_847': {0: 65535, 1: 65535, 2978: 0, 14: 94, 3156: 358},
    'cityscapes': {7: 0, 23: 10, 33: 18, 0: 255, 5: 255},
  }[benchmark]
  return np.vectorize(table.__getitem__)(labels).astype(labels.dtype)


@pytest.mark.parametrize('name', list(labelled.STORED_IN))
def test_a_benchmark_from_its_official_layout(name, raw, data_dir):
  benchmark, source = labelled.open_benchmark(name, data_dir)
  folder, maps = raw[labelled.STORED_IN[name]]
  paths = [*folder.rglob('*.jpg'), *folder.rglob('*8bit.png')]
  files = {path.stem.removesuffix('_leftImg8bit'): path for path in paths}
  assert len(source) == 3 and source.classes == benchmark.classes
  records = {record['key']: record for record in map(source.__getitem__, range(3))}
  assert records.keys() == files.keys()
  by_size = {labels.shape: labels for labels in maps}
  for key, record in records.items():
    assert record['image'] == files[key].read_bytes()  # unchanged
    pixels = read_image(record['image'], key)
    assert pixels.shape == (*record['label'].shape, 3)
    np.testing.assert_array_equal(record['label'], expected(name, by_size[record['label'].shape]), strict=True)


@pytest.mark.parametrize(
  'options',
  [
    dict(images='images/val2017', labels='annotations/val2017'),
    dict(images='images/val2017', labels='annotations/val2017', ending='_labelTrainIds.png'),
  ],
)
def test_coco_stuff_as_mmsegmentation_lays_it_out(options, tmp_path):
  maps = layouts.coco_stuff(tmp_path, **options)
  if 'ending' in options:  # what its converter writes
    for path, labels in zip(sorted(tmp_path.glob('annotations/*/*.png')), maps):
      layouts.save(path, expected('coco_stuff', labels))
  build.build('coco_stuff', tmp_path, tmp_path / 'data')
  _, source = labelled.open_benchmark('coco_object', tmp_path / 'data')
  by_size = {labels.shape: labels for labels in maps}
  for record in map(source.__getitem__, range(3)):
    np.testing.assert_array_equal(record['label'], expected('coco_object', by_size[record['label'].shape]))


def test_what_was_built_is_counted(raw, data_dir, tmp_path, capsys):
  folder = raw['ade20k'][0]
  command = ['ade20k', f'--manual_dir={folder}', f'--data_dir={tmp_path}']
  assert build.main(command) == 0
  line = capsys.readouterr().out.splitlines()[-1]  # the others are TFDS's
  assert line.startswith('ade20k: 3 of 2,000 images, in ') and 'about all 2,000: is the download whole?' in line
  assert build.main(command) == 0
  assert f'it was there before, and --manual_dir={folder} was not looked at: to build' in capsys.readouterr().out
  for flag in ('manual_dir', 'data_dir'):
    assert build.main([*command, f'--{flag}=gs://bucket/x']) == cli.EXIT_USAGE
    assert f'--{flag}=gs://bucket/x is remote; build from a disk onto a disk' in capsys.readouterr().err


def test_pictures_without_an_area_are_counted(tmp_path, capsys):
  layouts.pascal_context(tmp_path)
  path = tmp_path / V10 / 'trainval_merged.json'
  facts = json.loads(path.read_text())
  facts['annos_segmentation'] = [area for area in facts['annos_segmentation'] if area['image_id'] != 1]
  path.write_text(json.dumps(facts))
  build.build('pascal_context', tmp_path, tmp_path / 'data')
  assert 'trainval_merged.json: 1 of 3 images have no area; they are all background' in capsys.readouterr().err


def test_a_set_in_a_bucket_is_copied_once(data_dir, own_cache, monkeypatch):
  """With a store that `fsspec` keeps in memory for a bucket."""
  monkeypatch.setattr(tfds, '_CHUNK', 1000)  # so that files take several
  store = fsspec.filesystem('memory')
  store.put(str(data_dir / 'voc2012'), '/bucket/voc2012', recursive=True)
  _, source = labelled.open_benchmark('voc20', 'memory://bucket/')
  _, local = labelled.open_benchmark('voc20', data_dir)
  assert len(source) == 3
  for mine, theirs in zip(map(source.__getitem__, range(3)), map(local.__getitem__, range(3))):
    assert mine['image'] == theirs['image'] and np.array_equal(mine['label'], theirs['label'])
  fetched, read = [], storage.read_range
  monkeypatch.setattr(storage, 'read_range', lambda path, *extent: fetched.append(path) or read(path, *extent))
  labelled.open_benchmark('voc21', 'memory://bucket')
  assert not fetched
  store.pipe('/bucket/voc2012/1.0.0/features.json', store.cat('/bucket/voc2012/1.0.0/features.json') + b' ')
  labelled.open_benchmark('voc21', 'memory://bucket')
  assert {path.rpartition('/')[2] for path in fetched} == {'features.json'}
  with pytest.raises(ValueError, match='--data_dir=memory://bucket holds no ade20k, which ade20k needs; make it with'):
    labelled.open_benchmark('ade20k', 'memory://bucket')


def test_a_subset_is_spread_evenly_and_always_the_same(tmp_path):
  layouts.folder(tmp_path)
  benchmark, some = labelled.open_benchmark('folder', tmp_path, num_images=2)
  assert [some[i]['key'] for i in range(2)] == ['a', 'c.d'] and some.classes == benchmark.classes
  assert len(labelled.open_benchmark('folder', tmp_path, num_images=7)[1]) == 3


def test_a_folder_of_ones_own(tmp_path):
  maps = layouts.folder(tmp_path)
  benchmark, source = labelled.open_benchmark('folder', tmp_path)
  assert benchmark.background and benchmark.classes == ('background', 'dog', 'grass')
  assert benchmark.name == tmp_path.name and len(source) == 3
  for n, labels in enumerate(maps):
    np.testing.assert_array_equal(source[n]['label'], labels)
  (tmp_path / 'classes.txt').unlink()
  (tmp_path / 'classes.json').write_text('["dog", "grass", "sky"]')
  assert not labelled.open_benchmark('folder', tmp_path)[0].background


def test_more_classes_than_8_bits_hold(tmp_path):
  """Then 255 is a class in label maps of 16 bits, and ignored in those of 8."""
  layouts.folder(tmp_path)
  wide = layouts.labels_of(0, (0, 255, 299, 65535))
  layouts.save(tmp_path / 'labels' / 'a.png', wide)
  (tmp_path / 'classes.txt').write_text('\n'.join(f'class {n}' for n in range(300)))
  benchmark, source = labelled.open_folder(tmp_path)
  assert benchmark.num_classes == len(benchmark.palette) == 300
  np.testing.assert_array_equal(source[0]['label'], wide, strict=True)
  data = io.BytesIO()
  draw.mask_image(wide, benchmark.palette).save(data, 'PNG')
  np.testing.assert_array_equal(labelled.decode_label(data.getvalue(), 'a'), wide, strict=True)
  colours = draw.colour_map(wide, benchmark.palette)
  assert tuple(colours[0, 10]) == benchmark.palette[255] and tuple(colours[0, -1]) == (224, 224, 224)
  narrow = layouts.labels_of(1, (0, 1, 2, 65535))
  np.testing.assert_array_equal(source[1]['label'], narrow, strict=True)


V12, V10, ADE = 'VOCdevkit/VOC2012', 'VOCdevkit/VOC2010', 'ADEChallengeData2016'


def wrong_size(path):
  layouts.save(path, np.zeros((5, 6), np.uint8))


def empty(folder):
  for path in folder.iterdir():
    path.unlink() if path.is_file() else shutil.rmtree(path)


OBJECTS = 'ADE20K_2021_17_01/images/ADE/validation/urban/street/ADE_val_00000001_seg.png'
MAT = f'{V10}/trainval/{layouts.KEYS[0]}.mat'
LABEL, TRAINVAL = f'{V12}/SegmentationClass/{layouts.KEYS[0]}.png', f'{V10}/trainval_merged.json'
NO_LABELS = 'there is no .*stuffthingmaps/val2017 nor .*annotations/val2017 nor .*; unzip .* -d .*/stuffthingmaps$'


def rgb(path):
  layouts.save(path, np.zeros((20, 30, 3), np.uint8))


def replace(old, new):
  return lambda path: path.write_text(path.read_text().replace(old, new))


# What is done to which file of a good layout, and what is said then. All share the search for files and their sizes.
FAULTS = [
  ('voc2012', V12, shutil.rmtree, r'there is no .*VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt nor '),
  ('voc2012', f'{V12}/ImageSets/Segmentation/val.txt', lambda p: p.write_text('\n'), 'names no images'),
  ('voc2012', LABEL, pathlib.Path.unlink, rf'there is no .*SegmentationClass/{layouts.KEYS[0]}.png; '),
  ('voc2012', f'{V12}/JPEGImages', shutil.rmtree, rf'there is no .*JPEGImages/{layouts.KEYS[0]}.jpg, and 2 more files'),
  ('voc2012', LABEL, wrong_size, 'is 20 x 30 px, its label map 5 x 6'),
  ('voc2012', LABEL, rgb, 'image of mode RGB; it must be a PNG of indices'),
  (
    'voc2012',
    f'{V12}/JPEGImages/{layouts.KEYS[2]}.jpg',
    lambda p: p.write_bytes(b'x'),
    'has no format that can be read',
  ),
  ('pascal_context', TRAINVAL, pathlib.Path.unlink, f'there is no .*{TRAINVAL} nor '),
  ('pascal_context', TRAINVAL, lambda p: p.write_text('{"images": []}'), 'is not the trainval'),
  ('pascal_context', TRAINVAL, replace('"category_id": 284', '"category_id": 285'), 'has the category 285'),
  ('pascal_context', TRAINVAL, replace('"phase": "val"', '"phase": "test"'), 'names no images'),
  ('pascal_context', f'{V10}/JPEGImages/{layouts.KEYS[1]}.jpg', pathlib.Path.unlink, 'there is no .*000042.jpg;'),
  ('pascal_context_459', MAT, pathlib.Path.unlink, rf'there is no .*trainval/{layouts.KEYS[0]}.mat; '),
  ('pascal_context_459', MAT, lambda p: p.write_bytes(b'x'), f'{layouts.KEYS[0]}.mat holds no LabelMap'),
  ('ade20k_full', OBJECTS, pathlib.Path.unlink, 'there is no .*ADE_val_00000001_seg.png; '),
  ('ade20k_full', OBJECTS, wrong_size, '_seg.png is no label map of red, green and blue'),
  ('coco_stuff', 'val2017', empty, 'val2017 names no images'),
  ('coco_stuff', 'stuffthingmaps', shutil.rmtree, NO_LABELS),
  ('coco_stuff', f'stuffthingmaps/val2017/{1:012}.png', pathlib.Path.unlink, f'there is no .*{1:012}.png;'),
  ('ade20k', f'{ADE}/annotations', shutil.rmtree, 'there is no .*annotations/validation/ADE_val_00000000.png'),
  ('ade20k', f'{ADE}/images/validation', empty, 'names no images'),
  ('cityscapes_fine', '', empty, '--manual_dir=.* is empty; unpack'),
  ('cityscapes_fine', 'leftImg8bit', shutil.rmtree, 'there is no .*leftImg8bit/val; unpack'),
  ('cityscapes_fine', 'gtFine', shutil.rmtree, 'there is no .*bonn_000000_000019_gtFine_labelIds.png'),
]


@pytest.mark.parametrize('name, path, damage, message', FAULTS, ids=[f'{n}-{i}' for i, (n, *_) in enumerate(FAULTS)])
def test_a_wrong_layout_is_one_line(name, path, damage, message, tmp_path, capsys):
  getattr(layouts, name)(tmp_path)
  damage(tmp_path / path)
  arguments = [name, f'--manual_dir={tmp_path}', f'--data_dir={tmp_path / "data"}']
  assert build.main(arguments) == cli.EXIT_USAGE
  said = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error')]
  assert len(said) == 1
  assert re.search(message, said[0]), said[0]
  with pytest.raises(ValueError, match=f'holds no {name}, which .* needs; make it with python -m'):
    benchmark = next(key for key, stored in labelled.STORED_IN.items() if stored == name)
    labelled.open_benchmark(benchmark, tmp_path / 'data')


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda p: (p / 'labels' / 'b.png').unlink(), 'there is no .*labels/b.png, the label map of images/b.jpg .1 of 3'),
    (lambda p: shutil.rmtree(p / 'labels'), 'there is no folder .*labels; put a PNG'),
    (lambda p: (p / 'classes.txt').unlink(), 'there is no .*classes.txt nor .*classes.json'),
    (lambda p: (p / 'classes.txt').write_text(''), 'classes.txt is empty'),
    (lambda p: (p / 'classes.json').write_text('{}'), 'not a list of names'),
    (lambda p: empty(p / 'images'), 'holds no images'),
    (lambda p: shutil.copy(p / 'images' / 'a.jpg', p / 'images' / 'a.png'), 'a.jpg and a.png, which share'),
    (
      lambda p: shutil.copy(p / 'labels' / 'a.png', p / 'labels' / 'spare.png'),
      'there is no image of .*labels/spare.png .* have none.; add it, or remove',
    ),
  ],
)
def test_a_folder_with_a_mistake(damage, message, tmp_path):
  layouts.folder(tmp_path)
  damage(tmp_path)
  with pytest.raises(ValueError, match=message):
    labelled.open_benchmark('folder', tmp_path)


def test_a_damaged_copy_and_an_unknown_benchmark(data_dir, tmp_path):
  shutil.copytree(data_dir / 'ade20k', tmp_path / 'ade20k')
  next(tmp_path.rglob('*.array_record*')).unlink()
  with pytest.raises(ValueError, match='is no whole TFDS data set .*there is no ade20k-val'):
    labelled.open_benchmark('ade20k', tmp_path)
  with pytest.raises(ValueError, match="there is no benchmark 'voc'; choose one of voc21, "):
    labelled.open_benchmark('voc', tmp_path)


def test_run_lengths_are_those_of_cocos_own_tools():
  rng = np.random.default_rng(0)
  masks = [rng.random((h, w)) < p for h, w in ((1, 1), (7, 13), (40, 9), (200, 300)) for p in (0, 0.01, 0.5, 1)]
  masks.append(np.pad(np.ones((90, 500), bool), 60))  # long runs and large differences
  for mask in masks:
    coded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    np.testing.assert_array_equal(decode_run_lengths(coded['counts'], tuple(coded['size'])), mask)
  with pytest.raises(ValueError, match='do not fill a mask'):
    decode_run_lengths(coded['counts'], (3, 3))
