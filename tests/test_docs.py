"""The commands of the documentation; `make docs-check` runs the others."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import sys

from flax import traverse_util
import pytest

from configs import groupvit_vits16_gcc_yfcc, quickstart
from groupvit_jax.evals.protocols import Protocol

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


def test_everything_is_found_from_the_start():
  start = (ROOT / 'docs' / 'getting_started.md').read_text()
  assert '(docs/getting_started.md)' in (ROOT / 'README.md').read_text()
  for document in (ROOT / 'docs').glob('*.md'):
    assert document.name == 'getting_started.md' or f']({document.name})' in start, document


def source_of(command: str) -> str:
  """The code of a command, and of what defines flags for it."""
  if not command.startswith('-m '):
    return (ROOT / command).read_text() + (ROOT / 'groupvit_jax' / 'cluster.py').read_text()
  spec = importlib.util.find_spec(command.removeprefix('-m '))
  path = pathlib.Path(spec.origin)
  path = path.with_name('__main__.py') if spec.submodule_search_locations else path
  shared = ROOT / 'benchmarks' / 'speed.py' if 'benchmarks' in command else ROOT / 'groupvit_jax' / 'cli.py'
  return path.read_text() + shared.read_text()


def defines(source: str, flag: str) -> bool:
  return bool(re.search(rf"(DEFINE_\w+|add_argument)\(\s*'(--)?{flag}'", source))


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_every_flag_and_config_key_of_a_document_exists(document):
  """Also of commands that nobody runs here, because they want a pod or a data set."""
  text = document.read_text().replace('\\\n', ' ')
  for command, rest in re.findall(r'python (-m [\w.]+|\w+\.py)((?: [^\n`]*)?)', text):
    source = source_of(command)
    for flag in re.findall(r' --(\w+)', rest):
      assert defines(source, flag), (command, flag)
  modules = [*ROOT.glob('*.py'), *ROOT.glob('[!.]*/**/*.py')]
  everything = ''.join(path.read_text() for path in modules)
  for flag in re.findall(r'`--(\w+)', text):
    assert defines(everything, flag), flag
  configs = [traverse_util.flatten_dict(experiment.get_config().to_dict(), sep='.')
             for experiment in (quickstart, groupvit_vits16_gcc_yfcc)]
  fields = {field.name for field in dataclasses.fields(Protocol)}
  for key in re.findall(r'--config\.([a-z_.\d]*[a-z_\d])', text):
    assert any(key in config for config in configs), key
  assert set(re.findall(r'--protocol\.(\w+)', text)) <= fields


def test_marked_blocks_are_found():
  assert check.marked_blocks('a\n```sh run\none\ntwo\n```\n```sh\nthree\n```\n```sh run\nfour\n```\n') == [
      'one\ntwo\n', 'four\n']
  assert check.run('exit 3', ROOT).returncode == 3
  assert str(pathlib.Path(sys.executable).parent) in check.run('echo $PATH', ROOT).stdout
