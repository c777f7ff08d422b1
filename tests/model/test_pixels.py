"""Random erasing: how often, where, and with what."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from groupvit_jax.model.build import build_random_erasing
from groupvit_jax.model.pixels import AREA, ASPECT, RandomErasing

BATCH, HEIGHT, WIDTH = 512, 40, 28
MARK = 100.0  # no draw from a normal distribution


@pytest.fixture(scope='module')
def erased() -> np.ndarray:
  images = jnp.full((BATCH, HEIGHT, WIDTH, 3), MARK)
  keys = jax.random.split(jax.random.key(0), BATCH)
  return np.asarray(jax.jit(RandomErasing(probability=0.25))(images, keys))


def test_a_quarter_of_the_images_loses_a_rectangle(erased):
  gone = (erased != MARK).all(axis=-1)
  assert ((erased != MARK).any(axis=-1) == gone).all()  # all channels together
  some = gone.any(axis=(1, 2))
  assert some.mean() == pytest.approx(0.25, abs=0.06)
  heights, widths = gone.any(axis=2).sum(1)[some], gone.any(axis=1).sum(1)[some]
  np.testing.assert_array_equal(gone.sum(axis=(1, 2))[some], heights * widths)  # no holes
  shares = heights * widths / (HEIGHT * WIDTH)
  assert shares.min() > 0.8 * AREA[0] and shares.max() < 1.1 * AREA[1]
  assert shares.mean() == pytest.approx(sum(AREA) / 2, abs=0.03)
  assert (heights < HEIGHT).all() and (widths < WIDTH).all()
  aspects = heights / widths
  assert aspects.min() > 0.6 * ASPECT[0] and aspects.max() < 1.6 * ASPECT[1]
  assert aspects.min() < 0.6 and aspects.max() > 1.6
  tops = gone.any(axis=2).argmax(axis=1)[some]
  assert tops.min() == 0 and (tops + heights).max() == HEIGHT


def test_the_noise_is_standard_normal_and_its_own_everywhere(erased):
  noise = erased[erased != MARK]
  assert noise.mean() == pytest.approx(0, abs=0.01) and noise.std() == pytest.approx(1, abs=0.01)
  assert len(np.unique(noise)) > 0.98 * len(noise)


def test_an_images_noise_is_a_function_of_its_key(erased):
  keys = jax.random.split(jax.random.key(0), BATCH)[5:9]
  some = RandomErasing(probability=0.25)(jnp.full((4, HEIGHT, WIDTH, 3), MARK), keys)
  np.testing.assert_array_equal(some == MARK, erased[5:9] == MARK)
  # Batches of other sizes are divided otherwise among a processor's vector lanes, some of which round differently.
  np.testing.assert_allclose(some, erased[5:9], rtol=1e-6)


def test_nothing_fits_into_a_single_row():
  images = jnp.ones((4, 1, 8, 3))
  keys = jax.random.split(jax.random.key(0), 4)
  np.testing.assert_array_equal(RandomErasing(probability=1.0)(images, keys), images)


def test_built_from_a_config():
  build = lambda **config: build_random_erasing(ml_collections.ConfigDict(config))
  assert build(name='rand_augment', erase=0.25) == RandomErasing(0.25)
  assert build(name='plain', erase=0.0) is None and build(name='none') is None
