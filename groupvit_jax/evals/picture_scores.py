"""How well each picture was labelled, to find those worth a look."""

from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from groupvit_jax import metrics
from groupvit_jax.evals.segmenter import LabelMap
from groupvit_jax.evals.semantic_seg import LabelledSource
from groupvit_jax.evals.window_encoder import EncodedPicture


class PictureScores:
  """mIoU of each picture of a source, which is read through this, over the classes that it or its label map has."""

  def __init__(self, source: LabelledSource):
    """Nothing is read yet.

    Args:
      source: the pictures.
    """
    self._source = source
    self.places: dict[str, int] = {}  # key -> index, of what this host has read
    self._miou = np.full(len(source), np.nan)

  @property
  def classes(self) -> tuple[str, ...]:
    """C names in label order."""
    return self._source.classes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the source's record, and notes its place."""
    record = self._source[index]
    self.places[record['key']] = index
    return record

  def note(self, encoded: EncodedPicture, found: LabelMap) -> None:
    """Scores a picture's label map against its truth."""
    truth, num_classes = encoded.picture.label.astype(int), len(self.classes)
    counted = truth != metrics.IGNORE_LABEL
    cells = truth[counted] * num_classes + found.labels[counted]
    counts = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    self._miou[self.places[encoded.picture.key]] = metrics.scores_from_counts(counts).miou

  def gather(self) -> np.ndarray:
    """mIoU of every picture, on every host: [pictures], nan where nothing is labelled."""
    if jax.process_count() == 1:
      return self._miou
    hosts = multihost_utils.process_allgather(np.nan_to_num(self._miou, nan=-1.0))
    best = np.asarray(hosts).max(axis=0)
    return np.where(best < 0, np.nan, best)


def pick(miou: np.ndarray, each: int) -> dict[str, list[int]]:
  """The best, median and worst pictures, none of them twice.

  Args:
    miou: of every picture, nan where it has none.
    each: how many of each kind, at most.

  Returns:
    'best', 'median' and 'worst' to places; the best ones first, the worst first.
  """
  order = [int(i) for i in np.argsort(-miou, kind='stable') if not np.isnan(miou[i])]
  each = min(each, -(-len(order) // 3))
  best = order[:each]
  worst = [i for i in reversed(order) if i not in best][:each]
  rest = [i for i in order if i not in best and i not in worst]
  start = max(len(rest) - each, 0) // 2
  return {'best': best, 'median': rest[start : start + each], 'worst': worst}
