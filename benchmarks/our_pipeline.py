"""Our side of the input pipeline's benchmarks: one process, like a worker."""

import argparse
from collections.abc import Callable
import dataclasses
import os

os.environ['JAX_PLATFORMS'] = 'cpu'

import cv2
import jax
import numpy as np
import simplejpeg

from benchmarks import processes
from groupvit_jax.data import augment as image_ops
from groupvit_jax.data import pipeline, prompts
from groupvit_jax.data.augment import Augment
from groupvit_jax.data.mixture import DataSet, Mixture
from groupvit_jax.data.rand_augment import RandAugment
from groupvit_jax.data.tars import open_webdataset
from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer
from groupvit_jax.running import sharding

BATCH, LENGTH, PROMPTS = 64, 77, 3
PLAIN = Augment((224, 224), (0.08, 1.0), (3 / 4, 4 / 3), flip=0.5, rand_augment=None, min_side=16, max_pixels=10**8)
FULL = dataclasses.replace(PLAIN, rand_augment=RandAugment(2, 0.5, 9.0, 0.5))


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
  parser.add_argument('--workers', type=int, default=0)
  args = parser.parse_args()
  source, tokenizer = open_mixture(args.shards), build_tokenizer(args.tokenizer)

  def whole(augment: Augment) -> Callable[[int], int]:
    batches = pipeline.iterate(
      examples(source, tokenizer, augment, 10**6), num_threads=0, num_workers=args.workers, prefetch_batches=2
    )
    return lambda count: sum(len(next(batches)['image']) for _ in range(-(-count // BATCH)))

  rng = np.random.default_rng(0)
  records = [source[i] for i in range(512)]
  stages = _stages(source, records, tokenizer, rng)
  data = [record['image'] for record in records]
  works = {
    'full': whole(FULL),
    'plain': whole(PLAIN),
    'bare decode': processes.over(data, lambda one: simplejpeg.decode_jpeg(one, 'RGB')),
    'crop and flip': processes.over(data, lambda one: PLAIN(one, rng, '')),
  }
  versions = {'opencv': cv2.__version__, 'simplejpeg': simplejpeg.__version__, 'jax': jax.__version__}
  processes.serve(versions | {'mean_kb': sum(map(len, data)) / len(data) / 1e3, 'stages': list(stages)}, works | stages)


def _stages(
  source: Mixture, records: list[dict], tokenizer: Tokenizer, rng: np.random.Generator
) -> dict[str, Callable[[int], int]]:
  """Each stage alone, on what the stage before it made."""
  over = processes.over
  captions = [record['text'] for record in records]
  parts = [FULL.read_crop(record['image'], rng, '') for record in records]
  crops = [image_ops.resize_box(*part, FULL.size) for part in parts]
  texts = [[one, *prompts.noun_prompts(one, PROMPTS, rng).texts] for one in captions]
  rows = [{'image': crop, 'tokens': tokenizer.encode(text, LENGTH)} for crop, text in zip(crops, texts)]
  stack = lambda rows: {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  mesh, batch = sharding.make_mesh(data=1, fsdp=1, model=1), stack(rows[:BATCH])

  def transfer(count: int) -> int:
    for _ in range(count // BATCH):
      jax.block_until_ready(pipeline.to_devices(batch, mesh))
    return count

  return {
    'read': over(range(512), lambda i: source[i]),
    'decode': over(records, lambda record: FULL.read_crop(record['image'], rng, '')),
    'crop and resize': over(parts, lambda part: image_ops.resize_box(*part, FULL.size)),
    'flip': over(crops, lambda crop: cv2.flip(crop, 1) if rng.random() < 0.5 else crop),
    'RandAugment': over(crops, lambda crop: FULL.rand_augment(crop, rng)),
    'tag': over(captions, lambda text: prompts.noun_prompts(text, PROMPTS, rng)),
    'tokenise': over(texts, lambda text: tokenizer.encode(text, LENGTH)),
    'batch': lambda count: sum(len(stack(rows[i : i + BATCH])['image']) for i in range(0, count, BATCH)),
    'transfer': transfer,
  }


if __name__ == '__main__':
  main()
