"""Prints the speed of the embedded scenes on one core as JSON: python -m benchmarks.scenes"""

import json
import os
import statistics
import time

from configs import quickstart
from groupvit_jax.data.scenes import scenes

SIZES = (64, 128, 224)
REPEATS = 5
COUNT = 1000


def time_scenes(size: int) -> dict[str, float]:
  """Times one source as training sees it, at first and once its sprites are made.

  Args:
    size: side of the scenes in pixels.

  Returns:
    Seconds to the first scene, scenes/s of the first thousand, and the median, slowest and fastest
    scenes/s of the repeats that follow.
  """
  source = scenes.Scenes(size, quickstart.THINGS[''], quickstart.STUFF, seed=0, length=10**9)
  start = time.perf_counter()
  source[0]
  first = time.perf_counter() - start
  rates = []
  for repeat in range(REPEATS + 5):
    start = time.perf_counter()
    for index in range(repeat * COUNT, (repeat + 1) * COUNT):
      source[index]
    rates.append(COUNT / (time.perf_counter() - start))
  steady = rates[5:]  # by then nearly every pose and texture has been met
  return {
    'first_scene_s': round(first, 4),
    'cold_per_s': round(rates[0]),
    'median_per_s': round(statistics.median(steady)),
    'slowest_per_s': round(min(steady)),
    'fastest_per_s': round(max(steady)),
  }


def main() -> None:
  """Runs every size in turn, in this one process, on one core where the system lets it."""
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  print(
    json.dumps(
      {
        'things': len(quickstart.THINGS['']),
        'stuff': len(quickstart.STUFF),
        'scenes_per_repeat': COUNT,
        'repeats': REPEATS,
        'sizes': {str(size): time_scenes(size) for size in SIZES},
      },
      indent=2,
    )
  )


if __name__ == '__main__':
  main()
