"""The installed package, outside of the checkout and without torch and TensorFlow: what its commands do."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

from groupvit_jax.__main__ import COMMANDS
from tests import official_layouts
from tests.runs import ROOT, run_command

SCRIPT = """\
from groupvit_jax import Prediction, Predictor, UserError

predictor = Predictor.from_pretrained('runs/quickstart', protocol='groupvit')
try:
  one: Prediction = predictor('dog.jpg', ['dog', 'grass'], threshold=0.5)
  many: list[Prediction] = predictor(['a.png', b'bytes'], ['dog'])
except UserError as error:
  print(error)
reveal_type(one.heat_map('dog'))
predictor('a.png', ['dog'], treshold=0.5)
"""
PACKAGED = ('groupvit_jax', 'configs', 'pyproject.toml', 'requirements.txt', 'README.md', 'LICENSE', 'NOTICE')
TINY = (
  '--config.total_steps=2',
  '--config.batch_size=8',
  '--config.optim.warmup_steps=1',
  '--config.eval.every_steps=0',
  '--config.eval.panel_steps=()',
  '--config.data.scenes.num_heldout=8',
  '--config.data.num_workers=1',
  '--config.tokenizer.num_captions=500',
)
# What a command may not import before it needs it; nor may OpenCV's threads depend on what is imported.
LATE = """
import sys, cv2
threads = cv2.getNumThreads()
import groupvit_jax
from groupvit_jax.data import prompts
prompts.nouns('a dog')
assert not {'jax', 'nltk', 'scipy', 'sklearn', 'textblob'} & set(sys.modules)
from groupvit_jax.commands import score, segment
assert cv2.getNumThreads() == threads
"""


@pytest.fixture(scope='module')
def command(tmp_path_factory):
  """Runs an installed command elsewhere; returns what it printed."""
  folder, source = (tmp_path_factory.mktemp(name) for name in ('installed', 'source'))
  for path in (ROOT / name for name in PACKAGED):
    if path.is_dir():
      shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns('__pycache__'))
    else:
      shutil.copy(path, source)
  pip = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check', 'install', '--no-deps']
  subprocess.run([*pip, f'--target={folder}', str(source)], check=True)
  noted = folder / 'imported'
  for name in ('tensorflow', 'torch'):  # an attempt is noted where it is caught, too
    (folder / name).mkdir()
    note = f'import traceback\nopen({str(noted)!r}, "a").write("".join(traceback.format_stack()))\n'
    (folder / name / '__init__.py').write_text(note + f'raise ImportError("{name} is not for run time")\n')

  def run(name, *args, code=0):
    command = [folder / 'bin' / f'groupvit-{name}'] if name else ['-c']
    environment = os.environ | {'PYTHONPATH': str(folder), 'JAX_NUM_CPU_DEVICES': '1'}
    done = run_command(*command, *args, cwd=folder.parent, env=environment)
    assert done.returncode == code, done.stderr
    assert not noted.exists(), noted.read_text()
    return done.stdout + done.stderr

  return run


def test_train_evaluate_segment_export_prepare(command, tmp_path):
  command('', LATE)
  command('train', '--config=quickstart', f'--workdir={tmp_path}/run', *TINY)
  assert 'mIoU' in command('eval', f'--workdir={tmp_path}/run', '--num_pictures=2')
  official_layouts.folder(tmp_path / 'mine'), official_layouts.ade20k(tmp_path / 'ade')
  images = f'--images={tmp_path}/mine/images/a.jpg', '--classes=dog,grass', f'--output={tmp_path}/out'
  command('eval', f'--workdir={tmp_path}/run', *images)
  assert (tmp_path / 'out' / 'a.overlay.png').exists()
  command('export', f'--workdir={tmp_path}/run', '--format=safetensors', f'--output={tmp_path}/exported')
  assert (tmp_path / 'exported' / 'model.safetensors').exists()
  command('prepare', 'ade20k', f'--manual_dir={tmp_path}/ade', f'--data_dir={tmp_path}/data')
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert (config['total_steps'], config['data']['source']) == (2, 'scenes')
  assert 'error: --workdir is missing; see --help' in command('train', '--config=quickstart', code=2)
  said = command('train', '--config=quickstat', f'--workdir={tmp_path}/other', code=2)
  assert said.splitlines()[-1].startswith('error: --config=quickstat: there is no such config') and 'quickstart' in said


def test_types_reach_a_users_script(tmp_path):
  """From source: JAX and the like are not followed, which takes mypy a minute."""
  assert (ROOT / 'groupvit_jax' / 'py.typed').exists()
  (tmp_path / 'script.py').write_text(SCRIPT)
  skipped = 'jax flax orbax optax etils grain huggingface_hub matplotlib pyarrow'.split()
  section = ','.join(f'{name}.*' for name in skipped)
  (tmp_path / 'mypy.ini').write_text(f'[mypy]\n[mypy-{section}]\nfollow_imports=skip')
  environment = os.environ | {'MYPYPATH': str(ROOT)}
  done = run_command('-m', 'mypy', '--follow-imports=silent', 'script.py', cwd=tmp_path, env=environment)
  lines = done.stdout.splitlines()
  assert 'script.py:9: note: Revealed type is "numpy.ndarray' in lines[0], done
  errors = [line for line in lines if 'error: ' in line]
  assert (
    errors and all(line.startswith('script.py:10: ') for line in errors) and 'did you mean "threshold"' in errors[0]
  )


def test_help_shows_the_commands_own_flags_and_an_example():
  listed = run_command('-m', 'groupvit_jax')
  assert listed.returncode == 0 and all(f'  {name} ' in listed.stdout for name in COMMANDS), listed
  said = run_command('train.py', '--config=quickstart', '--help')
  assert said.returncode == 0 and len(said.stdout.splitlines()) < 60
  assert '--workdir:' in said.stdout and 'configs/quickstart.py' in said.stdout


def test_everything_is_packed():
  setup = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  folders = {str(path.parent.relative_to(ROOT)).replace('/', '.') for path in ROOT.glob('groupvit_jax/**/*.py')}
  assert set(setup['tool']['setuptools']['packages']) == folders | {'groupvit_jax.share.configs'}
  assert set(setup['project']['scripts']) == {f'groupvit-{name}' for name in COMMANDS}


def test_the_image_has_all_that_the_package_is_built_of():
  """No image is built here: `command` installs the package from the files that the image copies."""
  lines = (ROOT / 'Dockerfile').read_text().splitlines()
  copied = {name for line in lines if line.startswith('COPY') for name in line.split()[1:-1]}
  assert copied == set(PACKAGED) and all((ROOT / name).exists() for name in copied)
  extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
  for line in lines:
    for names in re.findall(r'EXTRAS=([\w,]+)', line):
      assert set(names.split(',')) <= set(extras), line
