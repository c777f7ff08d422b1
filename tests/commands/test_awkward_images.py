"""Images with awkward names, or none that can be read: each is written or listed, none overwrites other files."""

import json
import os

import jax
import numpy as np
from PIL import Image

from groupvit_jax import cli
from groupvit_jax.commands import score, segment
from groupvit_jax.predictor import Predictor
from groupvit_jax.running import sharding
from groupvit_jax.train import open_run
from tests.trained import trained_workdir


def run(folder, output) -> dict:
  """The exit code and the report."""
  code = segment.segment_images(
    str(trained_workdir()), images=f'{folder}/*', classes='dog,grass', output=str(output), overwrite=False,
    protocol='native', changes={},
  )  # fmt: skip
  return {'code': code} | json.loads((output / 'results.json').read_text())


def test_awkward_names_and_none_that_can_be_read(tmp_path):
  folder = tmp_path / 'images'
  folder.mkdir()
  names = ['classes.png', 'results.png', 'x' * 244 + '.png', 'é' * 120 + '.png']
  for name in names:
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / name)
  bad = os.fsencode(folder) + b'/caf\xe9.png'
  with open(bad, 'wb') as file:
    file.write((folder / 'classes.png').read_bytes())
  report = run(folder, tmp_path / 'out')
  assert report['code'] == cli.EXIT_PARTIAL and report['complete'] and len(report['pictures']) == 4
  assert [row['reason'] for row in report['failures']] == [
    f'the name of image {folder}/caf\\xe9.png is not UTF-8; rename it'
  ]
  assert {row['files'] for row in report['pictures']} >= {'classes_2', 'results_2', 'x' * 200, 'é' * 100}
  assert json.loads((tmp_path / 'out' / 'classes.json').read_text())[0]['name'] == 'dog'

  none = tmp_path / 'none'
  none.mkdir()
  (none / 'a.png').write_bytes(b'no image')
  report = run(none, tmp_path / 'empty')
  assert report['code'] == cli.EXIT_PARTIAL and report['complete'] and not report['pictures']
  assert 'a.png' in report['failures'][0]['reason']


def test_no_image_on_one_device_is_no_error():
  run, mesh = open_run.open_run(trained_workdir()), sharding.make_mesh(devices=jax.devices()[:1])
  variables = jax.device_put(jax.tree.map(np.asarray, run.variables), sharding.replicated(mesh))
  assert not list(Predictor(run.model, variables, run.tokenizer, mesh).stream(iter(()), ['dog']))


def test_masks_of_different_images_have_different_names():
  keys = ('a/b', 'a_b', 'a%2Fb', 'a%b', 'a//b')
  assert len({score.mask_name(key) for key in keys}) == len(keys) and '/' not in score.mask_name('a/b')
