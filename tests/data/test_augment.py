"""Crops: drawn as torchvision does, resized as Pillow does, decoded no further than needed."""

import dataclasses
import math

import numpy as np
from PIL import Image
import pytest

from groupvit_jax.data import augment as image_ops
from groupvit_jax.data.augment import Augment, Box, random_box, resize_box
from groupvit_jax.data.bad_records import BadRecord
from tests.photos import decode, encode, photo, png_header

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
PLAIN = Augment((32, 32), AREA, RATIO, flip=0.0, rand_augment=None, min_side=8, max_pixels=10**6)
PICTURE = photo(150, 180)


def with_pillow(pixels, box, size):
  """Crop, then resize: torchvision's resized_crop on Pillow images."""
  part = Image.fromarray(pixels).crop((box.left, box.top, box.left + box.width, box.top + box.height))
  return np.asarray(part.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)


def test_boxes_are_uniform_in_area_ratio_and_place():
  rng = np.random.default_rng(0)
  boxes = np.array([random_box(1000, 1000, AREA, RATIO, rng) for _ in range(4000)])
  top, left, h, w = boxes.T
  assert (top >= 0).all() and (top + h <= 1000).all() and (left + w <= 1000).all()
  log_ratio = np.log(w / h)
  assert abs(log_ratio.mean()) < 0.02 and np.abs(log_ratio).max() < math.log(4 / 3) + 0.01
  small = h * w < 500_000  # larger ones of an extreme ratio do not fit, and are drawn again
  shares = (h * w / 1e6)[small]
  assert shares.min() < 0.1 and shares.mean() == pytest.approx((0.08 + 0.5) / 2, abs=0.01)
  assert log_ratio[small].std() == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), abs=0.01)
  places = top[small] / (1000 - h[small])
  assert places.mean() == pytest.approx(0.5, abs=0.02)
  assert places.std() == pytest.approx(1 / math.sqrt(12), abs=0.02)
  assert top.min() == 0 and (top + h).max() == 1000


@pytest.mark.parametrize(
  'height, width, box', [(20, 400, Box(0, 186, 20, 27)), (400, 20, Box(186, 0, 27, 20)), (60, 60, Box(0, 0, 60, 60))]
)
def test_where_no_crop_fits_the_middle_is_taken(height, width, box):
  area = (1.0, 1.0) if height != width else (1.01, 1.02)
  assert random_box(height, width, area, RATIO, np.random.default_rng(0)) == box


@pytest.mark.parametrize(
  'box',
  [
    Box(20, 30, 25, 31),  # enlarged
    Box(0, 0, 40, 44),
    Box(30, 41, 64, 64),
    Box(11, 3, 70, 80),
    Box(0, 0, 150, 180),
    Box(10, 10, 24, 90),  # enlarged one way only
  ],
)
def test_resized_as_pillow_does(box):
  got = resize_box(PICTURE, box, (32, 32))
  assert got.shape == (32, 32, 3) and got.dtype == np.uint8
  error = got.astype(int) - with_pillow(PICTURE, box, (32, 32))
  assert np.abs(error).mean() < 1.0
  assert abs(error.mean()) < 0.25  # neither brighter nor darker
  assert np.percentile(np.abs(error), 99) <= 5


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'WEBP'])
def test_files_and_pixels_give_the_same_crop(kind):
  data = encode(PICTURE, kind)
  augment = dataclasses.replace(PLAIN, size=(80, 80))
  for seed in range(6):
    from_file = augment(data, np.random.default_rng(seed), 'key')
    from_pixels = augment(decode(data), np.random.default_rng(seed), 'key')
    np.testing.assert_array_equal(from_file, from_pixels)


def test_a_large_picture_is_decoded_smaller():
  pixels = photo(600, 600)
  data = encode(pixels, quality=95)
  reduced = 0
  for seed in range(8):
    partly, _ = PLAIN.read_crop(data, np.random.default_rng(seed), '')
    reduced += partly.shape[1] < 600
    box = random_box(600, 600, AREA, RATIO, np.random.default_rng(seed))
    got = PLAIN(data, np.random.default_rng(seed), '')
    assert np.abs(got - with_pillow(pixels, box, (32, 32))).mean() < 2
  assert reduced


def test_half_of_the_crops_are_flipped():
  flipping = dataclasses.replace(PLAIN, flip=0.5)
  flipped = 0
  for seed in range(100):
    straight = PLAIN(PICTURE, np.random.default_rng(seed), '')
    got = flipping(PICTURE, np.random.default_rng(seed), '')
    flipped += np.array_equal(got, straight[:, ::-1])
    assert np.array_equal(got, straight) or np.array_equal(got, straight[:, ::-1])
  assert 35 <= flipped <= 65


@pytest.mark.parametrize(
  'data, cause',
  [
    (encode(PICTURE[:7]), 'image_tiny'),
    (encode(PICTURE[:, :7], 'PNG'), 'image_tiny'),
    (encode(PICTURE[:7])[:100], 'image_truncated'),
    (encode(PICTURE)[:-500], 'image_truncated'),
    (encode(PICTURE, 'PNG')[:-500], 'image_truncated'),
    (encode(PICTURE, 'WEBP')[:-500], 'image_corrupt'),
    (b'<html>404</html>', 'image_corrupt'),
    (png_header(60_000, 60_000), 'image_huge'),  # Pillow itself refuses it
    (png_header(12_000, 12_000), 'image_huge'),  # Pillow warns of it
    (png_header(50, 50), 'image_truncated'),
  ],
)
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')  # pytest undoes ours
def test_bad_records_name_cause_and_key(data, cause):
  with pytest.raises(BadRecord) as caught:
    PLAIN(data, np.random.default_rng(0), 'set/0001/key')
  assert (caught.value.cause, caught.value.key) == (cause, 'set/0001/key')


@pytest.mark.parametrize('kind', ['JPEG', 'PNG'])
def test_a_bomb_is_not_decoded(kind, monkeypatch):
  data = encode(np.zeros((1100, 1000, 3), np.uint8), kind)
  monkeypatch.setattr(image_ops.images, 'decode_jpeg_rows', None)
  monkeypatch.setattr(image_ops.images, 'decode_image', None)
  with pytest.raises(BadRecord, match='image_huge'):
    PLAIN(data, np.random.default_rng(0), 'key')
