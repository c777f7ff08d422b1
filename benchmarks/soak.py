"""Growth of the input pipeline's memory over many batches.

  python -m benchmarks soak --steps=20000

Reads batches with worker processes and measures the memory of all processes together (proportional set size: what
they share counts once) and the files they hold open. Exit code 1 if memory grew by more than 5 % after the first tenth
of the steps.
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import time

from benchmarks import our_pipeline, processes, remote
from groupvit_jax.data import pipeline

_LOOKS = 200  # times memory is measured
_ALLOWED = 0.05  # growth, as a share


def process_tree() -> list[int]:
  """This process and its descendants."""
  found, parents = [os.getpid()], {}
  for folder in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      parents[int(folder.name)] = int((folder / 'stat').read_text().rpartition(')')[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
      continue
  for pid in found:
    found += [child for child, parent in parents.items() if parent == pid]
  return found


def memory_mb() -> float:
  """Memory of all processes in megabytes."""
  total = 0
  for pid in process_tree():
    try:
      lines = pathlib.Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
      continue
    total += next((int(line.split()[1]) for line in lines if line.startswith('Pss:')), 0)
  return total / 1e3


def growth(values: list[float]) -> float:
  """Share by which the last third's median is above that of the first third."""
  third = max(len(values) // 3, 1)
  return statistics.median(values[-third:]) / statistics.median(values[:third]) - 1


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  remote.add_data_flags(parser)
  parser.add_argument('--steps', type=int, default=20_000)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--threads', type=int, default=2)
  args = parser.parse_args()
  _, source, tokenizer = remote.open_local(args)
  augment = dataclasses.replace(our_pipeline.PLAIN, size=(64, 64))
  examples = our_pipeline.examples(source, tokenizer, augment, args.steps, args.batch)
  every, memory, files, started = max(args.steps // _LOOKS, 1), [], [], time.perf_counter()
  batches = pipeline.iterate(examples, num_threads=args.threads, num_workers=args.workers, prefetch_batches=4)
  for step, batch in enumerate(batches):
    del batch
    if step % every == 0:
      memory.append(memory_mb())
      files.append(len(os.listdir('/proc/self/fd')))
  after = memory[max(len(memory) // 10, 1) :]
  grown = growth(after)
  processes.write(
    {key: getattr(args, key) for key in ('steps', 'batch', 'workers', 'threads')}
    | {
      'batches_per_s': round(args.steps / (time.perf_counter() - started), 1),
      'memory_mb': {
        'first': round(memory[0]),
        'after_warm_up': round(after[0]),
        'last': round(after[-1]),
        'most': round(max(after)),
      },
      'growth_after_warm_up': round(grown, 4),
      'open_files': {'least': min(files), 'most': max(files)},
    }
  )
  return int(grown > _ALLOWED)
