"""eval.py: scores of held-out scenes, anyone's pictures, and one line for every mistake."""

import dataclasses
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import optax
from PIL import Image
import pytest

import groupvit_jax
from groupvit_jax import cli
from groupvit_jax.commands import score, segment
from groupvit_jax.commands.score import Request
from groupvit_jax.eval import protocols
from groupvit_jax.eval.evaluator import build_scene_evaluator
from groupvit_jax.train import restored_run, state
from tests.runs import run_command
from tests.tiny import tiny_config
from tests.trained import trained_workdir


def scenes(workdir=None, output=None, overwrite=False, protocol='', **changes):
  request = Request('scenes', protocol=protocol, changes=changes, output=output and str(output), overwrite=overwrite)
  return score.evaluate_benchmark(str(workdir or trained_workdir()), request)


def label(images, output, classes='dog|puppy,grass', workdir=None, overwrite=False, **changes):
  return segment.segment_images(
    str(workdir or trained_workdir()),
    images=str(images),
    classes=classes,
    output=str(output),
    overwrite=overwrite,
    protocol='native',
    changes=changes,
  )


@pytest.fixture(scope='module')
def evaluated(tmp_path_factory) -> pathlib.Path:
  """Results of the held-out scenes."""
  folder = tmp_path_factory.mktemp('evaluated') / 'new' / 'eval'
  assert scenes(output=folder) == 0
  return folder


def test_scores_name_everything_they_depend_on(evaluated):
  report = json.loads((evaluated / 'results.json').read_text())
  assert report['complete'] and report['split'] == 'test' and report['num_images'] == 8
  protocol = report['protocol']
  assert (protocol['name'], protocol['short_side'], protocol['window'], protocol['stride']) == ('shifted', 36, 32, 4)
  assert protocol['changed'] == [] and protocol['threshold'] is None
  assert report['checkpoint'] == {'step': 6, 'damaged_newer_steps': []}
  assert re.fullmatch('[0-9a-f]{12}(-dirty)?|' + groupvit_jax.__version__, report['provenance']['code'])
  assert report['config'] == json.loads(tiny_config().to_json())
  assert report['templates'] == ['a photo of a {}.']
  classes = [*tiny_config().data.scenes.things, *tiny_config().data.scenes.stuff]
  assert report['class_names'] == classes and list(report['iou']) == classes
  iou = [value for value in report['iou'].values() if value is not None]
  assert report['miou'] == pytest.approx(np.mean(iou))
  assert report['oracle_miou'] > report['miou']


def test_baselines_of_the_same_run(evaluated):
  baselines = json.loads((evaluated / 'results.json').read_text())['baselines']
  run = restored_run.restore(trained_workdir())
  evaluator = build_scene_evaluator(run.config, run.model, run.tokenizer, run.mesh, split='test')
  shifted = protocols.shifted_protocol(run.model.vision.image_size, run.model.vision.patch_size)
  evaluator = dataclasses.replace(evaluator, protocol=shifted)
  truth = np.concatenate([evaluator.source[i]['label'].ravel() for i in range(8)])
  shares = np.bincount(truth, minlength=18) / truth.size
  assert baselines['constant']['class'] == evaluator.source.classes[shares.argmax()]
  assert baselines['constant']['pixel_accuracy'] == pytest.approx(shares.max())
  untrained = restored_run.untrained_variables(run)
  fresh = evaluator.evaluate(untrained)
  assert baselines['untrained']['miou'] == pytest.approx(fresh.scores.miou)
  assert baselines['untrained']['oracle_miou'] == pytest.approx(fresh.oracle.miou)
  # Where the run started: whatever the optimiser and the number of prompts.
  shape = 2, run.model.text.context_length
  start = state.init_state(run.model, optax.adam(1.0), run.config.seed, shape, run.mesh)
  for got, want in zip(jax.tree.leaves(untrained), jax.tree.leaves(start.variables), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_table_and_contact_sheet(evaluated):
  table = (evaluated / 'table.txt').read_text()
  report = json.loads((evaluated / 'results.json').read_text())
  for line in (f'mIoU            {100 * report["miou"]:6.1f}', 'the untrained model: mIoU', 'step 6'):
    assert line in table, line
  sheet = np.asarray(Image.open(evaluated / 'scenes.png'))
  assert sheet.shape[1] == 6 + 4 * 262 and sheet.shape[0] > 6 * 262  # six scenes, four tiles each


def test_the_same_again_replaces_its_own_results(evaluated, capsys):
  # Someone may commit while this runs.
  read = lambda: re.sub('"code": .*', '', (evaluated / 'results.json').read_text())
  before = read()
  (evaluated / 'notes.txt').write_text('mine')
  (evaluated / 'masks').mkdir()
  for stale in ('thresholds.png', 'masks/a.png'):  # as an evaluation with other flags leaves them
    (evaluated / stale).write_text('old')
  assert scenes(output=evaluated) == 0
  assert not (evaluated / 'thresholds.png').exists() and not list((evaluated / 'masks').iterdir())
  assert len(list((evaluated / 'tensorboard').iterdir())) == 1
  assert 'earlier results are replaced' in capsys.readouterr().err
  assert read() == before  # to the bit
  assert (evaluated / 'notes.txt').read_text() == 'mine'


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> pathlib.Path:
  """Odd ones, two of one name, and one that is none."""
  folder = tmp_path_factory.mktemp('pictures')
  rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(rgb).save(folder / 'a.png')
  Image.fromarray(rgb).save(folder / 'a.jpg', exif=exif)
  Image.fromarray(rgb[:, :, 0]).save(folder / 'grey[1].png')
  Image.fromarray((rgb[:30, :, 0] * 257.0).astype(np.uint16)).save(folder / 'deep.png')
  Image.fromarray(np.dstack([rgb, rgb[:, :, 0]])).save(folder / 'alpha.png')
  Image.fromarray(rgb).convert('P').save(folder / 'palette.gif')
  (folder / 'broken.png').write_bytes((folder / 'a.png').read_bytes()[:200])
  return folder


@pytest.fixture(scope='module')
def labelled(pictures, tmp_path_factory) -> pathlib.Path:
  """What eval.py makes of them, through the front door."""
  output = tmp_path_factory.mktemp('labelled') / 'out'
  flags = f'--images={pictures}/*', '--classes=dog|puppy, grass', f'--output={output}', '--protocol.threshold=0.5'
  done = run_command('eval.py', f'--workdir={trained_workdir()}', *flags)
  assert done.returncode == cli.EXIT_PARTIAL, done.stderr
  assert [line for line in done.stderr.splitlines() if 'broken.png' in line] == [
    line for line in done.stderr.splitlines() if line.startswith('not done: ')
  ]
  assert '6 of 7 images' in done.stdout
  return output


def test_every_picture_has_its_files(labelled, pictures):
  report = json.loads((labelled / 'results.json').read_text())
  files = {pathlib.Path(row['picture']).name: row['files'] for row in report['pictures']}
  assert files == {'a.jpg': 'a', 'a.png': 'a_2', 'alpha.png': 'alpha', 'deep.png': 'deep',
                   'grey[1].png': 'grey[1]', 'palette.gif': 'palette'}  # fmt: skip
  assert report['failures'][0]['picture'] == str(pictures / 'broken.png')
  assert report['words'] == ['dog|puppy', 'grass'] and report['protocol']['threshold'] == 0.5
  kinds = ('mask.png', 'overlay.png', 'first_groups.png', 'final_groups.png', 'json')
  expected = {f'{name}.{kind}' for name in files.values() for kind in kinds}
  assert {path.name for path in labelled.iterdir()} == expected | {'classes.json', 'results.json'}


def test_masks_are_indexed_with_the_class_tables_colours(labelled):
  table = json.loads((labelled / 'classes.json').read_text())
  assert [row['name'] for row in table] == ['background', 'dog', 'grass']
  sizes = {'a': (40, 50), 'a_2': (50, 40), 'grey[1]': (50, 40), 'deep': (50, 30)}
  for name, size in sizes.items():
    mask = Image.open(labelled / f'{name}.mask.png')
    assert mask.mode == 'P' and mask.size == size, name  # a.jpg was turned by its EXIF
    labels = np.asarray(mask)
    report = json.loads((labelled / f'{name}.json').read_text())
    pixels = {row['label']: row['pixels'] for row in report['classes']}
    assert pixels == {label: int((labels == label).sum()) for label in range(3)}
    colours = mask.convert('RGB')
    for label, row in enumerate(table):
      assert row['label'] == label
      for y, x in np.argwhere(labels == label)[:1]:
        assert '#{:02x}{:02x}{:02x}'.format(*colours.getpixel((int(x), int(y)))) == row['colour']
    assert Image.open(labelled / f'{name}.overlay.png').size == (size[0] * (factor := 8), size[1] * factor)


def damage(workdir: pathlib.Path, step: int) -> None:
  """Cuts every file of a checkpoint's arrays in two."""
  for path in (workdir / 'checkpoints' / str(step) / 'state').rglob('*'):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, capsys):
  workdir = tmp_path / 'run'
  shutil.copytree(trained_workdir(), workdir)
  damage(workdir, 6)
  assert scenes(workdir, output=tmp_path / 'out') == 0
  report = json.loads((tmp_path / 'out' / 'results.json').read_text())
  assert report['checkpoint'] == {'step': 4, 'damaged_newer_steps': [6]}
  assert 'step 4, weights trained, code' in (out := capsys.readouterr().out) and '6 is newer but damaged' in out
  damage(workdir, 4)
  with pytest.raises(ValueError, match=r'none of the checkpoints \[4, 6\]'):
    scenes(workdir, output=tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_workdirs_without_a_run_a_checkpoint_or_an_entry(tmp_path):
  output = tmp_path / 'out'
  with pytest.raises(ValueError, match='there is no workdir .*nowhere'):
    scenes(tmp_path / 'nowhere', output=output)
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ValueError, match='holds no run'):
    scenes(tmp_path / 'empty', output=output)
  workdir = tmp_path / 'run'
  shutil.copytree(trained_workdir(), workdir)
  config = json.loads((workdir / 'config.json').read_text())
  del config['data']['scenes']['things']
  (workdir / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match="has no entry 'things': the run was made by another version"):
    scenes(workdir, output=output)
  shutil.rmtree(workdir / 'checkpoints')
  with pytest.raises(ValueError, match='has no checkpoint yet'):
    scenes(workdir, output=output)
  assert not output.exists()


@pytest.mark.parametrize(
  'request_, message',
  [
    (dict(classes=''), 'there are no classes to look for'),
    (dict(classes='dog,,cat'), "the class '' has an empty name"),
    (dict(classes='dog,grass,dog'), "the class 'dog' is named twice"),
    (dict(classes='background,dog', threshold='0.5'), "the class 'background' is named twice"),
    (dict(classes=','.join(f'word{i}' for i in range(256))), '256 classes'),
    (dict(images='*.nothing'), r'no image matches --images=.*\*\.nothing'),
    (dict(images=''), r'no image matches .* for a folder write .*/\*'),
    (dict(stride='64'), 'protocol.stride=64 leaves gaps'),
    (dict(threshold='2'), 'protocol.threshold=2'),
    (dict(window='wide'), "protocol.window='wide'"),
  ],
)
def test_mistakes_write_nothing(request_, message, pictures, tmp_path):
  images = pictures / request_.pop('images', 'a.png')
  with pytest.raises(ValueError, match=message) as caught:
    label(images, tmp_path / 'out', **request_)
  assert '\n' not in str(caught.value) and not (tmp_path / 'out').exists()


def test_folders_of_others_are_left_alone(pictures, tmp_path):
  before = {path.name: path.read_bytes() for path in pictures.iterdir()}
  with pytest.raises(ValueError, match='holds files that are not results of eval.py'):
    label(pictures / 'a.png', pictures)
  assert {path.name: path.read_bytes() for path in pictures.iterdir()} == before
  with pytest.raises(ValueError, match='is a file; name a folder'):
    label(pictures / 'a.png', pictures / 'a.png')
  (tmp_path / 'results.json').write_text('{"made_by": "someone else"}')
  with pytest.raises(ValueError, match='add --overwrite'):
    scenes(output=tmp_path)
  assert label(pictures / 'grey[1].png', tmp_path, overwrite=True) == 0
  assert (tmp_path / 'grey[1].mask.png').exists()


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--checkpoint=best', '--images=docs/demo.png', '--classes=dog', '--output=out'], 'kept no best checkpoint'),
    (['--images=docs/demo.png', '--output=out', '--thresholds=0.5'], '--thresholds is about a benchmark, not about'),
    (['--data_dir=data'], '--data_dir=data holds benchmarks; name one with --benchmark'),
  ],
)
def test_flags_reach_what_they_are_about(flags, message):
  done = run_command('eval.py', f'--workdir={trained_workdir()}', *flags)
  assert done.returncode == cli.EXIT_USAGE and not done.stdout and done.stderr.count('\n') == 1
  assert done.stderr.startswith('error: ') and message in done.stderr, done.stderr


def test_awkward_names_and_images_that_cannot_be_read(tmp_path):
  """Each is written or listed; none overwrites other files."""
  folder, bad = tmp_path / 'images', tmp_path / 'bad'
  folder.mkdir(), bad.mkdir()
  for name in ('classes', 'results', 'x' * 244, 'é' * 120):
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / f'{name}.png')
  with open(os.fsencode(folder) + b'/caf\xe9.png', 'wb') as file:
    file.write((folder / 'classes.png').read_bytes())
  (bad / 'a.png').write_bytes(b'no image')
  reports = []
  for images in (folder, bad):
    assert label(f'{images}/*', tmp_path / f'{images.name}-out') == cli.EXIT_PARTIAL
    reports.append(json.loads((tmp_path / f'{images.name}-out' / 'results.json').read_text()))
    assert reports[-1]['complete'] and len(reports[-1]['failures']) == 1
  files = {row['files'] for row in reports[0]['pictures']}
  assert len(files) == 4 and files == {'classes_2', 'results_2', 'x' * 200, 'é' * 100}
  assert reports[0]['failures'][0]['reason'] == f'the name of image {folder}/caf\\xe9.png is not UTF-8; rename it'
  assert json.loads((tmp_path / 'images-out' / 'classes.json').read_text())[0]['name'] == 'dog'
  assert not reports[1]['pictures'] and 'a.png' in reports[1]['failures'][0]['reason']


def test_masks_of_different_images_have_different_names():
  keys = ('a/b', 'a_b', 'a%2Fb', 'a%b', 'a//b')
  assert len({score.mask_name(key) for key in keys}) == len(keys) and '/' not in score.mask_name('a/b')
