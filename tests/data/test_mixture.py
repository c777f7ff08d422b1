"""The order of a run: which record where, whatever the hosts, the workers and the restarts."""

from collections import Counter
from pathlib import Path

import grain
import numpy as np
import pytest

from groupvit_jax.data import augment as image_ops
from groupvit_jax.data import mixture, pipeline
from groupvit_jax.data.mixture import DataSet, Mixture, Order
from groupvit_jax.data.sources import build_source
from tests.tars import AUGMENT, data_config, make_examples, samples, set_config, write_set, write_tar


class Numbers:
  """Records whose caption is their number plus an offset."""

  def __init__(self, size: int, offset: int = 0):
    self.size, self.offset = size, offset

  def __len__(self):
    return self.size

  def __getitem__(self, index):
    assert 0 <= index < self.size
    pixel = np.full((2, 2, 3), index % 256, np.uint8)
    return {'image': pixel, 'text': f'dog {self.offset + index}', 'key': str(index)}


def numbers(*sizes: int, weights: tuple[float, ...] | None = None) -> Mixture:
  return Mixture(
    tuple(
      DataSet(f'set{k}', Numbers(size, 1000 * k), 'digest', 1, weights[k] if weights else 0.0)
      for k, size in enumerate(sizes)
    )
  )


def examples(source: Mixture, augment=None, **changes) -> pipeline.Examples:
  return make_examples(source, augment, **(dict(seed=3, batch_size=8, num_batches=10) | changes))


def iterate(*args, num_threads=0, num_workers=0, **kwargs) -> list[dict[str, np.ndarray]]:
  made = pipeline.iterate(
    examples(*args, **kwargs), num_threads=num_threads, num_workers=num_workers, prefetch_batches=2
  )
  return [{name: np.array(rows) for name, rows in batch.items()} for batch in made]


def shown(batches: list[dict[str, np.ndarray]]) -> list[int]:
  """Numbers of the records in a run."""
  return [int(token) - 2 for batch in batches for token in batch['tokens'][:, 0, 0]]


def assert_same(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs):
    assert a.keys() == b.keys() == {'image', 'tokens', 'bad_records'}
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_by_size_every_epoch_is_a_permutation_of_everything():
  order = Order([7, 4], None, seed=1)
  epochs = [[order[e * 11 + i] for i in range(11)] for e in range(3)]
  assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 3
  assert [Order([7, 4], None, seed=2)[i] for i in range(11)] != epochs[0]
  assert [order[i] for i in (20, 3, 30)] == [epochs[1][9], epochs[0][3], epochs[2][8]]


def test_the_order_of_a_seed_stays():
  """A run that is resumed by another version sees the same records."""
  by_size, by_weight = Order([70, 30], None, seed=5), Order([70, 30], [1, 3], seed=5)
  assert [by_size[p] for p in (0, 1, 2, 99, 100, 12345)] == [80, 73, 32, 44, 83, 72]
  assert [by_weight[p] for p in (0, 1, 2, 99, 100, 12345, 10**6)] == [75, 85, 8, 89, 76, 8, 92]


def test_the_examples_of_a_seed_stay(tmp_path, monkeypatch):
  """Records, their replacements, prompts, crops and the fingerprint; 4 and 5 cannot be used."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  write_tar(Path('set/a.tar'), samples(range(12)) | {'00004.txt': b'', '00005.jpg': b'x'})
  write_tar(Path('set/b.tar'), samples(range(20, 28)))
  source = build_source(data_config(a=set_config('set/a.tar'), b=set_config('set/b.tar')), (16, 16))
  made = examples(source, AUGMENT, num_prompts=2)
  seen = [made.load(i) for i in range(6)]
  numbers = ['a.tar/00006', 'a.tar/00007', 'a.tar/00011', 'a.tar/00008', 'b.tar/00025', 'a.tar/00006']
  assert [example.key.removeprefix('set/') for example in seen] == numbers
  assert [tuple(example.bad_records.nonzero()[0]) for example in seen] == [(1, 5), (), (), (), (), (1,)]
  texts = [made.texts(example.caption, example.position) for example in (seen[0], seen[5])]
  assert texts == [
    ['a dog number 6', 'graffiti of the dog.', 'a black and white photo of the number.'],
    ['a dog number 6', 'a bad photo of the dog.', 'a rendering of the number.'],
  ]
  box = image_ops.random_box(300, 400, (0.08, 1.0), (3 / 4, 4 / 3), made._rng(1, pipeline._AUGMENT))
  assert box == (30, 131, 151, 198)
  assert source.metadata()['fingerprint'] == '29014335373fc8bd'


def test_no_epoch_of_a_seed_is_one_of_another_seed():
  orders = [Order([70, 30], None, seed) for seed in range(8)]
  epochs = {tuple(order[e * 100 + i] for i in range(100)) for order in orders for e in range(4)}
  assert len(epochs) == 32


def test_permutations_are_grains():
  theirs = grain.MapDataset.range(1000).shuffle(seed=5).repeat()
  ours = mixture._Permutations(1000, 5, 5)
  assert [ours[p] for p in (0, 1, 999, 1000, 5432, 10**9)] == [theirs[p] for p in (0, 1, 999, 1000, 5432, 10**9)]


def test_by_weights_blocks_hold_exact_shares_and_sets_their_own_epochs(monkeypatch):
  monkeypatch.setattr(mixture, 'BLOCK', 10)
  order = Order([6, 40], [3, 7], seed=1)
  blocks = [[order[p] for p in range(b, b + 10)] for b in range(0, 120, 10)]
  small = [[i for i in block if i < 6] for block in blocks]
  large = [[i for i in block if i >= 6] for block in blocks]
  assert {len(part) for part in small} == {3} and {len(part) for part in large} == {7}
  for b in range(0, 12, 2):  # two blocks hold an epoch of six
    assert sorted(small[b] + small[b + 1]) == list(range(6))
  assert Counter(Counter(sum(large, [])).values()) == {2: 36, 3: 4}  # 84 draws of 40 records
  assert len({tuple(i < 6 for i in block) for block in blocks}) > 6  # shuffled within blocks


def test_shares_are_rounded_to_whole_records():
  assert mixture._whole_shares([1, 1, 1]) == [5462, 5461, 5461]
  assert mixture._whole_shares([0.25, 0.75]) == [4096, 12288]
  with pytest.raises(ValueError, match='weight 1e-06 is too small beside 1'):
    mixture._whole_shares([1, 1e-6])


def test_a_mixture_reads_the_right_set():
  source = numbers(3, 5, 2)
  assert len(source) == 10
  assert [source[i]['text'][4:] for i in (0, 2, 3, 7, 8, 9)] == ['0', '2', '1000', '1004', '2000', '2001']
  with pytest.raises(ValueError, match='data.sets.set1 has no records'):
    numbers(3, 0)
  with pytest.raises(ValueError, match='have 7 records, fewer than batch_size=8'):
    examples(numbers(7))
  for weights in ((1.0, 0.0), (-1.0, 2.0)):
    with pytest.raises(ValueError, match='positive for all sets, or 0 for all.*set0 has'):
      numbers(3, 4, weights=weights)


def test_fingerprint_changes_with_records_order_and_weights():
  seen = {
    mix.metadata()['fingerprint']
    for mix in (numbers(3, 5), numbers(5, 3), numbers(3, 5, weights=(1, 2)), numbers(3, 5, weights=(2, 1)), numbers(8))
  }
  assert len(seen) == 5
  assert numbers(3, 5).metadata() == numbers(3, 5).metadata()


def test_a_run_that_changes_hosts_repeats_and_loses_nothing():
  """Three batches on four hosts, three on one, the rest on two."""
  source = numbers(20, 60, weights=(1, 3))
  whole, pieces = iterate(source), []
  for first, last, hosts in ((0, 3, 4), (3, 6, 1), (6, 10, 2)):
    rows = [range(h * 8 // hosts, (h + 1) * 8 // hosts) for h in range(hosts)]
    parts = [iterate(source, rows=own, first_batch=first, num_batches=last) for own in rows]
    pieces += [{name: np.concatenate([part[name] for part in batch]) for name in batch[0]} for batch in zip(*parts)]
  assert_same(pieces, whole)
  assert sorted(shown(iterate(numbers(80)))) == list(range(80))


@pytest.fixture(scope='module')
def photographs(tmp_path_factory) -> Mixture:
  folder = tmp_path_factory.mktemp('sets')
  return build_source(
    data_config(a=set_config(write_set(folder / 'a', 20)), b=set_config(write_set(folder / 'b', 30))), (16, 16)
  )


@pytest.mark.parametrize('workers, threads', [(0, 5), (3, 2)])
def test_threads_and_workers_change_nothing(photographs, workers, threads):
  assert_same(iterate(photographs, AUGMENT, num_workers=workers, num_threads=threads), iterate(photographs, AUGMENT))


def test_crops_and_prompts_are_drawn_apart_and_anew_at_every_position(photographs):
  one, other = iterate(photographs, AUGMENT, num_batches=1), iterate(photographs, AUGMENT, num_batches=1, seed=4)
  assert not np.array_equal(one[0]['image'], other[0]['image'])
  made = examples(photographs, AUGMENT, num_batches=20)
  one_epoch = [made.load(i) for i in range(100)]
  views, texts = {}, lambda example: made.texts(example.caption, example.position)
  for example in one_epoch:
    views.setdefault(example.key, []).append(example)
  assert all(len(twice) == 2 for twice in views.values())
  assert sum(texts(a) != texts(b) for a, b in views.values()) > 40  # 80 templates
  words, crop = (examples(photographs)._rng(5, stream).random() for stream in (pipeline._WORDS, pipeline._AUGMENT))
  assert words != crop
  without_prompts = examples(photographs, AUGMENT, num_prompts=0).load(5)
  np.testing.assert_array_equal(without_prompts.image, one_epoch[5].image)


def test_captions_are_cleaned_where_the_set_asks_for_it():
  class Messy(Numbers):
    def __getitem__(self, index):
      return super().__getitem__(index) | {'text': 'a cat &amp; a  dog'}

  source = Mixture(tuple(DataSet(name, Messy(4), name, 1, 0.0, clean=name == 'clean') for name in ('raw', 'clean')))
  assert [source[index]['text'] for index in (0, 4)] == ['a cat &amp; a  dog', 'a cat & a dog']
  assert [source.caption_of(index) for index in (0, 4)] == ['a cat &amp; a  dog', 'a cat & a dog']


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(format='tar'), r"data.sets.a.format='tar': use 'webdataset' or 'tfds'"),
    (dict(split='train'), 'data.sets.a.split is unknown'),
  ],
)
def test_descriptions_of_sets(tmp_path, changes, message):
  config = data_config(a=set_config(write_set(tmp_path, 8), **changes))
  with pytest.raises(ValueError, match=message):
    build_source(config, (16, 16))
  with pytest.raises(ValueError, match='data.sets is empty'):
    build_source(data_config(), (16, 16))
