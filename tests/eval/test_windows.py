"""Pictures cut into windows, on the host."""

import dataclasses
import threading

import cv2
import numpy as np
import pytest

from groupvit_jax.eval import labelled, protocols, window_encoder

GROUPVIT = protocols.GROUPVIT


@pytest.fixture
def rng():
  return np.random.default_rng(0)


@pytest.mark.parametrize(
  'size, want',
  [
    ((375, 500), (448, 597)),
    ((500, 375), (597, 448)),
    ((333, 500), (448, 673)),  # 672.67 is rounded
    ((1024, 2048), (448, 896)),
    ((400, 2000), (410, 2048)),  # the long side is bounded: 409.6
    ((10, 4000), (16, 2048)),  # never less than a patch
    ((448, 448), (448, 448)),
  ],
)
def test_resized_size(size, want):
  assert window_encoder.resized_size(*size, GROUPVIT, 16) == want


def test_antialiasing_averages_where_a_picture_shrinks(rng):
  protocol = dataclasses.replace(GROUPVIT, short_side=4, window=4, stride=4, antialias=True)
  image = rng.integers(0, 256, (16, 16, 3), np.uint8)
  window = window_encoder.cut_image(image, protocol, 2, key='a').windows[0]
  want = image.reshape(4, 4, 4, 4, 3).mean(axis=(1, 3))
  np.testing.assert_allclose(window, want, atol=0.51)
  # Where it grows there is nothing to average.
  small = image[:2, :2]
  want = cv2.resize(small, (4, 4), interpolation=cv2.INTER_LINEAR)
  assert np.array_equal(window_encoder.cut_image(small, protocol, 2, key='a').windows[0], want)


@pytest.mark.parametrize(
  'image, label, message',
  [
    (np.zeros((4, 4), np.uint8), None, "image 'a' is uint8 .4, 4.; make it uint8"),
    (np.zeros((4, 4, 3), np.float32), None, 'is float32'),
    (np.zeros((0, 4, 3), np.uint8), None, 'make it uint8'),
    (np.zeros((4, 5, 3), np.uint8), np.zeros((5, 4), np.uint8), 'is 4 x 5 px, its label map .5, 4.'),
  ],
)
def test_bad_pictures_are_refused(image, label, message):
  with pytest.raises(ValueError, match=message):
    window_encoder.cut_image(image, GROUPVIT, 16, key='a', label=label)


@pytest.mark.parametrize('num_threads', [0, 3])
def test_prefetch_keeps_the_order(num_threads):
  assert list(labelled.prefetch(str, range(50), num_threads=num_threads)) == [*map(str, range(50))]


def test_prefetch_works_ahead_but_not_without_bound():
  made, third = [], threading.Event()

  def make(i):
    made.append(i)
    if len(made) == 3:
      third.set()
    return i

  results = labelled.prefetch(make, range(1000), num_threads=2)
  next(results)
  assert third.wait(10)  # made without being asked for
  results.close()
  assert len(made) <= 6


def test_prefetch_passes_errors_on():
  with pytest.raises(ZeroDivisionError):
    list(labelled.prefetch(lambda i: 1 // i, [1, 0, 1], num_threads=2))
