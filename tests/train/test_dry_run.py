"""The dry run: it finds what the run would stumble over, and leaves nothing behind."""

import pathlib
import re

import pytest

from configs import groupvit_vits16_gcc_yfcc
from groupvit_jax.data.sources import build_source
from groupvit_jax.errors import UserError
from groupvit_jax.train import dry_run, workdir
from tests.tars import samples, write_tar
from tests.tiny import tiny_config
from tests.train.test_configs import shrink


@pytest.fixture
def config(own_cache, tmp_path):
  return shrink(groupvit_vits16_gcc_yfcc.get_config(), tmp_path)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(path): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_says_what_a_run_would_be_and_leaves_no_workdir(config, tmp_path, monkeypatch, capsys):
  """A folder that was made beforehand holds no run. Memory is that of a device, which has an eighth of the batch."""
  config.dry_run = True
  config.data.num_workers = 1
  (tmp_path / 'run').mkdir()
  check_memory, found = dry_run.check_memory, []
  monkeypatch.setattr(dry_run, 'check_memory', found.append)
  assert dry_run.check(config, tmp_path / 'run') == 0
  assert not list((tmp_path / 'run').iterdir())
  out = capsys.readouterr().out
  for text in (
    'a: 20 records in 3 shards',
    'b: 12 records in 1 shards',
    '3 steps of 16 pairs: 1.5 epochs',
    'SentencePieceTokenizer, 300 pieces, tried on 2,000 captions',
    'image uint8 [16, 32, 32, 3]',
    'tokens int32 [16, 4, 24]',
    'a dog number',
    'tokens an image on average; text_budget=',
    "parameters on {'data': 8, 'fsdp': 1, 'model': 1} x cpu",
    'temporaries of a step',
    'would be new',
    'nothing was trained',
  ):
    assert text in out, text
  (memory,) = found
  assert memory.batch == 2 * (32 * 32 * 3 + 4 * 24 * 4)
  parameters = int(re.search(r'([\d,]+) parameters on', out)[1].replace(',', ''))
  assert 3 * 4 * parameters <= memory.state < 3 * 4 * parameters + 10_000  # with two moments of each
  assert memory.temporaries > memory.batch
  check_memory(memory._replace(limit=memory.together))
  with pytest.raises(ValueError, match=r"a step needs .* GiB of a device, which has 0.0; set remat='dots'"):
    check_memory(memory._replace(limit=memory.together - 1))


def test_a_workdir_with_another_run_is_named_and_left_alone(config, tmp_path):
  run = tmp_path / 'run'
  workdir.write_config(run, config)
  workdir.record_data(run, build_source(config.data, (32, 32)).metadata())
  (run / 'checkpoints/3').mkdir(parents=True)
  before = contents(run)
  config.model.vision.width = 32
  with pytest.raises(ValueError, match='model.vision.width is 32 here and 16 there'):
    dry_run.check(config, run)
  config.model.vision.width = 16
  config.data.sets.b.path = write_tar(tmp_path / 'c.tar', samples(range(40, 50)))
  with pytest.raises(ValueError, match='the data changed since the run'):
    dry_run.check(config, run)
  assert contents(run) == before


def test_a_run_that_goes_on_needs_no_longer_what_it_began_with(config, tmp_path):
  config.init_from = str(tmp_path / 'gone')
  workdir.write_config(tmp_path / 'run', config)
  with pytest.raises(ValueError, match='init_from=.*gone'):  # killed before its first checkpoint
    dry_run._set_up(config, tmp_path / 'run')
  (tmp_path / 'run/checkpoints/3').mkdir(parents=True)
  assert dry_run._set_up(config, tmp_path / 'run').config.init_from


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('data.source', 'sets', 'data.sets is empty'),
    ('tokenizer.path', '/nowhere.model', 'there is no file /nowhere.model'),  # training would leave a workdir
  ],
)
def test_a_mistake_leaves_nothing(key, value, message, tmp_path):
  config = tiny_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(UserError, match=message):
    dry_run.check(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
