"""How well each picture was labelled, to find those worth a look."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from groupvit_jax.eval.labeller import LabelMap
from groupvit_jax.eval.semantic_seg import LabelledSource
from groupvit_jax.eval.window_encoder import EncodedPicture
from groupvit_jax.model import metrics
from groupvit_jax.running import processes


class PictureScore(NamedTuple):
  """A picture's name, and its mIoU over the classes that it or its label map has: nan where nothing is labelled."""

  key: str
  miou: float


class PictureScores:
  """Scores each picture of a source, which is read through this."""

  def __init__(self, source: LabelledSource):
    """Nothing is read yet.

    Args:
      source: the pictures.
    """
    self._source = source
    self._places: dict[str, int] = {}  # key -> index, of what this host has read
    self._found: dict[int, PictureScore] = {}

  @property
  def classes(self) -> tuple[str, ...]:
    """C names in label order."""
    return self._source.classes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns the source's record, and notes its place."""
    record = self._source[index]
    self._places[record['key']] = index
    return record

  def note(self, encoded: EncodedPicture, found: LabelMap) -> None:
    """Scores a picture's label map against its truth."""
    truth, num_classes = encoded.picture.label.astype(int), len(self.classes)
    counted = truth != metrics.IGNORE_LABEL
    cells = truth[counted] * num_classes + found.labels[counted]
    counts = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    key = encoded.picture.key
    self._found[self._places[key]] = PictureScore(key, float(metrics.scores_from_counts(counts).miou))

  def gather(self) -> list[PictureScore]:
    """The pictures of all hosts in the order of the source; the same on every host."""
    found = [
      row
      for host in processes.all_gather_objects([[place, *score] for place, score in self._found.items()])
      for row in host
    ]
    return [PictureScore(*score) for _, *score in sorted(found)]


def pick(miou: Sequence[float], each: int) -> dict[str, list[int]]:
  """The best, median and worst pictures, none of them twice.

  Args:
    miou: of every picture, nan where it has none.
    each: how many of each kind, at most.

  Returns:
    'best', 'median' and 'worst' to places; the best ones first, the worst first.
  """
  order = [int(i) for i in np.argsort(np.negative(miou), kind='stable') if not np.isnan(miou[i])]
  each = min(each, -(-len(order) // 3))
  best = order[:each]
  worst = [i for i in reversed(order) if i not in best][:each]
  rest = [i for i in order if i not in best and i not in worst]
  start = max(len(rest) - each, 0) // 2
  return {'best': best, 'median': rest[start : start + each], 'worst': worst}
