"""A start that ends before its first step leaves nothing that a corrected command would stumble over."""

import functools
import json
import pathlib

import jax
import pytest

from groupvit_jax.running import sharding
from groupvit_jax.train import loop
from groupvit_jax.train import run as run_lib
from groupvit_jax.train import workdir as workdir_lib
from tests.tiny import tiny_config


def names(folder: pathlib.Path) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


def test_a_start_that_fails_leaves_the_workdir_as_it_was(tmp_path, monkeypatch):
  """After data, tokenizer and config were written: the log cannot be opened."""
  one_device = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
  monkeypatch.setattr(sharding, 'make_mesh', one_device)  # compiles in a third of the time
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
