"""Reads batches with two workers, as a run does: python -m tests.reader PATTERN (for test_workers)."""

import dataclasses
import logging
import os
import signal
import sys
import time

from groupvit_jax.data import pipeline
from groupvit_jax.data.sources import build_source
from tests.tars import AUGMENT, data_config, make_examples, set_config

resize = os.ftruncate


def resize_slowly(file: int, size: int) -> None:
  """As on a busy machine: much happens between the making of shared memory and its registration."""
  time.sleep(0.05)
  resize(file, size)


os.ftruncate = resize_slowly  # in workers too, which import this module


def main(pattern: str) -> None:
  """Prints a line per batch; after SIGTERM or SIGINT it reads a few more and ends."""
  asked = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: asked.append(1))
  source = build_source(data_config(a=set_config(pattern)), (64, 64))
  examples = make_examples(source, dataclasses.replace(AUGMENT, size=(64, 64)), batch_size=8, num_batches=10**6)
  left = 3
  for batch in pipeline.iterate(examples, num_threads=2, num_workers=2, prefetch_batches=4):
    del batch
    print('batch', flush=True)
    time.sleep(0.2)
    left -= bool(asked)
    if not left:
      break
  print('ended', flush=True)
  time.sleep(0.5)  # what a run has left to do: the last checkpoint


if __name__ == '__main__':
  logging.basicConfig()
  main(sys.argv[1])
