"""The commands of the documentation; `make docs-check` runs the others."""

import ast
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import re
import subprocess
import sys

from flax import traverse_util
import pytest

from configs import groupvit_vits16_gcc_yfcc, own_pairs, quickstart
from groupvit_jax.eval.protocols import Protocol

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')])


def load(name: str):
  spec = importlib.util.spec_from_file_location(name, ROOT / 'docs' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


check = load('check')


def test_the_released_weights_and_a_photograph(tmp_path, torch):
  """The README's three commands, but for the installation, on random weights of the same layout."""
  before, block = next(
    pair
    for pair in itertools.pairwise(check.fenced_blocks((ROOT / 'README.md').read_text()))
    if 'import_weights' in pair[1].text
  )
  commands = [line for each in (before, block) for line in each.text.replace('\\\n', ' ').splitlines()]
  assert len(commands) == 3 and block.mark == 'run'
  check.prepare(tmp_path)
  done = check.run(block.script, tmp_path)
  assert done.returncode == 0, done.stderr
  assert re.match(
    r'runs/released: [\d,]+ parameters, imported from groupvit-gcc-yfcc \(a Hugging Face folder\)\n'
    'licence of the weights: stand-in-licence\n',
    done.stdout,
  )
  assert {path.name for path in (tmp_path / 'out').iterdir()} >= {'photo.mask.png', 'photo.overlay.png', 'photo.json'}
  names = {row['name'] for row in json.loads((tmp_path / 'out' / 'photo.json').read_text())['classes']}
  assert names == {'dog', 'cat', 'grass'}


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_points_at_is_there(document):
  """Links, tests, and the modules and configs of its commands; and a list has an empty line before it, for MkDocs."""
  text = document.read_text()
  outside = re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)
  assert not re.findall(r'^(?!- |\d+\. | |$).*\n(?:- |1\. ).*', outside, re.MULTILINE)
  for test in re.findall(r'`(tests/[\w/.]+)`', text):
    assert (ROOT / test).exists(), test
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
    package = ROOT / 'groupvit_jax'
    return (package / 'commands' / command).read_text() + (package / 'running' / 'cluster.py').read_text()
  if command == '-m benchmarks':
    return ''.join(path.read_text() for path in (ROOT / 'benchmarks').glob('*.py'))
  spec = importlib.util.find_spec(command.removeprefix('-m '))
  path = pathlib.Path(spec.origin)
  path = path.with_name('__main__.py') if spec.submodule_search_locations else path
  return path.read_text() + (ROOT / 'groupvit_jax' / 'cli.py').read_text()


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
  configs = [
    traverse_util.flatten_dict(experiment.get_config().to_dict(), sep='.')
    for experiment in (quickstart, groupvit_vits16_gcc_yfcc, own_pairs)
  ]
  fields = {field.name for field in dataclasses.fields(Protocol)}
  for key in re.findall(r'--config\.([a-z_.\d]*[a-z_\d])', text):
    assert any(key in config for config in configs), key
  assert set(re.findall(r'--protocol\.(\w+)', text)) <= fields


@pytest.mark.parametrize('document', DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_run_or_says_why_not(document):
  """`make docs-check` runs those that are marked so."""
  text = document.read_text()
  blocks = check.fenced_blocks(text)
  assert 2 * len(blocks) == len(re.findall('^```', text, re.MULTILINE))
  for block in blocks:
    if (block.language, block.mark) in (('text', ''), ('python', 'part')):
      continue  # what something prints, a part of a config
    if block.mark.startswith('tests/'):
      (ours,) = set(re.findall(r'python -m ([\w.]+)', block.text))
      assert ours in (ROOT / block.mark).read_text(), block
    else:
      assert block.language in ('sh', 'python') and block.mark in ('run', *check.REASONS), block
  outside = re.sub(r'^```.*?^```$', '', text, flags=re.MULTILINE | re.DOTALL)
  assert not re.findall(r'^ {4}.*', outside, re.MULTILINE)  # a block without a fence has no mark


def test_the_site_builds_without_a_warning(tmp_path):
  command = [sys.executable, '-m', 'mkdocs', 'build', '--strict', f'--site-dir={tmp_path}']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  pages = {path.stem for path in tmp_path.glob('*.html')}
  assert pages == {'index', '404', 'api', *(path.stem for path in (ROOT / 'docs').glob('*.md'))}
  assert (
    'from_pretrained' in (tmp_path / 'api.html').read_text()
    and '<h2 id="speed"' in (tmp_path / 'index.html').read_text()
  )


def test_parts_of_configs_are_parts_of_configs():
  """What a page says to write into an experiment fits the paper's: its entries are locked."""
  text = (ROOT / 'docs' / 'evaluation.md').read_text()
  config = groupvit_vits16_gcc_yfcc.get_config()
  exec(next(block.text for block in check.fenced_blocks(text) if block.mark == 'part'), {'config': config})
  assert config.benchmarks.voc21.every_steps == 5000 and config.checkpoint.best == 'eval/voc21/miou'


def test_a_python_that_is_too_old_is_one_line(tmp_path):
  old = tmp_path / 'python'
  old.write_text(
    f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = 3, 10, 2; exec(sys.argv[2])" "$@"\n'
  )
  old.chmod(0o755)
  done = subprocess.run(
    ['make', f'PYTHON={old}', f'VENV={tmp_path}/venv', 'quickstart'],
    cwd=ROOT,
    text=True,
    capture_output=True,
    check=False,
  )
  said = [line for line in done.stderr.splitlines() if not line.startswith('make')]
  assert done.returncode and not (tmp_path / 'venv').exists()
  assert said == [
    f'error: {old} is Python 3.10; it takes 3.11 or newer: name one, as in  make PYTHON=python3.13 quickstart'
  ]


def test_the_map_of_the_code_shows_every_room_and_module():
  rooms = load('rooms')
  table, picture = rooms.table(), rooms.picture()
  for path in (ROOT / 'groupvit_jax').rglob('*.py'):
    name = str(path.relative_to(ROOT / 'groupvit_jax')).removesuffix('__init__.py')
    assert not name or name in table, name
  assert picture.count('<circle') == sum(map(len, rooms.imports().values())) > 30
  page = rooms.page((ROOT / 'docs' / 'design.md').read_text())
  assert table in page and rooms.page(page) == page


def defined_names(path: pathlib.Path) -> set[str]:
  """Functions and classes of a module, methods as Class.method."""
  found = set()
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      found.add(node.name)
      found |= {f'{node.name}.{each.name}' for each in ast.iter_child_nodes(node) if isinstance(each, ast.FunctionDef)}
  return found


def test_every_hop_of_the_walks_exists():
  hops = re.findall(r'`([\w/]+\.py):([\w.]+)`', (ROOT / 'docs' / 'design.md').read_text())
  for file, name in hops:
    paths = [path for path in (ROOT / file, ROOT / 'groupvit_jax' / file) if path.exists()]
    assert paths and name in defined_names(paths[0]), (file, name)
  assert len(hops) > 30
