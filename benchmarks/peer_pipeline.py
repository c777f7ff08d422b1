"""The peer of the input pipeline: webdataset, Pillow, timm; in an environment of its own.

Its texts take the same functions as ours, so that the difference lies in images and plumbing.
"""

import argparse
from collections.abc import Iterator
import random

import braceexpand
import numpy as np
import PIL
import torch

# torchvision registers shapes for operators of its compiled half, which does not load beside another build of torch.
# Its Pillow transforms, all that is used here, are Python: it is enough to declare the operators.
_DECLARED = torch.library.Library('torchvision', 'FRAGMENT')
for _name in ('nms', 'qnms'):
  _DECLARED.define(f'{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')

import timm
from timm.data import create_transform
import torchvision
import webdataset

from benchmarks import processes
from groupvit_jax.data import prompts as text_ops
from groupvit_jax.data.tokenizer import build_tokenizer

BATCH, LENGTH, PROMPTS = 64, 77, 3


def main() -> None:
  """Serves rounds."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--shards', required=True)
  parser.add_argument('--tokenizer', required=True)
  args = parser.parse_args()
  torch.set_num_threads(1)
  random.seed(0)
  tokenizer, rng = build_tokenizer(args.tokenizer), np.random.default_rng(0)
  augment = create_transform(  # the paper's
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

  def tokens(caption: str) -> torch.Tensor:
    prompts = text_ops.noun_prompts(caption, PROMPTS, rng).texts
    return torch.from_numpy(tokenizer.encode([caption, *prompts], LENGTH))

  def samples() -> Iterator[dict[str, bytes]]:
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
  full = lambda images: sum(len(next(batches)[0]) for _ in range(-(-images // BATCH)))
  versions = {module.__name__: module.__version__ for module in (PIL, timm, torch, torchvision, webdataset)}
  processes.serve(versions, {'full': full})


if __name__ == '__main__':
  main()
