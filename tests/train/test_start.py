"""A start that ends before its first step leaves nothing that a corrected command would stumble over."""

import json
import pathlib
import shutil

from etils import epath
import pytest

from groupvit_jax import storage
from groupvit_jax.interop.licence import Licence, read_kept
from groupvit_jax.running import processes
from groupvit_jax.train import initial_weights, loop
from groupvit_jax.train import run as run_lib
from groupvit_jax.train import workdir as workdir_lib
from tests import folder_bucket
from tests.tiny import tiny_config


def names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


pytestmark = pytest.mark.usefixtures('one_device')


def test_a_start_that_fails_leaves_the_workdir_as_it_was(tmp_path):
  """After data, tokenizer and config were written: the log cannot be opened."""
  (tmp_path / 'metrics.jsonl').mkdir()
  (tmp_path / 'notes.txt').write_text('of the user')
  config = tiny_config()
  with pytest.raises(OSError):
    loop.train(config, tmp_path)
  assert names(tmp_path) == ['metrics.jsonl', 'notes.txt']


def test_a_start_that_was_killed_before_a_checkpoint_binds_nobody(tmp_path):
  run_lib.set_up(tiny_config(), tmp_path)
  (tmp_path / 'notes.txt').write_text('of the user')
  tokenizer = (tmp_path / 'tokenizer/tokenizer.model').read_bytes()
  run_lib.set_up(tiny_config(), tmp_path)
  assert (tmp_path / 'tokenizer/tokenizer.model').read_bytes() == tokenizer
  config = tiny_config()
  config.model.embed_dim, config.tokenizer.vocab_size, config.data.scenes.num_heldout = 24, 340, 9
  run = run_lib.set_up(config, tmp_path)
  assert json.loads((tmp_path / 'config.json').read_text())['model']['embed_dim'] == 24
  assert run.tokenizer.vocab_size <= 340 and (tmp_path / 'notes.txt').exists()
  workdir_lib.check_data(tmp_path, run.source.metadata())
  (tmp_path / 'checkpoints/3').mkdir(parents=True)
  with pytest.raises(ValueError, match='model.embed_dim is 16 here and 24 there'):
    run_lib.set_up(tiny_config(), tmp_path)


@pytest.mark.parametrize('place', ['disk', 'bucket'])
def test_a_start_that_was_killed_while_it_prepared_leaves_nothing_behind(place, tmp_path, monkeypatch):
  """Nothing can be renamed in a bucket; another start trains another tokenizer, on other data, from random weights."""
  workdir = tmp_path / 'run'
  if place == 'bucket':
    folder_bucket.use(monkeypatch, tmp_path)
    monkeypatch.setitem(workdir_lib._BUCKETS, 's3', 'fsspec')
    workdir = 's3://bucket/run'
  config = tiny_config()
  config.init_from, config.data.scenes.num_heldout = 'elsewhere', 9
  licence = Licence('mit')
  monkeypatch.setattr(initial_weights, 'with_tokenizer', lambda config: config.tokenizer)
  monkeypatch.setattr(initial_weights, 'read_checked', lambda *_: initial_weights.Source({}, 1, licence))
  write = storage.write_atomic

  def die(path, data):
    write(path, data)
    if path.endswith('tokenizer.model'):
      write(path, data[: len(data) // 2])
      raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(storage, 'write_atomic', die)
    run_lib.set_up(config, workdir)
  assert read_kept(workdir) == licence
  run = run_lib.set_up(tiny_config(), workdir)
  assert read_kept(workdir) == Licence() and workdir_lib.load_tokenizer(workdir).vocab_size == run.tokenizer.vocab_size
  assert json.loads((epath.Path(workdir) / 'data.json').read_text()) == run.source.metadata()


def test_a_tokenizer_that_was_there_before_is_taken(tmp_path):
  run_lib.set_up(tiny_config(), tmp_path / 'other')
  shutil.copytree(tmp_path / 'other/tokenizer', tmp_path / 'run/tokenizer')
  (tmp_path / 'run/tokenizer/notes.txt').touch()
  run_lib.set_up(tiny_config(), tmp_path / 'run')
  assert (tmp_path / 'run/tokenizer/notes.txt').exists()


@pytest.mark.parametrize('first', [True, False])
def test_the_first_process_decides_whether_weights_are_read(first, tmp_path, monkeypatch):
  """It may have saved a checkpoint by the time that another one looks."""
  (tmp_path / 'checkpoints/3').mkdir(parents=True)
  reads, gather = [], processes.all_gather_objects
  found = lambda value: [first, not first] if isinstance(value, bool) else gather(value)
  monkeypatch.setattr(run_lib.processes, 'all_gather_objects', found)
  monkeypatch.setattr(initial_weights, 'read_checked', lambda *_: reads.append(1))
  config = tiny_config()
  config.init_from = 'elsewhere'
  monkeypatch.setattr(initial_weights, 'with_tokenizer', lambda config: config.tokenizer)
  run_lib.set_up(config, tmp_path)
  assert bool(reads) != first


def test_the_first_process_alone_writes_the_licence(tmp_path, monkeypatch):
  writes = []
  monkeypatch.setattr(run_lib.licence_lib, 'keep', lambda *_: writes.append(run_lib.jax.process_index()))
  for index in (0, 1):
    monkeypatch.setattr(run_lib.jax, 'process_index', lambda index=index: index)
    run_lib.set_up(tiny_config(), tmp_path)
  assert writes == [0]
