"""What a run imports: neither TensorFlow nor torch, also where they are installed, and JAX only when it is used."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# Prepares data sets, trains with a worker process, scores, segments and predicts.
PROGRAM = """
import pathlib
import sys

import groupvit_jax
from groupvit_jax.data import prompts

if __name__ == '__main__':  # workers import this file
  prompts.nouns('a dog')
  assert not {'jax', 'nltk', 'scipy', 'sklearn', 'textblob'} & set(sys.modules)
  import cv2
  import numpy as np
  threads = cv2.getNumThreads()
  from groupvit_jax.commands import score, segment
  from groupvit_jax.eval import labelled
  from groupvit_jax.prepare import __main__ as prepare
  from groupvit_jax.train import loop
  from tests import official_layouts
  from tests.tars import data_config, write_set
  from tests.tiny import tiny_config
  assert cv2.getNumThreads() == threads  # else evaluation would depend on what is imported

  folder = pathlib.Path(sys.argv[1])
  write_set(folder / 'tars', 16), official_layouts.ade20k(folder / 'ade'), official_layouts.folder(folder / 'mine')
  for name, source in (('cc3m', 'tars'), ('ade20k', 'ade')):
    assert prepare.main([name, f'--manual_dir={folder / source}', f'--data_dir={folder / "tfds"}']) == 0
  labelled.open_benchmark('ade20k', folder / 'tfds')
  pairs = dict(format='tfds', split='train', image='image', caption='caption', weight=0.0, expected=16)
  config = tiny_config()
  config.total_steps, config.optim.warmup_steps, config.eval.every_steps = 1, 0, 0
  with config.unlocked():
    config.data.update(data_config(pairs=pairs | dict(path=f'{folder}/tfds/cc3m/1.0.0')), num_workers=1)
    config.data.augment.erase = 0.0
  run = f'{folder}/run'
  assert loop.train(config, run) == 0
  request = score.Request('folder', f'{folder}/mine', protocol='native', changes=dict(threshold='0.3'))
  assert score.evaluate_benchmark(run, request) == 0
  options = dict(classes='dog,grass', protocol='native', changes={}, overwrite=False)
  assert segment.segment_images(run, images=f'{folder}/mine/images/a.jpg', output=f'{folder}/out', **options) == 0
  groupvit_jax.Predictor.from_pretrained(run)(np.zeros((32, 32, 3), np.uint8), ['dog', 'grass']).overlay()
"""


def test_nothing_imports_tensorflow_or_torch(tmp_path):
  """Nor a process that it starts, not even where the import fails for it."""
  noted = tmp_path / 'imported'
  for name in ('tensorflow', 'torch'):
    (tmp_path / 'packages' / name).mkdir(parents=True)
    (tmp_path / 'packages' / name / '__init__.py').write_text(
      f'import traceback\nopen({str(noted)!r}, "a").write("".join(traceback.format_stack()))\n'
      f'raise ImportError("{name} is not for run time")\n'
    )
  (tmp_path / 'program.py').write_text(PROGRAM)
  path = os.pathsep.join([str(tmp_path / 'packages'), str(ROOT)])
  environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': path, 'XDG_CACHE_HOME': str(tmp_path)}
  command = [sys.executable, tmp_path / 'program.py', tmp_path]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
  assert done.returncode == 0, done.stderr
  assert not noted.exists(), noted.read_text()
