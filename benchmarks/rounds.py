"""Rounds of work in processes that take turns, so that all meet the same machine."""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import os
import pathlib
import resource
import select
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}  # as the Makefile sets it
ROOT = pathlib.Path(__file__).parents[1]


class Rate(NamedTuple):
  """Pictures a second of one core: by its clock, and by the wall's, which other programs slow."""

  per_cpu_s: float
  per_wall_s: float


class Side:
  """A process that works when asked to, and waits for the other side's turn otherwise."""

  def __init__(
    self,
    python: str,
    module: str,
    arguments: Sequence[str],
    cores: set[int] | None,
    threads: int = 1,
    wait: bool = True,
    huge: bool = False,
  ):
    """Starts the process, with huge pages if told so; waits until it is ready to work, unless told not to."""
    environment = os.environ | {'OMP_NUM_THREADS': str(threads), 'MKL_NUM_THREADS': str(threads)}
    environment |= HUGE_PAGES if huge else {}
    self._process = subprocess.Popen(
      [python, '-m', module, *arguments],
      cwd=ROOT,
      env=environment,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    if cores and hasattr(os, 'sched_setaffinity'):
      os.sched_setaffinity(self._process.pid, cores)
    if wait:
      self.facts  # noqa: B018 (which it says when it is ready)
    self.peak_mb = 0.0  # the most memory there was: the process's, or what it serves as that

  @functools.cached_property
  def facts(self) -> dict[str, object]:
    """What the process says of itself once it is ready."""
    return self._answer()

  def ready(self, seconds: float) -> bool:
    """Waits so long at most for the process to be ready, or to end."""
    return bool(select.select([self._process.stdout], [], [], max(0, seconds))[0])

  def release(self) -> None:
    """Lets a process go on that waits for a line before it takes memory."""
    self._process.stdin.write('\n')
    self._process.stdin.flush()

  def run(self, work: str, pictures: int, before: int = 0) -> Rate:
    """Does some work once, on at least so many pictures; on others before, which are not timed."""
    self._process.stdin.write(json.dumps([work, pictures, before]) + '\n')
    self._process.stdin.flush()
    answer = self._answer()
    self.peak_mb = answer['peak_mb']
    return Rate(answer['pictures'] / answer['cpu_s'], answer['pictures'] / answer['wall_s'])

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()

  def kill(self) -> None:
    """Ends the process whatever it is doing."""
    self._process.kill()
    self._process.wait()

  def _answer(self) -> dict[str, object]:
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'{" ".join(self._process.args)} ended with {self._process.wait()}')
    return json.loads(line)


def process_peak_mb() -> float:
  """Memory of this process, the largest there was."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(
  facts: dict[str, object], works: Mapping[str, Callable[[int], int]], peak_mb: Callable[[], float] = process_peak_mb
) -> None:
  """The other end of a `Side`: each work takes a number of pictures and returns how many it did."""
  answers, sys.stdout = sys.stdout, sys.stderr
  print(json.dumps(facts), file=answers, flush=True)
  for line in sys.stdin:
    work, pictures, before = json.loads(line)
    if before:
      works[work](before)
    wall, cpu = time.perf_counter(), time.process_time()
    done = works[work](pictures)
    spent = {'cpu_s': time.process_time() - cpu, 'wall_s': time.perf_counter() - wall}
    print(json.dumps({'pictures': done, 'peak_mb': peak_mb()} | spent), file=answers, flush=True)


def record_turns(
  sides: Mapping[str, Side], works: Sequence[tuple[str, str]], rounds: int, pictures: int, before: int = 0
) -> dict[tuple[str, str], list[Rate]]:
  """Runs each (side, work) once a round, and once before the first; returns the rates of each round.

  With `before`, so many pictures open each turn without being timed. What a side has freed goes to others meanwhile, or
  from a virtual machine to its host, and to get it back takes a second or more for each GiB.
  """
  found = {pair: [] for pair in works}
  for number in range(rounds + 1):
    for side, work in works:
      rate = sides[side].run(work, pictures, before)
      if number:
        found[side, work].append(rate)
  return found


def take_turns(
  sides: Mapping[str, Side], works: Sequence[tuple[str, str]], rounds: int, pictures: int
) -> dict[tuple[str, str], Rate]:
  """The medians of `record_turns`."""
  found = record_turns(sides, works, rounds, pictures)
  return {pair: Rate(*map(statistics.median, zip(*rates))) for pair, rates in found.items()}
