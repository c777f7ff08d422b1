"""How much of the local throughput is left when every read takes 50 ms: python -m benchmarks.remote

The same tars, once as files and once behind a web server on loopback that answers late, through the same pipeline with
the paper's augmentation: index, ranged reads, decoding, cropping, RandAugment, tagging, tokenising, batching. The
server runs on the same cores, which costs the remote side some of them; with a real store it would not. Prints JSON:
pictures a second by the clock on the wall, and by the pipeline's own time on the processor.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

from benchmarks.rounds import Rate
from benchmarks.shards import write_shards
from groupvit_jax.data import augment, pipeline
from groupvit_jax.data.mixture import DataSet, Mixture
from groupvit_jax.data.rand_augment import RandAugment
from groupvit_jax.data.sources import sample_captions
from groupvit_jax.data.tokenizer import Tokenizer, train_sentencepiece
from groupvit_jax.data.webdataset import open_webdataset

_AUGMENT = augment.Augment(
  (224, 224), (0.08, 1.0), (3 / 4, 4 / 3), 0.5, RandAugment(2, 0.5, 9.0, 0.5), min_side=16, max_pixels=10**8
)


def open_mixture(pattern: str) -> Mixture:
  """One set of tars as a run reads it."""
  source = open_webdataset([pattern], 'txt', '', pattern)
  return Mixture((DataSet('tars', source, source.index.digest, len(source.shards), 0.0),))


def time_batches(source: Mixture, tokenizer: Tokenizer, flags: argparse.Namespace, num_threads: int, seed: int) -> Rate:
  """Pictures per second over some batches, the first not counted."""
  examples = pipeline.Examples(
    source,
    _AUGMENT,
    tokenizer,
    seed=seed,
    batch_size=flags.batch,
    num_prompts=3,
    text_length=77,
    first_batch=0,
    num_batches=flags.batches + 1,
    rows=range(flags.batch),
  )
  batches = pipeline.iterate(examples, num_threads=num_threads, num_workers=flags.workers, prefetch_batches=2)
  next(batches)
  wall, cpu = time.perf_counter(), time.process_time()
  count = sum(len(batch['image']) for batch in batches)
  return Rate(count / (time.process_time() - cpu), count / (time.perf_counter() - wall))


def main() -> None:
  """Times both sides in turn, several times."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--folder', type=pathlib.Path, default=pathlib.Path('.cache/benchmark_shards'))
  parser.add_argument('--photos', default='', help='folder of JPEGs to make the shards from; else they are made up')
  parser.add_argument('--delay', type=float, default=0.05, help='seconds added to every answer')
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--batches', type=int, default=10)
  parser.add_argument('--workers', type=int, default=0)
  parser.add_argument('--local_threads', type=int, default=4)
  parser.add_argument('--remote_threads', type=int, default=64)
  parser.add_argument('--repeats', type=int, default=5)
  flags = parser.parse_args()
  pattern = write_shards(flags.folder, flags.photos)
  server = subprocess.Popen(
    [sys.executable, '-m', 'benchmarks.range_server', str(flags.folder), f'--delay={flags.delay}'],
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    address = server.stdout.readline().strip()
    local, remote = open_mixture(pattern), open_mixture(pattern.replace(str(flags.folder), address))
    tokenizer = train_sentencepiece(sample_captions(local, 800), flags.folder / 'tokenizer.model', 400)
    rates = {'local': [], 'remote': []}
    for repeat in range(flags.repeats):
      rates['local'].append(time_batches(local, tokenizer, flags, flags.local_threads, repeat))
      rates['remote'].append(time_batches(remote, tokenizer, flags, flags.remote_threads, repeat))
  finally:
    server.kill()
    server.wait()
  median = {side: Rate(*map(statistics.median, zip(*values))) for side, values in rates.items()}
  print(
    json.dumps(
      {
        'delay_s': flags.delay,
        'batch': flags.batch,
        'workers': flags.workers,
        'local_threads': flags.local_threads,
        'remote_threads': flags.remote_threads,
        'pictures_per_s': {side: [round(rate.per_wall_s, 1) for rate in values] for side, values in rates.items()},
        'pictures_per_cpu_s': {side: round(rate.per_cpu_s, 1) for side, rate in median.items()},
        'remote_share_of_local': {
          'by_wall_clock': round(median['remote'].per_wall_s / median['local'].per_wall_s, 3),
          'by_cpu_clock': round(median['remote'].per_cpu_s / median['local'].per_cpu_s, 3),
        },
      },
      indent=2,
    )
  )


if __name__ == '__main__':
  main()
