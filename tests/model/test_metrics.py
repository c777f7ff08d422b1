"""Metrics against scikit-learn, by hand, and as sums that merge."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics

from groupvit_jax.model import metrics


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def random_labels(rng, shape=(3, 20, 30), num_classes=6):
  truth, predicted = rng.integers(0, num_classes, (2, *shape)).astype(np.uint8)
  truth[rng.random(shape) < 0.1] = 255
  return truth, predicted


def test_confusion_matrix_is_that_of_scikit_learn(rng):
  truth, predicted = random_labels(rng)
  state = metrics.ConfusionMatrix.empty(6)
  add = jax.jit(lambda s, t, p: s.merge(metrics.ConfusionMatrix.from_labels(t, p, 6)))
  for t, p in zip(truth, predicted):
    state = add(state, t, p)
  valid = truth != 255
  t, p = truth[valid], predicted[valid]
  assert np.array_equal(state.counts(), sklearn.metrics.confusion_matrix(t, p, labels=range(6)))
  scores = state.compute()
  np.testing.assert_allclose(scores.iou, sklearn.metrics.jaccard_score(t, p, average=None))
  np.testing.assert_allclose(scores.pixel_accuracy, sklearn.metrics.accuracy_score(t, p))
  np.testing.assert_allclose(scores.mean_accuracy, sklearn.metrics.balanced_accuracy_score(t, p))
  np.testing.assert_allclose(scores.miou, scores.iou.mean())


def test_absent_classes_are_left_out_as_mmsegmentation_does():
  # Class 2 is predicted but never true (IoU 0, no accuracy), class 3 is neither (no IoU).
  truth = jnp.array([0, 0, 0, 0, 1, 1, 255], jnp.uint8)
  predicted = jnp.array([0, 0, 0, 1, 1, 2, 3], jnp.uint8)
  scores = metrics.ConfusionMatrix.from_labels(truth, predicted, 4).compute()
  np.testing.assert_allclose(scores.iou, [3 / 4, 1 / 3, 0, np.nan])
  np.testing.assert_allclose(scores.accuracy, [3 / 4, 1 / 2, np.nan, np.nan])
  assert scores.miou == pytest.approx((3 / 4 + 1 / 3) / 3)
  assert scores.mean_accuracy == pytest.approx(5 / 8)
  assert scores.pixel_accuracy == pytest.approx(4 / 6)


def test_counts_are_exact_where_float32_and_int32_are_not():
  one = metrics.ConfusionMatrix.from_labels(jnp.array([0]), jnp.array([0]), 1)
  state, want = one, 1
  for _ in range(40):  # doubling: passes 2**24 and 2**31
    state, want = state.merge(state).merge(one), 2 * want + 1
  assert state.counts()[0, 0] == want == 2**41 - 1
  assert state.counts().dtype == np.int64


def test_no_pixels_give_nan_and_no_warning(recwarn):
  scores = metrics.ConfusionMatrix.empty(3).compute()
  assert np.isnan([scores.miou, scores.mean_accuracy, scores.pixel_accuracy]).all() and not len(recwarn)


def test_oracle_names_each_segment_by_its_majority():
  truth = jnp.array([[[0, 0, 1], [2, 2, 255]], [[1, 1, 1], [0, 0, 0]]], jnp.uint8)
  segments = jnp.array([[[0, 0, 0], [1, 1, 1]], [[0, 0, 0], [0, 1, 1]]], jnp.int32)
  state = metrics.ConfusionMatrix.oracle(truth, segments, num_segments=2, num_classes=3)
  # Image 1: segment 0 is called 0, segment 1 is called 2. Image 2: segment 0 is called 1, segment 1
  # is called 0.
  assert state.counts().tolist() == [[4, 1, 0], [1, 3, 0], [0, 0, 2]]


def test_best_constant_class():
  counts = metrics.ConfusionMatrix.from_labels(
    jnp.array([0, 1, 1, 1, 2, 2], jnp.uint8), jnp.array([2, 2, 0, 1, 1, 1], jnp.uint8), 4
  ).counts()
  best, scores = metrics.best_constant_scores(counts)
  assert best == 1
  assert scores.pixel_accuracy == 0.5
  assert scores.miou == pytest.approx(0.5 / 3)  # class 3 is neither true nor predicted


def test_grouping_health_by_hand():
  decided = jnp.array([[[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]])  # [1, S=3, N=4]
  undecided = jnp.full((1, 2, 3), 0.5)
  health = metrics.GroupingHealth.from_assignments([decided, undecided])
  figures = health.merge(health).compute()
  assert figures == pytest.approx(
    {
      'stage1/entropy': 0.0,
      'stage2/entropy': np.log(2),
      'stage1/segments_in_use': 2.0,
      'stage2/segments_in_use': 1.0,
      'stage1/largest_segment': 0.75,
      'stage2/largest_segment': 1.0,
    }
  )


def test_grouping_health_averages_over_images():
  a = jnp.eye(2)[None]  # two segments, one token each
  b = jnp.array([[[1.0, 1.0], [0.0, 0.0]]])  # one segment
  whole = metrics.GroupingHealth.from_assignments([jnp.concatenate([a, b, b])])
  parts = metrics.GroupingHealth.from_assignments([a])
  parts = parts.merge(metrics.GroupingHealth.from_assignments([jnp.concatenate([b, b])]))
  merged = metrics.GroupingHealth.empty(1).merge(parts)
  assert merged.compute() == whole.compute()
  assert whole.compute()['stage1/segments_in_use'] == pytest.approx(4 / 3)
  masked = metrics.GroupingHealth.from_assignments([jnp.concatenate([a, b])], jnp.array([1, 0]))
  assert masked.compute()['stage1/segments_in_use'] == 2
