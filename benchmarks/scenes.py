"""Scenes a second of the embedded data set, on one core."""

import os
import statistics
import time

from benchmarks import processes
from configs import quickstart
from groupvit_jax.data.scenes import scenes

SIZES = (64, 128, 224)
REPEATS, COUNT = 5, 1000


def time_scenes(size: int) -> dict[str, float]:
  """Scenes/s of side `size`: of the first thousand, and of the thousands once nearly every sprite is made."""
  source = scenes.Scenes(size, quickstart.THINGS[''], quickstart.STUFF, seed=0, length=10**9)
  rates, start = [], time.perf_counter()
  for index in range((REPEATS + 5) * COUNT):
    source[index]
    if index == 0:
      first = time.perf_counter() - start
    if (index + 1) % COUNT == 0:
      rates.append(round(COUNT / (time.perf_counter() - start)))
      start = time.perf_counter()
  steady = rates[5:]
  return {
    'first_scene_s': round(first, 4),
    'cold_per_s': rates[0],
    'median_per_s': statistics.median(steady),
    'slowest_per_s': min(steady),
    'fastest_per_s': max(steady),
  }


def main() -> None:
  os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  processes.write({'scenes_per_repeat': COUNT, 'sizes': {str(size): time_scenes(size) for size in SIZES}})
