"""The side of `benchmarks.input_pipeline` that is this project's: one process, like a worker."""

import argparse
from collections.abc import Callable
import dataclasses
import itertools
import os

os.environ['JAX_PLATFORMS'] = 'cpu'

import cv2  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import simplejpeg  # noqa: E402

from benchmarks import rounds  # noqa: E402
from groupvit_jax.data import augment as image_ops  # noqa: E402
from groupvit_jax.data import pipeline, prompts
from groupvit_jax.data.augment import Augment  # noqa: E402
from groupvit_jax.data.mixture import DataSet, Mixture  # noqa: E402
from groupvit_jax.data.rand_augment import RandAugment  # noqa: E402
from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer  # noqa: E402
from groupvit_jax.data.webdataset import open_webdataset, WebDataset  # noqa: E402
from groupvit_jax.running import sharding  # noqa: E402

BATCH, LENGTH, PROMPTS = 64, 77, 3
PLAIN = Augment((224, 224), (0.08, 1.0), (3 / 4, 4 / 3), flip=0.5, rand_augment=None, min_side=16, max_pixels=10**8)
FULL = dataclasses.replace(PLAIN, rand_augment=RandAugment(2, 0.5, 9.0, 0.5))


def examples(source: WebDataset, tokenizer: Tokenizer, augment: Augment) -> pipeline.Examples:
  """An endless run over the shards."""
  mixture = Mixture((DataSet('benchmark', source, source.index.digest, len(source.shards), 0.0),))
  return pipeline.Examples(
    mixture,
    augment,
    tokenizer,
    seed=0,
    batch_size=BATCH,
    num_prompts=PROMPTS,
    text_length=LENGTH,
    first_batch=0,
    num_batches=10**6,
    rows=range(BATCH),
  )


def main() -> None:
  """Serves rounds."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--shards', required=True)
  parser.add_argument('--tokenizer', required=True)
  parser.add_argument('--workers', type=int, default=0)
  args = parser.parse_args()
  source = open_webdataset([args.shards], 'txt', '', 'benchmark')
  tokenizer = build_tokenizer(args.tokenizer)

  def whole(augment: Augment) -> Callable[[int], int]:
    batches = pipeline.iterate(
      examples(source, tokenizer, augment), num_threads=0, num_workers=args.workers, prefetch_batches=2
    )
    return lambda count: sum(len(next(batches)['image']) for _ in range(-(-count // BATCH)))

  works = {'full': whole(FULL), 'plain': whole(PLAIN)} | _pictures(source)
  stages = _stages(source, tokenizer)
  facts = {
    'opencv': cv2.__version__,
    'simplejpeg': simplejpeg.__version__,
    'jax': jax.__version__,
    'pictures': len(source),
    'stages': list(stages),
    'mean_kb': sum(len(source[i]['image']) for i in range(128)) / 128e3,
  }
  rounds.serve(facts, works | stages)


def _pictures(source: WebDataset) -> dict[str, Callable[[int], int]]:
  """Pictures alone: whole ones decoded by libjpeg-turbo, and crops and flips of ours."""
  data = [source[i]['image'] for i in range(512)]
  rng = np.random.default_rng(0)
  return {
    'bare decode': over(data, lambda one: simplejpeg.decode_jpeg(one, 'RGB')),
    'crop and flip': over(data, lambda one: PLAIN(one, rng, '')),
  }


def _stages(source: WebDataset, tokenizer: Tokenizer) -> dict[str, Callable[[int], int]]:
  """Each stage alone, on what the stage before it made."""
  rng = np.random.default_rng(0)
  records = [source[i] for i in range(512)]
  captions = [record['text'] for record in records]
  parts = [FULL.read_crop(record['image'], rng, '') for record in records]
  crops = [image_ops.resize_box(*part, FULL.size) for part in parts]
  texts = [[one, *prompts.noun_prompts(one, PROMPTS, rng)] for one in captions]
  rows = [{'image': crop, 'tokens': tokenizer.encode(text, LENGTH)} for crop, text in zip(crops, texts)]
  mesh = sharding.make_mesh(data=1, fsdp=1, model=1)
  batch = _stack(rows[:BATCH])

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
    'batch': lambda count: sum(len(_stack(rows[i : i + BATCH])['image']) for i in range(0, count, BATCH)),
    'transfer': transfer,
  }


def _stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def over(items: list, function: Callable) -> Callable[[int], int]:
  """Work that applies a function to the first items."""
  return lambda count: sum(function(item) is not None for item in itertools.islice(items, count))


if __name__ == '__main__':
  main()
