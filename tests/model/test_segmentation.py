"""Label maps from assignments, on arrays small enough to work out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupvit_jax.model import segmentation


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def placement(tops, lefts, window, resized, original, slots=None):
  slots = slots or len(tops)
  pad = [0] * (slots - len(tops))
  arrays = (tops + pad, lefts + pad, len(tops), window, resized, original)
  return segmentation.Placement(*(jnp.asarray(a, jnp.int32) for a in arrays))


def test_token_affinity_by_hand():
  first = jnp.array([[[1.0, 0.25], [0.0, 0.75]]])  # [B=1, S=2, N=2]
  second = jnp.array([[[0.5, 0.0], [0.5, 1.0]]])
  assert segmentation.token_affinity([first, second])[0].tolist() == [[0.5, 0.5], [0.125, 0.875]]
  assert segmentation.token_affinity([first])[0].tolist() == [[1.0, 0.0], [0.25, 0.75]]


@pytest.mark.parametrize('size_in, size_out', [(4, 8), (3, 10), (7, 5), (1, 4), (5, 5), (18, 300)])
def test_interpolation_is_that_of_torch(size_in, size_out, rng, torch):
  line = rng.normal(size=size_in)
  want = torch.nn.functional.interpolate(
    torch.tensor(line)[None, None], size=size_out, mode='linear', align_corners=False
  )[0, 0]
  got = segmentation.interpolation_matrix(size_in, size_out) @ line.astype(np.float32)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_interpolation_is_exact_in_large_pictures():
  index = np.arange(8000)
  centre = (index + 0.5) * 2048 / 8000 - 0.5
  low, _, weight = segmentation.interpolation_taps(jnp.asarray(index), 2048, 8000)
  np.testing.assert_allclose(low + np.asarray(weight, np.float64), np.maximum(centre, 0), atol=1e-12 + 6e-8)
  assert np.array_equal(low, np.floor(np.maximum(centre, 0)))


def test_segment_map_upsamples_before_the_argmax():
  # Two tokens side by side, 4 pixels each: the border lies where the interpolated affinities cross,
  # not between tokens.
  affinity = jnp.array([[[0.9, 0.1], [0.4, 0.6]]])
  got = segmentation.segment_map(affinity, (1, 2), (2, 8))
  # Affinity to segment 0 at columns 0-7: .9 .9 .8375 .7125 .5875 .4625 .4 .4
  assert got[0].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]] * 2


@pytest.mark.parametrize('num_classes', [3, 9])
def test_padding_scores_nothing_and_changes_nothing(num_classes, rng):
  """Also where the filter keeps more classes than there are, and where padding fits best."""
  image, segments, text = (jnp.asarray(rng.normal(size=s)) for s in ((2, 6), (2, 3, 6), (num_classes, 6)))
  options = dict(class_filter=5, double_softmax=True)
  want = segmentation.class_scores(image, segments, text, jnp.asarray(1.5), **options)
  padded, exists = jnp.concatenate([text, image, segments[0]]), jnp.arange(num_classes + 5) < num_classes
  got = segmentation.class_scores(image, segments, padded, jnp.asarray(1.5), **options, exists=exists)
  np.testing.assert_allclose(got[:, :, :num_classes], want, atol=1e-6)
  assert not got[:, :, num_classes:].any()


def test_class_scores_clamp_the_scale_and_take_fewer_classes_than_the_filter():
  image, segments = jnp.array([[1.0, 0.0]]), jnp.array([[[1.0, 0.0]]])
  text = jnp.array([[3.0, 4.0], [4.0, 3.0]])  # cosines 0.6 and 0.8
  got = segmentation.class_scores(image, segments, text, jnp.asarray(50.0), class_filter=5, double_softmax=False)
  np.testing.assert_allclose(got[0, 0, 0], 1 / (1 + np.exp(20)), rtol=1e-4)


def test_background_by_hand():
  scores = jnp.array([[[0.5, 0.1], [0.2, 0.3], [0.1, 0.6]]])  # best per segment .5 .3 .6
  thresholds = jnp.array([0.4, 0.55, 0.95])
  window = segmentation.background_scores(scores, thresholds, per_window=True)
  # At 0.95 the window's own best (0.6) is the bound: its best segment is never background.
  assert window[0].tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 0]]
  everywhere = segmentation.background_scores(scores, thresholds, per_window=False)
  np.testing.assert_allclose(everywhere, np.broadcast_to([0.4, 0.55, 0.95], (1, 3, 3)))


def stitch(segments, scores, where, num_pixels):
  """Scores [P, C] of the first pixels of a picture."""
  shares = segmentation.pixel_shares(segments, scores.shape[1], where, jnp.arange(num_pixels))
  return segmentation.stitch(shares, scores, where.num_windows).T


def test_stitch_by_hand():
  # One row of 3 pixels, two windows of 2 that share the middle one; the third slot holds rubbish
  # and is not used.
  segments = jnp.array([[[0, 1]], [[1, 0]], [[1, 1]]], jnp.uint8)
  scores = jnp.array([[[1.0], [2.0]], [[10.0], [20.0]], [[500.0], [500.0]]])
  where = placement([0, 0], [0, 1], [1, 2], [1, 3], [1, 3], slots=3)
  got = stitch(segments, scores, where, 3)
  assert got[:, 0].tolist() == [1.0, (2.0 + 20.0) / 2, 10.0]
  # The same at twice the size: half-pixel bilinear of those three.
  where = placement([0, 0], [0, 1], [1, 2], [1, 3], [2, 6], slots=3)
  got = stitch(segments, scores, where, 12).reshape(2, 6)
  np.testing.assert_allclose(got, [[1, 3.5, 8.5, 10.75, 10.25, 10]] * 2)


def stitching_case(rng, slots=7):
  """Four overlapping windows of a small picture; the other slots hold rubbish."""
  where = placement([0, 0, 3, 3], [0, 4, 0, 4], [6, 6], [9, 10], [23, 17], slots)
  segments = rng.integers(0, 4, (slots, 6, 6)).astype(np.uint8)
  return segments, rng.random((slots, 4, 3)).astype(np.float32), where


def test_shares_sum_to_one_also_beyond_the_picture(rng):
  segments, _, where = stitching_case(rng)
  shares = segmentation.pixel_shares(jnp.asarray(segments), 4, where, jnp.arange(23 * 17 + 40))
  np.testing.assert_allclose(shares[:4].sum(axis=(0, 1)), 1, rtol=1e-6)


@pytest.mark.parametrize('num_classes', [3, 16, 40])
def test_best_classes_are_the_argmax(num_classes, rng):
  segments, _, where = stitching_case(rng)
  shares = segmentation.pixel_shares(jnp.asarray(segments), 4, where, jnp.arange(23 * 17))
  scores = rng.random((7, 4, num_classes)).astype(np.float32)
  scores[:, :, rng.random(num_classes) < 0.5] = 0  # filtered out
  scores[4:] = 0
  labels, best = segmentation.best_classes(shares, jnp.asarray(scores), where.num_windows)
  want = np.einsum('ksp,ksc->pc', np.asarray(shares[:4], np.float64), scores[:4])
  np.testing.assert_allclose(best, want.max(axis=1), rtol=1e-5)
  assert np.array_equal(labels, want.argmax(axis=1))


def test_best_class_of_equals_is_the_first():
  shares = jnp.ones((1, 1, 2))
  scores = jnp.array([[[0.0, 0.3, 0.1, 0.3]]])
  labels, _ = segmentation.best_classes(shares, scores, jnp.asarray(1))
  assert labels.tolist() == [1, 1]
  labels, best = segmentation.best_classes(shares, 0 * scores, jnp.asarray(1))
  assert labels.tolist() == [0, 0] and best.tolist() == [0, 0]


@pytest.mark.parametrize('scale, exact', [(1.0, True), (3e-8, False)])
def test_best_classes_of_a_softmax_tie_where_it_does(scale, exact, rng):
  """As in float32 over all classes at once; the last two are padding. Rounding decides about scores 1e-7 apart."""
  shares = jax.nn.softmax(jnp.asarray(rng.normal(size=(2, 4, 500))), axis=1) / 2
  scores = scale * rng.random((2, 4, 22)).astype(np.float32)
  scores[:, :, rng.random(22) < 0.5] = 0
  scores[:, :, 20:] = 0
  labels, _ = segmentation.best_classes(shares, jnp.asarray(scores), jnp.asarray(2), exists=jnp.arange(22) < 20)
  totals = segmentation.stitch(shares, jnp.asarray(scores[:, :, :20]), jnp.asarray(2))
  np.testing.assert_array_equal(labels, jax.nn.softmax(totals, axis=0).argmax(axis=0))
  assert np.array_equal(labels, totals.argmax(axis=0)) == exact


def test_segment_overlap_counts_labels(rng):
  segments, _, where = stitching_case(rng)
  truth = rng.integers(0, 5, 23 * 17).astype(np.uint8)
  truth[::7] = 255
  shares = segmentation.pixel_shares(jnp.asarray(segments), 4, where, jnp.arange(23 * 17))
  got = segmentation.segment_overlap(shares, jnp.asarray(truth), where.num_windows, 5)
  is_label = truth[:, None] == np.arange(5)
  np.testing.assert_allclose(got[:4], np.einsum('ksp,pc->ksc', shares[:4], is_label), atol=1e-3)
  assert not got[4:].any()
  np.testing.assert_allclose(got.sum(), (truth != 255).sum(), rtol=1e-5)
