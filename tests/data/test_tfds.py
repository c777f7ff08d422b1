"""Prepared TFDS datasets, read without TensorFlow and without decoding."""

import io
import pickle
import shutil

import pytest
import tensorflow_datasets as tfds

from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.sources import build_source
from groupvit_jax.data.tfds import open_tfds
from tests.tars import data_config, encode, set_config, write_set


class Pairs(tfds.core.GeneratorBasedBuilder):
  """Twenty pairs; the caption of the last is not UTF-8."""

  VERSION = tfds.core.Version('1.0.0')
  url_infos = {}  # nothing is downloaded: TFDS need not look for checksums beside this file

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {'image': tfds.features.Image(encoding_format='jpeg'), 'caption': tfds.features.Text()}
      ),
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for n in range(20):
      caption = f' a dog number {n}\n' if n < 19 else b'caf\xe9'
      yield n, {'image': io.BytesIO(encode(n)), 'caption': caption}


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  builder = Pairs(data_dir=tmp_path_factory.mktemp('tfds'), file_format='array_record')
  builder.download_and_prepare()
  return builder.data_dir


def open_split(path, split='train', image='image', caption='caption'):
  return open_tfds(str(path), split, image, caption, 'data.sets.x')


def test_records_are_the_files_that_were_put_in(prepared):
  source = open_split(prepared)
  assert len(source) == 20 and source.num_shards == 1
  seen = {}
  for copy in (source, pickle.loads(pickle.dumps(source))):
    for n in range(20):
      try:
        record = copy[n]
      except BadRecord as fault:
        assert fault.cause == 'caption_unreadable' and fault.key == f'{prepared}/train[{n}]'
        continue
      number = int(record['text'].removeprefix('a dog number '))
      assert record['image'] == encode(number)
      seen.setdefault(number, set()).add(record['key'])
  assert sorted(seen) == list(range(19)) and all(len(keys) == 1 for keys in seen.values())


def test_a_part_of_a_split_mixes_with_tars(prepared, own_cache, tmp_path):
  described = dict(
    format='tfds', path=str(prepared), split='train[:25%]', image='image', caption='caption', weight=1.0, expected=5
  )
  source = build_source(data_config(tars=set_config(write_set(tmp_path, 8), weight=3.0), records=described), (16, 16))
  assert [part.name for part in source.sets] == ['records', 'tars'] and len(source) == 5 + 8
  assert source[12]['text'] == 'a dog number 7'
  assert source.metadata()['sets']['records']['digest'] != open_split(prepared).digest


@pytest.mark.parametrize(
  'changes, message',
  [
    (dict(split='test'), "no TFDS dataset with a split 'test'"),
    (dict(image='picture'), "no Image feature 'picture'; it has .*caption"),
    (dict(caption='image'), "no Text feature 'image'"),
  ],
)
def test_what_a_dataset_does_not_have(prepared, changes, message):
  with pytest.raises(ValueError, match=f'data.sets.x: .*{message}'):
    open_split(prepared, **changes)


def test_a_folder_that_is_none_and_a_file_that_is_missing(prepared, tmp_path):
  with pytest.raises(ValueError, match=f'x: there is no TFDS dataset .* in {tmp_path}'):
    open_split(tmp_path)
  copy = tmp_path / 'copy'
  shutil.copytree(prepared, copy)
  (file,) = copy.glob('*.array_record*')
  file.unlink()
  with pytest.raises(ValueError, match=f'1 of 1 files are missing, first {file}; copy them again'):
    open_split(copy)
