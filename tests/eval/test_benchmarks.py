"""The benchmarks' facts: complete, consistent, and encoded as the data sets encode them."""

import numpy as np
import pytest

from groupvit_jax.eval import benchmarks, protocols
from groupvit_jax.eval.class_names import bundled_sets, find_names
from groupvit_jax.eval.draw import class_palette

SIZES = {
  'voc21': 21,
  'voc20': 20,
  'context60': 60,
  'context59': 59,
  'context459': 459,
  'coco_object': 81,
  'coco_stuff': 171,
  'ade20k': 150,
  'ade20k_847': 847,
  'cityscapes': 19,
}


def test_all_ten_are_there_with_names_and_colours():
  found = benchmarks.load_benchmarks()
  assert {name: b.num_classes for name, b in found.items()} == SIZES
  for name, benchmark in found.items():
    assert benchmark.name == name
    assert len(benchmark.palette) == benchmark.num_classes
    assert benchmark.background == (benchmark.classes[0] == 'background')
    assert bool(benchmark.published) == (benchmark.num_classes < 256)
    assert len(set(map(str.lower, benchmark.classes))) == benchmark.num_classes


def test_prompts_leave_out_the_background_and_use_the_spelling_asked_for():
  voc = benchmarks.find_benchmark('voc21')
  names = lambda benchmark, name: [prompt for (prompt,) in find_names(benchmark, name).prompts]
  assert len(names(voc, 'groupvit')) == 20 and 'background' not in names(voc, 'groupvit')
  assert 'plant' in names(voc, 'groupvit')
  assert 'pottedplant' in names(voc, 'benchmark')
  city = benchmarks.find_benchmark('cityscapes')
  assert names(city, 'groupvit') == names(city, 'benchmark') == list(city.classes)


@pytest.mark.parametrize('name', SIZES)
def test_bundled_names_fit_their_benchmarks(name):
  benchmark = benchmarks.find_benchmark(name)
  for each in bundled_sets():
    names = find_names(benchmark, each)
    assert len(names.classes) == benchmark.num_classes - benchmark.background
    if each == 'synonyms':
      assert bool(names.background) == benchmark.background
      assert any(len(found.synonyms) > 1 for found in names.classes)


def test_names_of_files_and_folders(tmp_path):
  mine = benchmarks.make_benchmark('mine', ['background', 'cat', 'dog'], background=True)
  (tmp_path / 'mine.txt').write_text('# mine\nbackground|sky|grass\n\ncat | kitten\ndog\n')
  for path in (tmp_path, tmp_path / 'mine.txt'):
    names = find_names(mine, str(path))
    assert names.prompts == (('cat', 'kitten'), ('dog',), ('sky',), ('grass',))
    assert names.to_json()['background_phrases'] == ['sky', 'grass']
    assert names.to_json()['class_names'] == ['cat|kitten', 'dog']
  for text, message in (
    ('background\ncat\n', 'mine.txt names 2 classes; mine has 3: one a line, the background first'),
    ('background|cat\ncat\ndog\n', "mine.txt: the class 'cat' is named twice"),
  ):
    (tmp_path / 'mine.txt').write_text(text)
    with pytest.raises(ValueError, match=message):
      find_names(mine, str(tmp_path))
  with pytest.raises(ValueError, match="'synonyms': there is no text file .*mine.txt; choose benchmark, groupvit, syn"):
    find_names(mine, 'synonyms')
  (tmp_path / 'mine.txt').write_bytes(b'background\ncat\n\xff\n')
  for name in (str(tmp_path), 'x' * 5000, 'a\0b'):
    with pytest.raises(ValueError, match='there is no text file'):
      find_names(mine, name)


def test_thresholds_are_those_of_benchmark_and_protocol():
  fix = lambda name, protocol: benchmarks.find_benchmark(name).fix_threshold(protocol).threshold
  thresholds = {name: fix(name, protocols.GROUPVIT) for name in SIZES}
  assert {k: v for k, v in thresholds.items() if v is not None} == {
    'voc21': 0.95,
    'context60': 0.35,
    'coco_object': 0.95,
  }
  assert fix('voc21', protocols.TCL) == 0.5
  assert fix('ade20k', protocols.TCL) is None
  assert fix('voc21', protocols.override(protocols.GROUPVIT, {'threshold': 0.8})) == 0.8
  changed = lambda name, value: (
    benchmarks.find_benchmark(name)
    .fix_threshold(protocols.override(protocols.GROUPVIT, {'threshold': value, 'stride': 448}))
    .changed
  )
  assert changed('voc21', None) == changed('voc21', 0.95) == ('stride',)  # its own
  assert changed('voc21', 0.8) == ('stride', 'threshold') and changed('ade20k', 0.8) == ('stride',)
  mine = benchmarks.make_benchmark('mine', ['background', 'cat'], background=True)
  with pytest.raises(ValueError, match="mine has a background .* 'groupvit'; set protocol.threshold"):
    mine.fix_threshold(protocols.GROUPVIT)


def test_how_many_pictures_figures_are_about():
  for benchmark in benchmarks.load_benchmarks().values():
    assert benchmark.num_images >= 500 and f'({benchmark.num_images} images' in benchmark.split


def test_published_figures():
  rows = {
    (row.protocol, name, row.training_data): row.scores[name]
    for name, benchmark in benchmarks.load_benchmarks().items()
    for row in benchmark.published
    if row.model.startswith('GroupViT')
  }
  assert rows['groupvit', 'voc21', 'gcc_yfcc'] == 52.3
  assert rows['groupvit', 'coco_object', 'gcc_redcaps'] == 27.5
  assert rows['tcl', 'ade20k', 'gcc_redcaps'] == 9.2
  assert len(rows) == 12
  assert {protocol for protocol, _, _ in rows} <= set(protocols.PROTOCOLS)


@pytest.mark.parametrize(
  'name, raw, labels',
  [
    ('voc21', [0, 20, 255], [0, 20, 255]),
    ('voc20', [0, 1, 20, 255], [255, 0, 19, 255]),
    ('ade20k', [0, 1, 150, 255], [255, 0, 149, 255]),
    ('cityscapes', [0, 7, 8, 33, 255], [255, 0, 1, 18, 255]),  # 7 is road, 33 bicycle
    # Raw COCO ids have gaps (11, street sign, is not annotated); stuff is background, so is 255.
    ('coco_object', [0, 10, 12, 89, 91, 255], [1, 11, 12, 80, 0, 0]),
    ('coco_stuff', [0, 10, 11, 12, 181, 255], [0, 10, 255, 11, 170, 255]),
    ('context459', [0, 1, 255, 256, 459, 65535], [65535, 0, 254, 255, 458, 65535]),
    ('ade20k_847', [0, 14, 255, 2978, 65535], [65535, 94, 65535, 0, 65535]),
  ],
)
def test_label_encodings(name, raw, labels):
  dtype = np.min_scalar_type(max(raw))
  got = benchmarks.find_benchmark(name).train_labels(np.array([raw], dtype))
  assert got.dtype == dtype and got.tolist() == [labels]


def test_own_classes():
  mine = benchmarks.make_benchmark('mine', ('cat', 'dog', 'sky'))
  assert mine.palette == class_palette(('cat', 'dog', 'sky')) and not mine.background
  with_background = benchmarks.make_benchmark('mine', ('background', *mine.classes), background=True)
  assert with_background.palette == ((0, 0, 0), *mine.palette)


@pytest.mark.parametrize(
  'classes, background, message',
  [
    ([], False, 'mine has no classes to look for'),
    (['background'], True, 'mine has no classes to look for'),
    (['cat', 'dog', 'cat'], False, "names the class 'cat' twice"),
    (['cat', ' '], False, 'class 1 of mine has an empty name'),
    (range(65536), False, 'at most 65535'),
  ],
)
def test_bad_classes_are_refused(classes, background, message):
  with pytest.raises(ValueError, match=message):
    benchmarks.make_benchmark('mine', classes, background=background)
