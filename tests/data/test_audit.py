"""The audit: what it finds in sets whose contents are known."""

import json

import ml_collections
import pytest

from configs import quickstart
from groupvit_jax.data import audit
from groupvit_jax.data.prompts import nouns
from tests.runs import run_command
from tests.tars import encode, samples, set_config, write_tar

AUGMENT = dict(name='plain', area=(0.5, 1.0), ratio=(0.75, 4 / 3), flip=0.5)


def make_config(data: dict[str, object] | None = None) -> ml_collections.ConfigDict:
  """The quickstart, over other data."""
  config = quickstart.get_config()
  config.tokenizer.vocab_size = 300
  config.data.num_prompts = 3
  with config.data.unlocked():
    config.data.update(data or {})
  return config


pytestmark = pytest.mark.usefixtures('own_cache')


@pytest.fixture
def config(tmp_path):
  good = samples(range(40)) | {
    '00001.jpg': encode(0),
    '00002.jpg': encode(0),  # three times the same picture
    '00005.txt': b'a dog number 4',  # twice the same caption
    '00007.jpg': b'',
    '00008.jpg': b'no picture',
    '00009.txt': b'caf\xe9',
    '00010.txt': b'dogs ' * 200,
  }
  return make_config(
    dict(
      source='sets',
      index_dir='',
      clean_captions=False,
      augment=AUGMENT,
      sets=dict(
        first=set_config(write_tar(tmp_path / 'a.tar', good), expected=50),
        second=set_config(write_tar(tmp_path / 'b.tar', samples(range(100, 110))), weight=0.0),
      ),
    )
  )


def test_the_command_reports_what_is_there_and_fails_on_a_bad_set(config, tmp_path):
  (tmp_path / 'config.py').write_text(
    'import json, ml_collections\n'
    f'def get_config(): return ml_collections.ConfigDict(json.loads({config.to_json()!r}))\n'
  )
  flags = [f'--config={tmp_path}/config.py', f'--output={tmp_path}/out', '--samples=0']
  done = run_command('-m', 'groupvit_jax.data.audit', *flags)
  assert done.returncode == 3, done.stderr
  for text in (
    'first: 40 records of 50 expected (80.0%) in 1 shards, digest',
    '7.50% (image_missing 1, image_corrupt 1, caption_unreadable 1)',
    'first has 7.5% unusable records, more than data.max_fault_share=0.05',
  ):
    assert text in done.stdout
  report = json.loads((tmp_path / 'out' / 'audit.json').read_text())
  first, second = report['sets']['first'], report['sets']['second']
  assert (first['records'], first['expected'], first['shards'], first['looked_at']) == (40, 50, 1, 40)
  assert first['unusable'] == {'image_missing': 1, 'image_corrupt': 1, 'caption_unreadable': 1}
  assert first['unusable_share'] == 3 / 40
  assert sorted(key.split('/')[-1] for key in first['unusable_keys']) == [
    '00007: image_missing',
    '00008: image_corrupt',
    '00009: caption_unreadable',
  ]
  assert (first['duplicate_images'], first['duplicate_captions']) == (2, 1)
  assert first['captions_cut'] == 1 / 37 and first['tokens_percentiles'][-1] > 200
  assert first['words_percentiles'][2] == len(nouns('a dog number 4')) and first['words_percentiles'][-1] == 200
  assert first['captions_with_too_few_words'] == 36 / 37
  assert second['unusable'] == {} and second['unusable_share'] == 0 and second['examples_per_core_second'] > 1
  assert len(report['fingerprint']) == 16
  for name in ('first', 'second'):
    page = (tmp_path / 'out' / f'{name}.html').read_text()
    assert page.count('<img src="data:image/webp;base64,') == 24 and page.count('<p>a dog number ') > 20


def test_a_sample_is_spread_over_the_set(config, tmp_path):
  report = audit.audit(config, tmp_path, samples=8)
  assert report['sets']['first']['looked_at'] == 8 and report['sets']['second']['looked_at'] == 8
  assert report['sets']['first']['unusable'] == {}  # every fifth record, of which none is damaged
