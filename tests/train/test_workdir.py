"""Configs of earlier versions, and workdirs that hold them."""

import json
import pathlib
import shutil

import ml_collections
import pytest

from groupvit_jax.data.sources import build_source
from groupvit_jax.train import workdir as workdir_lib
from tests.tars import data_config, samples, set_config, write_tar
from tests.tiny import tiny_config
from tests.train.test_configs import flat

EARLIER = pathlib.Path(__file__).with_name('earlier_config.json')  # as a run of an earlier version wrote it


def test_a_workdir_of_an_earlier_version_opens_and_resumes(tmp_path):
  shutil.copy(EARLIER, tmp_path / 'config.json')
  (tmp_path / 'checkpoints/3').mkdir(parents=True)
  config = workdir_lib.read_config(tmp_path)
  assert flat(config).keys() == flat(tiny_config()).keys() and config.benchmarks == ml_collections.ConfigDict()
  assert not [change for change in workdir_lib.check_config(tmp_path, tiny_config()) if 'absent' in change]


def test_a_config_of_an_earlier_version_keeps_its_benchmarks():
  config = tiny_config()
  with config.unlocked():
    del config.benchmarks
    config.evals, config.multi_label_weight = {'mine': {'every_steps': 5}}, 1.0
    config.data.augment.max_pixels = 100_000_000
  upgraded = workdir_lib.upgrade_config(config)
  assert upgraded.benchmarks.mine.every_steps == 5
  assert not {'evals', 'multi_label_weight'} & set(upgraded) and 'max_pixels' not in upgraded.data.augment
  assert workdir_lib.upgrade_config(upgraded) == upgraded
  with config.unlocked():
    config.multi_label_weight = 0.5
  with pytest.raises(ValueError, match='multi_label_weight=0.5: there is no such entry any more; 1.0 is built in'):
    workdir_lib.upgrade_config(config)


def test_a_run_goes_on_with_its_own_data_wherever_they_lie(own_cache, tmp_path):

  def metadata(name, numbers):
    path = write_tar(tmp_path / name / 'a.tar', samples(numbers))
    return build_source(data_config(a=set_config(path)), (16, 16)).metadata()

  workdir_lib.record_data(tmp_path, metadata('one', range(5)))
  (tmp_path / 'checkpoints/3').mkdir(parents=True)
  workdir_lib.check_data(tmp_path, metadata('moved', range(5)))
  with pytest.raises(ValueError, match=r'the data changed .* started: a \(5 records then, 6 now\).*data.json'):
    workdir_lib.check_data(tmp_path, metadata('grown', range(6)))
  with pytest.raises(ValueError, match=r'started: a \(as many records, but others\)'):
    workdir_lib.check_data(tmp_path, metadata('others', range(5, 10)))
  recorded = json.loads((tmp_path / 'data.json').read_text())
  del recorded['epochs']
  (tmp_path / 'data.json').write_text(json.dumps(recorded))
  with pytest.raises(ValueError, match='an order of epochs that earlier versions had; use another --workdir'):
    workdir_lib.check_data(tmp_path, metadata('moved', range(5)))
