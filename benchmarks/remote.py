"""Throughput of tars behind a slow web server, as a share of that of local tars.

  python -m benchmarks remote --batches=8

The same tars, once as files and once behind a server on loopback that answers 50 ms late, through the same pipeline
with the paper's augmentation: index, ranged reads, decoding, cropping, RandAugment, tagging, tokenising, batching. The
server runs on the same cores, which costs the remote side some of them; with a real store it would not.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import time

from benchmarks import our_pipeline, processes, tars
from groupvit_jax.data import pipeline
from groupvit_jax.data.mixture import Mixture
from groupvit_jax.data.sources import sample_captions
from groupvit_jax.data.tokenizer import Tokenizer, train_sentencepiece

_DELAY = 0.05  # seconds added to every answer
_BATCH = 128
_THREADS = {'local': 4, 'remote': 64}


def time_batches(source: Mixture, tokenizer: Tokenizer, num_batches: int, num_threads: int, seed: int) -> float:
  """Images a second over some batches, the first not counted."""
  examples = our_pipeline.examples(source, tokenizer, our_pipeline.FULL, num_batches + 1, _BATCH, seed)
  batches = pipeline.iterate(examples, num_threads=num_threads, num_workers=0, prefetch_batches=2)
  next(batches)
  started = time.perf_counter()
  return sum(len(batch['image']) for batch in batches) / (time.perf_counter() - started)


def main() -> None:
  """Times both sides in turns, several times."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--folder', type=pathlib.Path, default=pathlib.Path('.cache/benchmark_shards'))
  parser.add_argument('--photos', default='', help='folder of JPEGs to make the tars from; else they are made up')
  parser.add_argument('--batches', type=int, default=10)
  parser.add_argument('--repeats', type=int, default=5)
  args = parser.parse_args()
  pattern = tars.write_shards(args.folder, args.photos)
  local = our_pipeline.open_mixture(pattern)
  tokenizer = train_sentencepiece(sample_captions(local, 800), args.folder / 'tokenizer.model', 400)
  command = [sys.executable, '-m', 'benchmarks.range_server', str(args.folder), f'--delay={_DELAY}']
  server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  found = {'local': [], 'remote': []}
  try:
    remote = our_pipeline.open_mixture(pattern.replace(str(args.folder), server.stdout.readline().strip()))
    for repeat in range(args.repeats):
      for side, source in (('local', local), ('remote', remote)):
        found[side].append(time_batches(source, tokenizer, args.batches, _THREADS[side], repeat))
  finally:
    server.kill()
    server.wait()
  rates = {side: statistics.median(values) for side, values in found.items()}
  processes.write(
    {
      'delay': _DELAY,
      'batch': _BATCH,
      'threads': _THREADS,
      'pictures_per_s': {side: [round(rate, 1) for rate in values] for side, values in found.items()},
      'remote_share_of_local': round(rates['remote'] / rates['local'], 3),
    }
  )
