"""Records that cannot be used: found, replaced, counted, logged, and not put up with for ever."""

import logging

import numpy as np
import pytest

from configs import quickstart
from groupvit_jax.data import bad_records, pipeline
from groupvit_jax.data.bad_records import BadRecord, TooManyBadRecords
from groupvit_jax.data.sources import build_source, sample_captions
from tests.tars import bad_record_counts, data_config, encode, make_examples, samples, set_config, write_tar


@pytest.fixture(autouse=True)
def fresh(own_cache, monkeypatch):
  monkeypatch.setattr(bad_records, '_written', 0)


DAMAGED = {
  'image_missing': {'jpg': b''},
  'image_corrupt': {'jpg': b'<html>404 not found</html>'},
  'image_truncated': {'jpg': encode(1, (90, 90))[:-20]},
  'image_tiny': {'jpg': encode(1, (40, 7))},
  'image_huge': {'jpg': encode(1, (101, 100))},
  'caption_missing': {'txt': b''},
  'caption_empty': {'txt': b' \n\t '},
  'caption_unreadable': {'txt': b'caf\xe9 12'},
}


def write_damaged(path, *damages: str, count: int = 16):
  """A tar whose first samples are damaged in the ways named."""
  members = samples(range(count))
  for n, cause in enumerate(damages):
    members |= {f'{n:05}.{kind}': data for kind, data in DAMAGED[cause].items()}
  return build_source(data_config(a=set_config(write_tar(path, members))), (16, 16))


def epoch(source) -> dict[str, pipeline.Example]:
  """The first epoch's examples by the key of the record that was drawn."""
  made = make_examples(source)
  order = source.order(0)
  return {f'{order[i]:05}': made.load(i) for i in range(len(source))}


@pytest.mark.parametrize('cause', bad_records.CAUSES)
def test_every_cause_is_found_replaced_counted_and_logged(tmp_path, cause, caplog):
  drawn = epoch(write_damaged(tmp_path / 'set' / 'a.tar', cause))
  assert drawn['00000'].key == 'set/a.tar/00001'  # its neighbour
  assert drawn['00000'].caption == 'a dog number 1' and drawn['00000'].image.shape == (16, 16, 3)
  assert bad_record_counts(drawn['00000'].bad_records[None]) == {cause: 1}
  assert not any(example.bad_records.any() for key, example in drawn.items() if key != '00000')
  assert [record.getMessage() for record in caplog.records] == [f'replaced a record: set/a.tar/00000: {cause}']


def test_replacements_leave_a_damaged_region_in_a_few_steps():
  distances = [n - 7 for n in bad_records.replacement_order(7, 0, 10**9)]
  assert distances[:18] == [*range(16), 16, 32] and distances[-1] == 2**19 and len(distances) == 32


def test_replacement_is_the_same_in_threads_on_hosts_and_after_a_restart(tmp_path):
  source = write_damaged(tmp_path / 'a.tar', *bad_records.CAUSES)
  alone = list(map(pipeline.Batches(make_examples(source), 0).__getitem__, range(4)))
  threaded = list(pipeline.iterate(make_examples(source), num_threads=4, num_workers=0, prefetch_batches=2))
  halves = [pipeline.Batches(make_examples(source, rows=range(8 * h, 8 * h + 8), first_batch=2), 0) for h in range(2)]
  for batch, other in zip(alone, threaded, strict=True):
    np.testing.assert_array_equal(batch['image'], other['image'])
    np.testing.assert_array_equal(batch['bad_records'], other['bad_records'])
  for n, batch in enumerate(alone[2:]):
    for name in batch:
      np.testing.assert_array_equal(np.concatenate([half[n][name] for half in halves]), batch[name])
  assert bad_record_counts(alone[0]['bad_records'])['image_missing'] == 1


def test_a_set_without_usable_records_ends_the_run(tmp_path):
  source = write_damaged(tmp_path / 'a.tar', *(8 * ['image_missing', 'caption_empty']))
  with pytest.raises(TooManyBadRecords, match=r'data.sets.a: 16 neighbours cannot be used, .*data.audit'):
    make_examples(source)[0]


def test_a_replacement_comes_from_the_same_set(tmp_path):
  bad = write_tar(tmp_path / 'bad.tar', samples(range(4)) | {'00003.txt': b''})
  good = write_tar(tmp_path / 'good.tar', samples(range(100, 120)))
  source = build_source(data_config(bad=set_config(bad), good=set_config(good)), (16, 16))
  made = make_examples(source)
  keys = [made.load(i).key for i in range(24) if source.order(0)[i] == 3]
  assert keys == [f'{tmp_path.name}/bad.tar/00000']


def test_log_is_cut_off_and_says_so(caplog):
  for n in range(30):
    bad_records.report(BadRecord('image_corrupt', f'key{n}'))
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == 21 and 'key19' in lines[-2] and 'only counted' in lines[-1]
  assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_captions_are_sampled_evenly_and_without_the_bad(tmp_path):
  source = write_damaged(
    tmp_path / 'a.tar', *(['caption_unreadable', 'image_corrupt', 'caption_missing'] + ['caption_empty']), count=40
  )
  assert list(sample_captions(source, 10)) == [f'a dog number {n}' for n in range(4, 40, 4)]
  assert len(list(sample_captions(source, 1000))) == 37


def test_captions_of_scenes_are_those_of_the_first():
  config = quickstart.get_config()
  scenes = build_source(config.data, (64, 64))
  assert list(sample_captions(scenes, 20)) == [scenes[n]['text'] for n in range(20)]
