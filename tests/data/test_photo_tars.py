"""Tars made of photographs: the pairs as img2dataset writes them, read by our own source."""

import io
import json

from PIL import Image
import pytest

from benchmarks.photo_tars import write_tars
from groupvit_jax.data.tars import open_webdataset
from tests.photos import encode, photo


def test_pairs_go_round_the_sets_and_no_side_is_longer_than_512(tmp_path):
  (tmp_path / 'photos').mkdir()
  for name, size in (('a', (40, 30)), ('b', (300, 1024)), ('c', (20, 20))):
    (tmp_path / 'photos' / f'{name}.jpg').write_bytes(encode(photo(*size)))
  folders = [tmp_path / 'one', tmp_path / 'two']
  captions = {'a': ['a 1', 'a 2'], 'b': ['b 1', 'b 2', 'b 3'], 'd': ['missing']}
  assert write_tars(tmp_path / 'photos', captions, folders, per_shard=2) == [3, 2]
  one = open_webdataset([f'{tmp_path}/one/{{00000..00001}}.tar'], 'txt', '', 'x')
  assert [one[n]['text'] for n in range(3)] == ['a 1', 'b 1', 'b 3']
  assert [Image.open(io.BytesIO(one[n]['image'])).size for n in range(3)] == [(30, 40), (512, 150), (512, 150)]
  two = open_webdataset([f'{tmp_path}/two/00000.tar'], 'json:caption', '', 'x')
  assert [two[n]['text'] for n in range(2)] == ['a 2', 'b 2']
  with pytest.raises(ValueError, match='no picture in .* has a caption'):
    write_tars(tmp_path / 'photos', json.loads('{}'), folders, per_shard=2)
