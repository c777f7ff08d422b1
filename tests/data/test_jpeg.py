"""Decoding a part of a JPEG gives the pixels that decoding all of it gives."""

import io

import numpy as np
from PIL import Image
import pytest

from groupvit_jax.data import jpeg
from groupvit_jax.data.bad_records import BadRecord
from tests.photos import decode, encode, photo

PIXELS = photo(83, 70)
FORMS = {
  '4:2:0': dict(subsampling='4:2:0'),
  '4:4:4': dict(subsampling='4:4:4'),
  'progressive': dict(progressive=True),
  'restarts': dict(restart_marker_rows=1),
  'optimised': dict(optimize=True, quality=95),
}  # fmt: skip


@pytest.mark.parametrize('bottom', [1, 15, 16, 33, 83])
@pytest.mark.parametrize('form', FORMS)
def test_rows_are_those_of_the_whole_picture(form, bottom):
  data = encode(PIXELS, **FORMS[form])
  header = jpeg.read_header(data, '')
  assert header[:2] == (83, 70)
  rows = jpeg.decode_rows(data, header, bottom, 1, '')
  np.testing.assert_array_equal(rows[:bottom], decode(data)[:bottom])
  if header.one_scan:
    assert len(rows) <= bottom + 16  # the rest is not decoded
  assert header.one_scan == (form != 'progressive')


def test_grey_becomes_rgb():
  data = encode(PIXELS[..., 0])
  rows = jpeg.decode_rows(data, jpeg.read_header(data, ''), 40, 1, '')
  np.testing.assert_array_equal(rows[:40], decode(data)[:40])


@pytest.mark.parametrize('reduction', [2, 4, 8])
@pytest.mark.parametrize('form', ['4:2:0', 'progressive'])
def test_a_reduced_picture_is_that_many_times_smaller(form, reduction):
  data = encode(photo(160, 131), **FORMS[form])
  rows = jpeg.decode_rows(data, jpeg.read_header(data, ''), 81, reduction, '')
  image = Image.open(io.BytesIO(data))
  image.draft('RGB', (131 // reduction, 160 // reduction))
  expected = np.asarray(image)
  assert rows.shape[1] == expected.shape[1] == -(-131 // reduction)
  assert np.abs(rows[: 80 // reduction].astype(int) - expected[: 80 // reduction]).mean() < 1


@pytest.mark.parametrize('share', [0.02, 0.3, 0.9])
def test_a_truncated_file_is_a_fault(share):
  data = encode(PIXELS)
  with pytest.raises(BadRecord, match='set/0001/key: image_truncated'):
    jpeg.read_header(data[: int(len(data) * share)], 'set/0001/key')


def test_what_follows_the_picture_does_not_matter():
  data = encode(PIXELS) + b'appended'
  np.testing.assert_array_equal(jpeg.decode_rows(data, jpeg.read_header(data, ''), 83, 1, ''), decode(data))


def test_a_damaged_table_is_a_fault():
  data = bytearray(encode(PIXELS))
  tables = data.index(b'\xff\xc4')
  data[tables + 5 : tables + 21] = b'\xff' * 16  # more codes than there can be
  header = jpeg.read_header(bytes(data), 'key')
  with pytest.raises(BadRecord, match='key: image_corrupt'):
    jpeg.decode_rows(bytes(data), header, 83, 1, 'key')


def test_what_is_left_to_pillow():
  cmyk = io.BytesIO()
  Image.new('CMYK', (20, 20)).save(cmyk, 'JPEG')
  others = (encode(PIXELS, 'PNG'), encode(PIXELS, 'WEBP'), cmyk.getvalue(), b'', b'\xff\xd8ab' * 9)
  for data in others:
    assert jpeg.read_header(data, '') is None
  exif = Image.Exif()
  exif[0x0112] = 6
  assert jpeg.read_header(encode(PIXELS, exif=exif), '') is None
  exif[0x0112] = 1
  assert jpeg.read_header(encode(PIXELS, exif=exif), '') is not None


def test_channels_that_come_one_after_another_are_not_cut():
  data = bytearray(encode(PIXELS))
  data[data.index(b'\xff\xda') + 4] = 1  # channels in the first scan
  assert not jpeg.read_header(bytes(data), '').one_scan
