"""The result of a segmentation evaluation as metrics, JSON and a table, with everything it depends on."""

from collections.abc import Mapping
import csv
import dataclasses
import io
from typing import Any

import numpy as np

from groupvit_jax.data import prompts
from groupvit_jax.eval.benchmarks import Benchmark, Published
from groupvit_jax.eval.class_names import NameSet
from groupvit_jax.eval.protocols import PARAMETERS, Protocol
from groupvit_jax.model import metrics
from groupvit_jax.model.metrics import SegmentationScores

SCORES = ('miou', 'pixel_accuracy', 'mean_accuracy')
# Metrics of every segmentation evaluation, as `Result.scalars` names them.
METRICS = tuple(prefix + name for prefix in ('', 'oracle_', 'constant_') for name in SCORES)


@dataclasses.dataclass(frozen=True)
class Result:
  """Confusion matrices, and everything they depend on.

  Attributes:
    benchmark: what was segmented.
    protocol: how, with the threshold that was used.
    names: by which classes were looked for.
    num_images: images counted.
    counts: confusion matrix [C, C], rows true.
    oracle_counts: the same with every segment named by its majority label; None if not asked for.
    health: grouping health over all windows.
    thresholds: other background thresholds that were counted along.
    threshold_counts: their confusion matrices [T, C, C].
    provenance: checkpoint, step, weights, commit, precision.
  """

  benchmark: Benchmark
  protocol: Protocol
  names: NameSet
  num_images: int
  counts: np.ndarray
  oracle_counts: np.ndarray | None
  health: Mapping[str, float]
  thresholds: tuple[float, ...]
  threshold_counts: np.ndarray
  provenance: Mapping[str, str]

  @property
  def scores(self) -> SegmentationScores:
    """Of the predictions."""
    return metrics.scores_from_counts(self.counts)

  @property
  def oracle(self) -> SegmentationScores | None:
    """Of perfect naming."""
    return None if self.oracle_counts is None else metrics.scores_from_counts(self.oracle_counts)

  @property
  def constant(self) -> tuple[str, SegmentationScores]:
    """Of calling every pixel the same class: the best such class, and its scores."""
    best, scores = metrics.best_constant_scores(self.counts)
    return self.benchmark.classes[best], scores

  @property
  def images(self) -> str:
    """How many images were counted, and of how many if that is not all of a public benchmark."""
    whole = self.benchmark.num_images
    return f'{self.num_images:,} of {whole:,}' if whole not in (0, self.num_images) else f'{self.num_images:,}'

  def unlike(self, row: Published) -> str:
    """The differences from the protocol and images of a published result; '' without any."""
    found = []
    if row.protocol != self.protocol.name:
      found.append('another protocol')
    if self.protocol.changed:
      found.append(f'changed here: {", ".join(self.protocol.changed)}')
    if self.num_images != self.benchmark.num_images:
      found.append(f'here {self.images} images')
    return '; '.join(found)

  def scalars(self) -> dict[str, float]:
    """The metrics by name, for logs."""
    rows = {'': self.scores, 'oracle_': self.oracle, 'constant_': self.constant[1]}
    found = {
      prefix + name: getattr(scores, name) for prefix, scores in rows.items() if scores is not None for name in SCORES
    }
    return found | dict(self.health)

  def settings(self) -> dict[str, Any]:
    """What the metrics hold for, in short."""
    return {
      'num_images': self.num_images,
      'num_images_published': self.benchmark.num_images or None,
      'protocol': self.protocol.to_json(),
      'provenance': dict(self.provenance),
    }

  def to_json(self) -> dict[str, Any]:
    """The metrics, and everything they depend on. nan becomes None."""
    named = lambda values: dict(zip(self.benchmark.classes, map(_number, values)))
    swept = map(metrics.scores_from_counts, self.threshold_counts)
    return {
      'benchmark': self.benchmark.name,
      **self.settings(),
      'templates': list(prompts.template_set(self.protocol.templates)),
      **self.names.to_json(),
      'background': self.benchmark.background,
      **{name: _number(value) for name, value in self.scalars().items()},
      'constant_class': self.constant[0],
      'iou': named(self.scores.iou),
      'accuracy': named(self.scores.accuracy),
      'oracle_iou': None if self.oracle is None else named(self.oracle.iou),
      'threshold_miou': [
        {'threshold': threshold, 'miou': _number(scores.miou)} for threshold, scores in zip(self.thresholds, swept)
      ],
      'published': [dataclasses.asdict(row) for row in self.benchmark.published],
    }

  def confusion_csv(self) -> str:
    """The confusion matrix: a line for each true class, pixels called each name, and pixels in all."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['is', *(f'called {name}' for name in self.benchmark.classes), 'pixels'])
    for name, row in zip(self.benchmark.classes, self.counts.tolist()):
      writer.writerow([name, *row, sum(row)])
    return text.getvalue()

  def table(self) -> str:
    """Per-class IoU and the headline metrics, in percent, as text."""
    oracle = self.oracle
    width = max(map(len, [*self.benchmark.classes, 'pixel accuracy']))
    row = lambda name, *values: '  '.join([name.ljust(width), *map(_percent, values)])
    columns = lambda pick: [pick(s) for s in (self.scores, oracle) if s is not None]
    parameters = ', '.join(f'{key}={getattr(self.protocol, key)}' for key in PARAMETERS)
    lines = [
      f'{self.benchmark.name}, {self.images} images, protocol {self.protocol.title}\n({parameters})',
      '',
      '  '.join([' ' * width, '   IoU', *['oracle'] * bool(oracle)]),
    ]
    for name, *iou in zip(self.benchmark.classes, *columns(lambda s: s.iou)):
      lines.append(row(name, *iou))
    constant, scores = self.constant
    lines += [
      '',
      row('mIoU', *columns(lambda s: s.miou)),
      row('pixel accuracy', *columns(lambda s: s.pixel_accuracy)),
      row('mean accuracy', *columns(lambda s: s.mean_accuracy)),
      f'everything called {constant!r}: mIoU {scores.miou:.1%}, pixel accuracy {scores.pixel_accuracy:.1%}',
    ]
    return '\n'.join(lines)


def _number(value: float) -> float | None:
  return None if np.isnan(value) else float(value)


def _percent(value: float) -> str:
  return '     -' if np.isnan(value) else f'{100 * value:6.1f}'
