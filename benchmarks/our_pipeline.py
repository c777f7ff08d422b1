"""Our side of the input pipeline's benchmarks: one process, like a worker."""

import argparse
from collections.abc import Callable
import dataclasses
import os

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import numpy as np
import simplejpeg

from benchmarks import processes
from groupvit_jax.data import pipeline
from groupvit_jax.data.augment import Augment
from groupvit_jax.data.mixture import DataSet, Mixture
from groupvit_jax.data.rand_augment import RandAugment
from groupvit_jax.data.tars import open_webdataset
from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer

BATCH, LENGTH, PROMPTS = 64, 77, 3
PLAIN = Augment((224, 224), (0.08, 1.0), (3 / 4, 4 / 3), flip=0.5, rand_augment=None)
FULL = dataclasses.replace(PLAIN, rand_augment=RandAugment(0.5, 9.0, 0.5))


def open_mixture(pattern: str) -> Mixture:
  """One set of tars as a run reads it."""
  source = open_webdataset([pattern], 'txt', '', 'benchmark')
  return Mixture((DataSet('tars', source, source.index.digest, len(source.shards), 0.0),))


def examples(
  source: Mixture, tokenizer: Tokenizer, augment: Augment, num_batches: int, batch_size: int = BATCH, seed: int = 0
) -> pipeline.Examples:
  """Batches as training reads them."""
  return pipeline.Examples(
    source,
    augment,
    tokenizer,
    seed=seed,
    batch_size=batch_size,
    num_prompts=PROMPTS,
    text_length=LENGTH,
    first_batch=0,
    num_batches=num_batches,
    rows=range(batch_size),
  )


def main() -> None:
  """Serves rounds."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--shards', required=True)
  parser.add_argument('--tokenizer', required=True)
  args = parser.parse_args()
  source, tokenizer = open_mixture(args.shards), build_tokenizer(args.tokenizer)

  def whole(augment: Augment) -> Callable[[int], int]:
    batches = pipeline.iterate(
      examples(source, tokenizer, augment, 10**6), num_threads=0, num_workers=0, prefetch_batches=2
    )
    return lambda count: sum(len(next(batches)['image']) for _ in range(-(-count // BATCH)))

  over = lambda function: lambda count: sum(function(one) is not None for one in data[:count])
  rng = np.random.default_rng(0)
  data = [source[i]['image'] for i in range(512)]
  works = {
    'full': whole(FULL),
    'plain': whole(PLAIN),
    'bare decode': over(lambda one: simplejpeg.decode_jpeg(one, 'RGB')),
    'crop and flip': over(lambda one: PLAIN(one, rng, '')),
  }
  versions = {'simplejpeg': simplejpeg.__version__, 'jax': jax.__version__}
  processes.serve(versions | {'mean_kb': sum(map(len, data)) / len(data) / 1e3}, works)


if __name__ == '__main__':
  main()
