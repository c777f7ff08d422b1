"""Whether the input pipeline's memory stays flat: python -m benchmarks.soak --steps=20000

Reads batches with worker processes and looks at the memory of all processes together (proportional set size: what
they share counts once) and at the shared memory and files they hold. Prints JSON; exit code 1 if memory grew by more
than 5 % after the first tenth of the steps.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

from benchmarks.remote import open_mixture
from benchmarks.shards import write_shards
from groupvit_jax.data import augment as image_ops
from groupvit_jax.data import pipeline
from groupvit_jax.data.sources import sample_captions
from groupvit_jax.data.tokenizer import train_sentencepiece

_LOOKS = 200  # times memory is looked at
_ALLOWED = 0.05  # growth, as a share


def processes() -> list[int]:
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
  for pid in processes():
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
  """Soaks."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--folder', type=pathlib.Path, default=pathlib.Path('.cache/benchmark_shards'))
  parser.add_argument('--photos', default='', help='folder of JPEGs to make the shards from; else they are made up')
  parser.add_argument('--steps', type=int, default=20_000)
  parser.add_argument('--batch', type=int, default=16)
  parser.add_argument('--workers', type=int, default=2)
  parser.add_argument('--threads', type=int, default=2)
  flags = parser.parse_args()
  source = open_mixture(write_shards(flags.folder, flags.photos))
  tokenizer = train_sentencepiece(sample_captions(source, 800), flags.folder / 'tokenizer.model', 400)
  augment = image_ops.Augment((64, 64), (0.08, 1.0), (3 / 4, 4 / 3), 0.5, None, min_side=16, max_pixels=10**8)
  examples = pipeline.Examples(
    source,
    augment,
    tokenizer,
    seed=0,
    batch_size=flags.batch,
    num_prompts=3,
    text_length=77,
    first_batch=0,
    num_batches=flags.steps,
    rows=range(flags.batch),
  )
  every, memory, files, started = max(flags.steps // _LOOKS, 1), [], [], time.perf_counter()
  batches = pipeline.iterate(examples, num_threads=flags.threads, num_workers=flags.workers, prefetch_batches=4)
  for step, batch in enumerate(batches):
    del batch
    if step % every == 0:
      memory.append(memory_mb())
      files.append(len(os.listdir('/proc/self/fd')))
  after = memory[max(len(memory) // 10, 1) :]
  grown = growth(after)
  print(
    json.dumps(
      {
        'steps': flags.steps,
        'batch': flags.batch,
        'workers': flags.workers,
        'threads': flags.threads,
        'batches_per_s': round(flags.steps / (time.perf_counter() - started), 1),
        'memory_mb': {
          'first': round(memory[0]),
          'after_warm_up': round(after[0]),
          'last': round(after[-1]),
          'most': round(max(after)),
        },
        'growth_after_warm_up': round(grown, 4),
        'open_files': {'least': min(files), 'most': max(files)},
      },
      indent=2,
    )
  )
  return int(grown > _ALLOWED)


if __name__ == '__main__':
  sys.exit(main())
