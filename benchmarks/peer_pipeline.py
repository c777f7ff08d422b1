"""The peer of `benchmarks.input_pipeline`: webdataset, Pillow, timm; in its own environment.

Its texts take the same functions as ours, so that the difference lies in pictures and plumbing.
"""

import argparse
from collections.abc import Callable, Iterator
import io
import itertools
import random

import braceexpand
import numpy as np
import PIL
from PIL import Image
import torch

# torchvision registers shapes for operators of its compiled half, which does not load beside
# another build of torch. Its Pillow transforms, all that is used here, are Python: it is enough to
# declare the operators.
_DECLARED = torch.library.Library('torchvision', 'FRAGMENT')
for _name in ('nms', 'qnms'):
  _DECLARED.define(f'{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')

import timm  # noqa: E402
from timm.data import create_transform  # noqa: E402
import torchvision  # noqa: E402
import webdataset  # noqa: E402

from benchmarks import rounds  # noqa: E402
from groupvit_jax.data import prompts as text_ops  # noqa: E402
from groupvit_jax.data.tokenizer import build_tokenizer  # noqa: E402

BATCH, LENGTH, PROMPTS = 64, 77, 3


def transform() -> Callable[[Image.Image], torch.Tensor]:
  """The paper's augmentation."""
  return create_transform(
    224,
    is_training=True,
    scale=(0.08, 1.0),
    ratio=(3 / 4, 4 / 3),
    interpolation='bilinear',
    hflip=0.5,
    auto_augment='rand-m9-mstd0.5-inc1',
    re_prob=0.25,
    re_mode='pixel',
    re_count=1,
  )


def open_picture(data: bytes) -> Image.Image:
  """As webdataset's decoder does it."""
  with io.BytesIO(data) as stream:
    image = Image.open(stream)
    image.load()
    return image.convert('RGB')


def main() -> None:
  """Serves rounds."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--shards', required=True)
  parser.add_argument('--tokenizer', required=True)
  args = parser.parse_args()
  torch.set_num_threads(1)
  random.seed(0)
  tokenizer, rng, augment = build_tokenizer(args.tokenizer), np.random.default_rng(0), transform()

  def tokens(caption: str) -> torch.Tensor:
    prompts = text_ops.noun_prompts(caption, PROMPTS, rng)
    return torch.from_numpy(tokenizer.encode([caption, *prompts], LENGTH))

  def samples() -> Iterator[tuple[bytes, str]]:
    shards = list(braceexpand.braceexpand(args.shards))
    return webdataset.WebDataset(shards, shardshuffle=False).shuffle(256).repeat()

  # Newer Pillows refuse what timm asks of them at magnitude 10 (posterize to 0 bits): left out.
  batches = iter(
    samples()
    .decode('pil')
    .to_tuple('jpg', 'txt')
    .map_tuple(augment, tokens, handler=webdataset.ignore_and_continue)
    .batched(BATCH, partial=False)
  )

  def full(pictures: int) -> int:
    return sum(len(next(batches)[0]) for _ in range(-(-pictures // BATCH)))

  texts, data = [], []
  for sample in itertools.islice(samples(), 512):
    texts.append(sample['txt'].decode())
    data.append(sample['jpg'])
  endless = iter(samples())
  read = lambda count: sum(1 for _ in itertools.islice(endless, count))
  stages = _stages(read, data, texts, augment, tokens)
  facts = {
    'pillow': PIL.__version__,
    'timm': timm.__version__,
    'torch': torch.__version__,
    'torchvision': torchvision.__version__,
    'webdataset': webdataset.__version__,
    'stages': list(stages),
  }
  rounds.serve(facts, {'full': full} | stages)


def _stages(
  read: Callable[[int], int], data: list[bytes], texts: list[str], augment: Callable, tokens: Callable
) -> dict[str, Callable[[int], int]]:
  """Each stage alone, on what the stage before it made."""
  images = [open_picture(one) for one in data]
  stages: dict[str, Callable[[int], int]] = {'read': read, 'decode': over(data, open_picture)}
  for step in augment.transforms:
    stages[type(step).__name__] = over(images, step, tolerant=True)
    images = [_apply(step, image) for image in images]
  stages['tag and tokenise'] = over(texts, tokens)
  stages['batch'] = lambda count: sum(len(torch.stack(images[i : i + BATCH])) for i in range(0, count, BATCH))
  return stages


def _apply(step: Callable, image: object) -> object:
  try:
    return step(image)
  except ValueError:  # see above
    return image


def over(items: list, function: Callable, tolerant: bool = False) -> Callable[[int], int]:
  """Work that applies a function to the first items."""
  call = (lambda item: _apply(function, item)) if tolerant else function
  return lambda count: sum(call(item) is not None for item in itertools.islice(items, count))


if __name__ == '__main__':
  main()
