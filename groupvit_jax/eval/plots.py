"""Curves as pictures."""

import io

import numpy as np
from PIL import Image

from groupvit_jax.eval.result import Result
from groupvit_jax.model import metrics


def threshold_curve(result: Result) -> np.ndarray:
  """mIoU over the background threshold, with the one that was used and the best one.

  Args:
    result: with `thresholds`.

  Returns:
    uint8 [H, W, 3].
  """
  from matplotlib.figure import Figure  # half a second: only for those who use it

  rows = [
    (t, 100 * metrics.scores_from_counts(counts).miou) for t, counts in zip(result.thresholds, result.threshold_counts)
  ]
  used = result.protocol.threshold, 100 * result.scores.miou
  best = max(rows, key=lambda row: row[1])
  figure = Figure(figsize=(7, 4), dpi=120, layout='constrained')
  axes = figure.add_subplot()
  axes.plot(*zip(*sorted([*rows, used])), marker='.', color='#0077dd')
  axes.plot(*used, 'o', color='#111111', label=f'used: {used[0]:g}, mIoU {used[1]:.1f}')
  axes.plot(*best, '*', markersize=13, color='#dd5500', label=f'best of the sweep: {best[0]:g}, mIoU {best[1]:.1f}')
  axes.set(
    xlabel='background threshold',
    ylabel='mIoU, percent',
    title=f'{result.benchmark.name}, {result.pictures} pictures, protocol {result.protocol.name}'
    + ', changed' * bool(result.protocol.changed),
  )
  axes.grid(alpha=0.3)
  axes.legend()
  data = io.BytesIO()
  figure.savefig(data, format='png')
  return np.asarray(Image.open(data).convert('RGB'))
