"""Bad records counted over all devices and restarts, and runs that have too many."""

import numpy as np
import pytest

from groupvit_jax.data import bad_records
from groupvit_jax.data.bad_records import TooManyBadRecords
from groupvit_jax.running import sharding
from groupvit_jax.train.bad_record_tally import BadRecordTally


def make_tally(folder, step=0, **changes):
  """Over a mesh of all devices."""
  return BadRecordTally(folder, step, **(dict(batch_size=16, max_share=0.1, mesh=sharding.make_mesh()) | changes))


def rows(**found):
  result = np.zeros((16, len(bad_records.CAUSES)), np.int32)
  for row, (cause, count) in enumerate(found.items()):
    result[row, bad_records.CAUSES.index(cause)] = count
  return result


def test_counts_are_of_the_moment_they_were_asked_for(tmp_path):
  tally = make_tally(tmp_path)
  tally.add(rows(image_tiny=2, caption_empty=1))
  early = tally.total()
  tally.add(rows(image_tiny=5))
  assert tally.counts(early) == {'image_tiny': 2, 'caption_empty': 1}
  assert tally.counts(tally.total()) == {'image_tiny': 7, 'caption_empty': 1}


def test_counts_go_on_from_the_checkpoint_restored_not_from_the_newest(tmp_path):
  tally = make_tally(tmp_path)
  for step, count in ((10, 1), (20, 4), (30, 9)):
    tally.add(rows(image_huge=count))
    tally.save(step)
  again = make_tally(tmp_path, step=20)
  again.add(rows(image_corrupt=2))
  assert again.counts(again.total()) == {'image_huge': 5, 'image_corrupt': 2}
  again.save(30)
  assert make_tally(tmp_path, 30).counts(make_tally(tmp_path, 30).total()) == {'image_huge': 5, 'image_corrupt': 2}


def test_the_share_is_of_a_thousand_examples_and_since_the_last_check(tmp_path):
  tally = make_tally(tmp_path)
  tally.check(50, {'image_tiny': 800})  # too few to judge
  tally.check(100, {'image_tiny': 160})  # a tenth exactly
  with pytest.raises(
    TooManyBadRecords,
    match=(
      r'10.1% of the 1,600 records since step 100 could not be used, more than data.max_fault_share=0.1 '
      r'\(since step 0: image_tiny 160, caption_empty 161\)'
    ),
  ):
    tally.check(200, {'image_tiny': 160, 'caption_empty': 161})
