"""Benchmarks along a training run, and the checkpoint that scored best."""

import json
import math
import shutil

import jax
import ml_collections
import numpy as np
from PIL import Image, ImageOps
import pytest

from groupvit_jax.commands import score, segment
from groupvit_jax.commands.animate import animate
from groupvit_jax.commands.score import Request
from groupvit_jax.errors import UserError
from groupvit_jax.eval import evaluator, labeller, window_encoder
from groupvit_jax.train import evals, loop, restored_run
from groupvit_jax.train.checkpoint import BEST_FOLDER, BestCheckpoint
from groupvit_jax.train.log import RunLog
from groupvit_jax.train.state import TrainState
from tests import official_layouts as layouts
from tests.board import read_board
from tests.runs import read_log
from tests.tiny import tiny_config
from tests.trained import on_devices

CHANGES = dict(short_side=32, max_long_side=128, window=32, stride=16, threshold=0.3)


def entry(folder, **changes):
  described = dict(
    benchmark='folder', data_dir=str(folder), every_steps=2, num_pictures=0, protocol='groupvit', changes=CHANGES
  )
  return ml_collections.ConfigDict(described | changes)


pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run that is scored on a folder after steps 2, 4 and 6, and on one with a bad label map; compilations there were
  after each time, and what was said."""
  folder, bad, workdir = (tmp_path_factory.mktemp(name) for name in ('mine', 'bad', 'run'))
  layouts.folder(folder), layouts.folder(bad)
  layouts.save_indices(bad / 'labels' / 'b.png', np.full(layouts.SIZES[1], 7, np.uint8))
  config = tiny_config()
  config.eval.every_steps, config.eval.panel_steps = 100, (0, 1)
  config.benchmarks.mine, config.benchmarks.off = entry(folder), entry('/nowhere', every_steps=0)
  config.benchmarks.bad = entry(bad, every_steps=3)
  config.checkpoint.best = 'eval/mine/pixel_accuracy'
  compiled, said, evaluate = [], [], evaluator.Evaluator.evaluate

  def count(self, variables, **options):
    result = evaluate(self, variables, **options)
    compiled.append((window_encoder.encode_windows._cache_size(), labeller.count_pixels._cache_size()))
    return result

  with on_devices(1), pytest.MonkeyPatch.context() as patch:
    patch.setattr(evaluator.Evaluator, 'evaluate', count)
    patch.setattr(RunLog, 'message', lambda self, line: said.append(line))
    assert loop.train(config, workdir) == 0
  return workdir, folder, compiled, said


def test_figures_after_the_steps_asked_for(run):
  workdir, _, compiled, _ = run
  lines = read_log(workdir)
  scored = {line['step']: line['eval/mine/pixel_accuracy'] for line in lines if 'eval/mine/miou' in line}
  assert sorted(scored) == [2, 4, 6] and not any('off' in key for line in lines for key in line)
  # Three folder evaluations, and that of the scenes at the end, which has other classes.
  assert compiled[0] == compiled[1], 'a second evaluation compiled again'
  best = json.loads((workdir / 'best.json').read_text())
  line = next(line for line in lines if line['step'] == best['step'] and 'eval/mine/miou' in line)
  assert best == {
    'metric': 'eval/mine/pixel_accuracy',
    'value': max(scored.values()),
    'step': min(step for step, value in scored.items() if value == max(scored.values())),
    'settings': line['eval/mine/settings'],
  }
  assert [path.name for path in (workdir / 'best').iterdir()] == [str(best['step'])]
  settings = best['settings']
  assert settings['num_images'] == 3 and settings['num_images_published'] is None
  assert settings['protocol'] | CHANGES == settings['protocol'] and settings['protocol']['changed'] == list(CHANGES)
  assert settings['provenance'] == provenance(workdir, best['step'])


def provenance(workdir, step):
  return {
    'workdir': str(workdir),
    'step': str(step),
    'weights': 'trained',
    'code': restored_run.code_version(),
    'precision': 'float32, matmul precision default on cpu',
  }


def test_figures_on_the_board_name_what_they_depend_on(run):
  workdir = run[0]
  board = read_board(workdir / 'tensorboard')
  for name, value in {'mine': 'groupvit', 'validation': 'native'}.items():
    step, text = board[f'eval/{name}/settings/text_summary']
    settings = json.loads(text.removeprefix('<pre>').removesuffix('</pre>'))
    assert step == 6 and settings['protocol']['name'] == value and settings['protocol']['stride'] == 16
    assert settings['provenance'] == provenance(workdir, 6)
    assert settings['miou'] == pytest.approx(board[f'eval/{name}/miou'][1])


def test_panels_stay_in_the_workdir_and_can_be_animated(run, tmp_path):
  workdir, _, _, _ = run
  panels = workdir / 'panels' / 'eval'
  assert {folder.name: sorted(int(path.stem) for path in folder.iterdir()) for folder in panels.iterdir()} == {
    'validation': [0, 1, 6],
    'mine': [2, 4, 6],
  }
  drawn = read_board(workdir / 'tensorboard')['eval/validation'][1]
  np.testing.assert_array_equal(np.asarray(Image.open(panels / 'validation' / '00000006.png')), drawn)
  taller = ImageOps.expand(Image.open(panels / 'validation' / '00000001.png'), (0, 0, 0, 30))  # a longer legend
  taller.save(panels / 'validation' / '00000001.png')
  options = dict(width=200, frame_ms=50)
  said = animate(workdir, str(tmp_path / 'film.webp'), name='validation', **options)
  assert '3 panels from step 0 to 6' in said
  with Image.open(tmp_path / 'film.webp') as film:
    assert (film.n_frames, film.width) == (3, 200)
  for name, file, expected in (
    ('mien', 'film.gif', 'panels of mine, validation'),
    ('mine', 'film.mp4', '.webp or .gif'),
  ):
    with pytest.raises(UserError, match=expected):
      animate(workdir, str(tmp_path / file), name=name, **options)
  with pytest.raises(UserError, match='there is no workdir'):
    animate(tmp_path / 'nowhere', str(tmp_path / 'film.gif'), name='mine', **options)
  panel = panels / 'mine' / '00000004.png'
  panel.write_bytes(panel.read_bytes()[:2000])
  with pytest.raises(UserError, match=r'00000004\.png is damaged'):
    animate(workdir, str(tmp_path / 'film.gif'), name='mine', **options)


def test_the_best_checkpoint_scores_what_the_run_said(run, tmp_path):
  workdir, folder, *_ = run
  best = json.loads((workdir / 'best.json').read_text())
  request = Request(
    'folder',
    str(folder),
    protocol='groupvit',
    output=str(tmp_path),
    checkpoint='best',
    changes={key: str(value) for key, value in CHANGES.items()},
  )
  assert score.evaluate_benchmark(str(workdir), request) == 0
  report = json.loads((tmp_path / 'results.json').read_text())
  assert report['pixel_accuracy'] == pytest.approx(best['value'], abs=1e-6)
  assert report['checkpoint']['step'] == best['step']
  assert {key: report[key] for key in best['settings']} == best['settings']  # it is named as in training
  options = dict(protocol='native', changes={}, overwrite=False, checkpoint='best', output=str(tmp_path / 'mine'))
  assert segment.segment_images(str(workdir), images=f'{folder}/images/a.jpg', classes='dog,grass', **options) == 0
  assert json.loads((tmp_path / 'mine' / 'results.json').read_text())['checkpoint']['step'] == best['step']


def test_only_what_is_better_than_ever_is_kept(run, tmp_path):
  state = train_state_of(run[0])
  config = tiny_config()
  best = BestCheckpoint(tmp_path, 'eval/a/miou')
  at = lambda step: state.replace(step=np.int32(step))
  assert best.offer({'eval/a/miou': 0.5}, at(1), config, {})
  assert not best.offer({'eval/a/miou': 0.5}, at(2), config, {})
  assert not best.offer({'eval/a/miou': math.nan}, at(3), config, {})
  assert not best.offer({'eval/b/miou': 0.9}, at(4), config, {})
  best.close()
  again = BestCheckpoint(tmp_path, 'eval/a/miou')
  assert (again.value, again.step) == (0.5, 1)
  assert again.offer({'eval/a/miou': 0.6}, at(5), config, {})
  assert [path.name for path in (tmp_path / BEST_FOLDER).iterdir()] == ['5']
  with pytest.raises(ValueError, match='eval/a/miou. is not measured; there are eval/a/top1'):
    again.offer({'eval/a/top1': 0.6}, at(6), config, {})
  again.close()
  assert BestCheckpoint(tmp_path, 'eval/a/top1').step == 0  # another figure starts anew
  with pytest.raises(ValueError, match='kept no best checkpoint'):
    restored_run.restore(shutil.copytree(run[0], tmp_path / 'copy', ignore=lambda *_: ['best']), 'best')


def train_state_of(workdir):
  """A state with the run's variables and no optimiser, whole on one device."""
  variables = jax.tree.map(np.asarray, restored_run.restore(workdir).variables)
  return TrainState.start(variables, (), jax.random.key(0))


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(benchmark='voc'), "benchmarks.mine: there is no benchmark 'voc'"),
    (dict(protocol='x'), "benchmarks.mine: there is no protocol 'x'"),
    (dict(benchmark='imagenet', protocol='', changes={}), 'benchmarks.mine: .*holds no .*imagenet2012'),
    (dict(benchmark='imagenet', changes={}), 'benchmarks.mine: imagenet has neither label maps nor windows'),
    (dict(benchmark='imagenet', protocol=''), 'benchmarks.mine: imagenet has neither label maps nor windows'),
  ],
)
def test_a_mistake_shows_before_the_first_step(changes, message, tmp_path):
  layouts.folder(tmp_path)
  with pytest.raises(ValueError, match=message):
    evals.open_benchmarks(ml_collections.ConfigDict(dict(mine=entry(tmp_path, **changes))), (32, 32), 8)


def test_the_best_of_what_is_not_measured(tmp_path):
  layouts.folder(tmp_path)
  benchmarks = evals.open_benchmarks(ml_collections.ConfigDict(dict(mine=entry(tmp_path))), (32, 32), 8)
  evals.check_best('eval/mine/miou', benchmarks, ())
  evals.check_best('eval/validation/oracle_miou', benchmarks, ('validation',))
  evals.check_best('', (), ())
  for metric in ('eval/voc21/miou', 'eval/mine/mIoU', 'eval/mine/top1', 'mine/miou', 'eval/mine'):
    with pytest.raises(ValueError, match='of no evaluation; there are eval/mine/{miou,.*}, eval/validation/{miou,'):
      evals.check_best(metric, benchmarks, ('validation',))


def test_a_bad_label_map_costs_its_evaluation_and_not_the_run(run):
  workdir, *_, said = run
  said = [line for line in said if 'left out' in line]
  assert [line.split(':')[0] for line in said] == [f'bad after step {n} left out' for n in (3, 6)]
  assert "label map of 'b' holds 7" in said[0]
  assert '"eval/bad/' not in (workdir / 'metrics.jsonl').read_text()
