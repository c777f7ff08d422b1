"""Processes that work in turns, so that both sides of a comparison meet the same machine."""

from collections.abc import Callable, Mapping, Sequence
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}  # as the Makefile sets it
ROOT = pathlib.Path(__file__).parents[1]


class Rate(NamedTuple):
  """Images a second, by the process's clock and by the wall's."""

  per_cpu_s: float
  per_wall_s: float


def median(rates: Sequence[Rate]) -> Rate:
  return Rate(*map(statistics.median, zip(*rates)))


class Side:
  """A process that works when asked to, and waits otherwise.

  Attributes:
    facts: what the process reports of itself, as of its last answer.
    peak_mb: the most memory it had.
  """

  def __init__(
    self,
    module: str,
    arguments: Sequence[str],
    *,
    python: str = sys.executable,
    cores: set[int] | None = None,
    huge: bool = False,
  ):
    """Starts a process, on some cores or on all, with huge pages where told so; does not wait for it."""
    available = os.sched_getaffinity(0)
    threads = str(len(cores or available))
    self._process = subprocess.Popen(
      [python, '-m', f'benchmarks.{module}', *arguments],
      cwd=ROOT,
      env=os.environ | {'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads} | (HUGE_PAGES if huge else {}),
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
    )
    os.sched_setaffinity(self._process.pid, cores or available)
    self.facts, self.peak_mb = {}, 0.0

  def wait(self) -> 'Side':
    """Returns once the process is ready; raises SystemExit when it ends."""
    self.facts = self.facts or self._answer()
    return self

  def run(self, work: str, images: int, before: int = 0) -> Rate:
    """Times some work on at least so many images, after others that are not timed."""
    self.wait()
    self._process.stdin.write(json.dumps([work, images, before]) + '\n')
    self._process.stdin.flush()
    answer = self._answer()
    self.facts, self.peak_mb = answer['facts'], answer['peak_mb']
    return Rate(answer['images'] / answer['cpu_s'], answer['images'] / answer['wall_s'])

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()

  def _answer(self) -> dict[str, object]:
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f'{" ".join(self._process.args)} ended with {self._process.wait()}')
    return json.loads(line)


def process_peak_mb() -> float:
  """The most memory that this process had."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve(
  facts: dict[str, object], works: Mapping[str, Callable[[int], int]], peak_mb: Callable[[], float] = process_peak_mb
) -> None:
  """The other end of a `Side`: each work takes a number of images and returns how many it did."""
  answers, sys.stdout = sys.stdout, sys.stderr
  print(json.dumps(facts), file=answers, flush=True)
  for line in sys.stdin:
    work, images, before = json.loads(line)
    if before:
      works[work](before)
    wall, cpu = time.perf_counter(), time.process_time()
    done = works[work](images)
    spent = {'cpu_s': time.process_time() - cpu, 'wall_s': time.perf_counter() - wall}
    print(json.dumps({'images': done, 'peak_mb': peak_mb(), 'facts': facts} | spent), file=answers, flush=True)


def take_turns(
  sides: Mapping[str, Side], works: Sequence[tuple[str, str]], rounds: int, images: int, before: int = 0
) -> dict[tuple[str, str], list[Rate]]:
  """Runs each (side, work) once a round, and once before the first; returns the rates of each round.

  With `before`, so many images open each turn without being timed. What a side has freed goes to others meanwhile, or
  from a virtual machine to its host, and to get it back takes a second or more for each GiB.
  """
  found = {pair: [] for pair in works}
  for number in range(rounds + 1):
    for side, work in works:
      rate = sides[side].run(work, images, before)
      found[side, work] += [rate] * (number > 0)
  return found


def machine() -> dict[str, object]:
  """What a report tells of the machine."""
  lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines() if os.path.exists('/proc/cpuinfo') else []
  names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
  return {
    'processor': names[0] if names else platform.processor(),
    'cores': len(os.sched_getaffinity(0)),
    'load': round(os.getloadavg()[0], 1),
    'python': platform.python_version(),
  }


def write(report: Mapping[str, object], path: pathlib.Path | None = None) -> None:
  """Prints a report as JSON, and writes it to a file if one is named."""
  text = json.dumps(report, indent=2) + '\n'
  print(text, end='', flush=True)
  if path:
    path.write_text(text, encoding='utf-8')
