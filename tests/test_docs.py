"""The commands of the documentation; `make docs-check` runs the others."""

import importlib.util
import json
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')])


def load_check():
  spec = importlib.util.spec_from_file_location('docs_check', ROOT / 'docs' / 'check.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


check = load_check()


def test_the_released_weights_and_a_photograph(tmp_path):
  """The README's three commands, but for the installation, on random weights of the same layout."""
  block, = (text for text in re.findall(r'```sh run\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
            if 'import_weights' in text)
  commands = [line for line in block.replace('\\\n', ' ').splitlines() if line]
  assert len(commands) == 2  # after `pip install`
  check.prepare(tmp_path)
  check.write_stand_in(tmp_path / 'groupvit-gcc-yfcc')
  done = check.run(block, tmp_path)
  assert done.returncode == 0, done.stderr
  assert {path.name for path in (tmp_path / 'out').iterdir()} >= {'photo.mask.png', 'photo.overlay.png', 'photo.json'}
  names = {row['name'] for row in json.loads((tmp_path / 'out' / 'photo.json').read_text())['classes']}
  assert names == {'dog', 'cat', 'grass'}


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_points_at_is_there(document):
  """Links, and the modules and configs of its commands."""
  text = document.read_text()
  for target in re.findall(r'\]\((?!https?:|#)([^)#]+)', text):
    assert (document.parent / target).exists(), target
  for module in re.findall(r'python -m (groupvit_jax[\w.]*)', text):
    assert importlib.util.find_spec(module), module
  for config in re.findall(r'--config=(configs/\w+\.py)', text):
    assert (ROOT / config).exists() or 'EXPERIMENT' in config, config


def test_marked_blocks_are_found():
  assert check.marked_blocks('a\n```sh run\none\ntwo\n```\n```sh\nthree\n```\n```sh run\nfour\n```\n') == [
      'one\ntwo\n', 'four\n']
  assert check.run('exit 3', ROOT).returncode == 3
  assert str(pathlib.Path(sys.executable).parent) in check.run('echo $PATH', ROOT).stdout
