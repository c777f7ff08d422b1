"""PAMR against its equations, written out pixel by pixel."""

import jax
import numpy as np
import pytest

from groupvit_jax.eval import pamr

DILATIONS = (1, 2, 4)


def slow_weights(image, dilations):
  """{(row, column): {neighbour: weight}}; a neighbour beyond the border is the nearest pixel, and may come twice."""
  height, width, _ = image.shape
  weights = {}
  for y in range(height):
    for x in range(width):
      inside = lambda dy, dx, y=y, x=x: (min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1))
      kernel = [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
      sigma = np.std([image[inside(*offset)] for offset in kernel], axis=0, ddof=1)
      neighbours = [inside(*offset) for offset in kernel if offset != (0, 0)]
      k = np.array([-(np.abs(image[y, x] - image[n]) / (1e-8 + 0.1 * sigma)).mean() for n in neighbours])
      e = np.exp(k - k.max())
      weights[y, x] = list(zip(neighbours, e / e.sum()))
  return weights


def slow_refine(masks, image, iterations, dilations):
  weights = slow_weights(np.asarray(image, np.float64), dilations)
  for _ in range(iterations):
    masks = np.array(
      [
        [sum(weight * masks[n] for n, weight in weights[y, x]) for x in range(masks.shape[1])]
        for y in range(masks.shape[0])
      ]
    )
  return masks


def case(rng, size=(2, 9, 11), masks=3):
  images = rng.integers(0, 256, (*size, 3), np.uint8)
  images[:, :4, :5] = 200  # flat parts have no deviation of their own
  return jax.nn.one_hot(rng.integers(0, masks, size), masks), images


@pytest.mark.parametrize('dilations', [DILATIONS, (1,), (2, 24)])
def test_refines_as_the_equations_say(dilations):
  masks, images = case(np.random.default_rng(0))
  got = jax.jit(pamr.refine, static_argnames=('iterations', 'dilations'))(
    masks, images, iterations=3, dilations=dilations
  )
  for one, mask, image in zip(got, np.asarray(masks, np.float64), images):
    np.testing.assert_allclose(one, slow_refine(mask, image, 3, dilations), atol=1e-5)


def test_masks_move_to_the_edges_of_the_image():
  """Two halves of one colour each, of which a mask covers a column too many: it loses that."""
  image = np.zeros((1, 12, 12, 3), np.uint8)
  image[:, :, 6:] = 255
  image += np.random.default_rng(0).integers(0, 2, image.shape, np.uint8) * (image == 0)
  left = (np.arange(12) < 7) * np.ones((1, 12, 1))
  masks = np.stack([left, 1 - left], axis=-1).astype(np.float32)
  refined = pamr.refine(masks, image, iterations=10, dilations=DILATIONS)
  np.testing.assert_allclose(refined.sum(axis=-1), 1, rtol=1e-5)
  assert np.array_equal(refined[0].argmax(axis=-1) == 0, np.broadcast_to(np.arange(12) < 6, (12, 12)))
