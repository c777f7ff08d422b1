"""Each operation of RandAugment against Pillow, by value; which are drawn, and how strong."""

import collections
import math

import cv2
import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest

from groupvit_jax.data import rand_augment
from groupvit_jax.data.rand_augment import FILL, OPS, RandAugment
from tests.photos import photo

SIZE = 64
OF_NAME = {op.name: op for op in OPS}
NOISE = np.random.default_rng(0).integers(40, 200, (SIZE, SIZE, 3), np.uint8)
PICTURES = (photo(SIZE, SIZE), NOISE)

# The strengths at full and at some lesser magnitude, both ways: restated from the recipe.
STRENGTHS = {
  'posterize': ((1.0, 0), (0.9, 1), (0.3, 3)),
  'solarize': ((0.9, 26), (0.5, 128)),
  'solarize_add': ((0.9, 99), (0.5, 55)),
}  # fmt: skip


def affine(*matrix):
  return lambda image: image.transform(
    image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL
  )


def blend_with(enhance):
  return lambda factor: lambda image: enhance(image).enhance(factor)


def reference_solarize_add(amount):
  return lambda image: image.point([min(i + amount, 255) if i < 128 else i for i in range(256)] * 3)


REFERENCES = {
  'autocontrast': lambda _: ImageOps.autocontrast,
  'equalize': lambda _: ImageOps.equalize,
  'invert': lambda _: ImageOps.invert,
  'posterize': lambda bits: lambda image: ImageOps.posterize(image, bits),
  'solarize': lambda threshold: lambda image: ImageOps.solarize(image, threshold),
  'solarize_add': reference_solarize_add,
  'color': blend_with(ImageEnhance.Color),
  'contrast': blend_with(ImageEnhance.Contrast),
  'brightness': blend_with(ImageEnhance.Brightness),
  'sharpness': blend_with(ImageEnhance.Sharpness),
  'rotate': lambda degrees: lambda image: image.rotate(
    degrees, Image.Resampling.BILINEAR, fillcolor=FILL),
  'shear_x': lambda factor: affine(1, factor, 0, 0, 1, 0),
  'shear_y': lambda factor: affine(1, 0, 0, factor, 1, 0),
  'translate_x': lambda share: affine(1, 0, share * SIZE, 0, 1, 0),
  'translate_y': lambda share: affine(1, 0, 0, 0, 1, share * SIZE),
}  # fmt: skip
MOVING = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')


def difference(name, argument, pixels):
  expected = np.asarray(REFERENCES[name](argument)(Image.fromarray(pixels)))
  return np.abs(OF_NAME[name].function(pixels, argument).astype(int) - expected)


def widen(mask):
  return cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) > 0


@pytest.mark.parametrize('pixels', PICTURES, ids=['photo', 'noise'])
@pytest.mark.parametrize('name', [name for name in REFERENCES if name not in MOVING])
def test_values_equal_pillow(name, pixels):
  for level in (0.05, 0.3, 0.9, 0.97):
    for sign in (1, -1):
      worst = difference(name, OF_NAME[name].argument(level, sign), pixels)
      # Grey has a fractional part that OpenCV rounds with fewer bits: one level, seldom.
      assert worst.max() <= (1 if name == 'color' else 0)
      assert worst.mean() < 0.002


@pytest.mark.parametrize('name', MOVING)
def test_moved_pixels_equal_pillow_but_for_rounding(name):
  for level, sign in ((0.9, 1), (0.9, -1), (0.33, 1)):
    argument = OF_NAME[name].argument(level, sign)
    worst = difference(name, argument, PICTURES[0])
    # Where the picture ends, OpenCV fades into the fill colour and Pillow cuts.
    outside = np.asarray(REFERENCES[name](argument)(Image.new('RGB', (SIZE, SIZE)))).any(axis=-1)
    edge = widen(outside) & widen(~outside)
    edge[[0, -1]], edge[:, [0, -1]] = True, True
    assert worst[~edge].max() <= 1
    assert outside[~edge].any() and edge.mean() < 0.15


@pytest.mark.parametrize('name', ['autocontrast', 'equalize'])
def test_a_flat_picture_stays(name):
  flat = np.full((8, 8, 3), (7, 130, 255), np.uint8)
  np.testing.assert_array_equal(OF_NAME[name].function(flat, 0), flat)


def test_no_bits_are_black():
  assert not OF_NAME['posterize'].function(PICTURES[0], 0).any()  # magnitude 10, in 2 % of the draws


def test_strengths_are_the_recipes():
  assert len(OPS) == 15 and set(OF_NAME) == set(REFERENCES)
  for name, pairs in STRENGTHS.items():
    for level, strength in pairs:
      assert OF_NAME[name].argument(level, 1) == OF_NAME[name].argument(level, -1) == strength
  for sign in (1, -1):
    strengths = {name: op.argument(0.9, sign) for name, op in OF_NAME.items()}
    for name in ('color', 'contrast', 'brightness', 'sharpness'):
      assert strengths[name] == pytest.approx(1 + sign * 0.81)
    assert strengths['rotate'] == pytest.approx(sign * 27)
    assert strengths['shear_x'] == strengths['shear_y'] == pytest.approx(sign * 0.27)
    assert strengths['translate_x'] == strengths['translate_y'] == pytest.approx(sign * 0.405)
  assert OF_NAME['color'].argument(1.0, -1) == 0.1


def test_draws_are_uniform_and_half_of_them_applied(monkeypatch):
  drawn = []
  spies = [
    rand_augment.Op(
      op.name, lambda level, sign: (level, sign), lambda pixels, argument, name=op.name: drawn.append((name, *argument))
    )
    for op in OPS
  ]
  monkeypatch.setattr(rand_augment, 'OPS', spies)
  rng = np.random.default_rng(0)
  count = 6000
  for _ in range(count):
    RandAugment(num_ops=2, probability=0.5, magnitude=9.0, magnitude_std=0.5)(PICTURES[0], rng)
  assert len(drawn) / count == pytest.approx(1.0, abs=0.03)
  names = collections.Counter(name for name, _, _ in drawn)
  assert len(names) == 15
  assert max(abs(n - count / 15) for n in names.values()) < 4.5 * math.sqrt(count / 15)
  levels, signs = (np.array(values) for values in list(zip(*drawn))[1:])
  assert levels.mean() == pytest.approx(0.9, abs=0.005)
  assert levels.std() == pytest.approx(0.05, abs=0.005)
  assert levels.max() == 1.0  # cut there
  assert abs(signs.mean()) < 0.05
