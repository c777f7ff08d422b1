"""Largest batch of GroupViT-S/16 that fits 80 GB, by the TPU compiler's account.

  python -m benchmarks largest_batch --output=docs/largest_batch.json

The step is compiled, as a run would, for one chip of a TPU v5p, which has 95 GB, and counts as fitting up to 80 GB; no
compiler for GPUs runs without a GPU. Arguments, temporaries and program count. Batches are multiples of 256, found by
bisection; each that is tried takes a minute or so. Needs libtpu and no TPU.
"""

import argparse
import os
import pathlib

from benchmarks import processes

DEVICE_GB, UNIT = 80, 256
MOST = {'none': 8192, 'dots': 16_384, 'blocks': 32_768}  # to look for


def main() -> None:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is run on the devices that there are
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--remat', nargs='+', choices=list(MOST), default=list(MOST))
  parser.add_argument('--output', type=pathlib.Path, help='JSON file.')
  args = parser.parse_args()
  processes.write({remat: search(remat) for remat in args.remat}, args.output)


def search(remat: str) -> list[dict[str, float]]:
  """All batches that were tried, with what they need: the largest that fits is exact to `UNIT`."""
  fits, too_large, tried = 0, MOST[remat] // UNIT + 1, []
  guess = 1024 // UNIT
  while too_large - fits > 1:
    tried.append(compile_batch(remat, guess * UNIT))
    gb = tried[-1]['gb']
    fits, too_large = (guess, too_large) if gb <= DEVICE_GB else (fits, guess)
    # Memory is about proportional to the batch: where it would reach the limit, or just beyond what is known.
    guess = min(max(int(guess * DEVICE_GB / gb), fits + 1), too_large - 1)
  return tried


def compile_batch(remat: str, batch: int) -> dict[str, float]:
  """Memory that a step needs of a device."""
  from configs import groupvit_vits16_gcc_yfcc  # after the platform is chosen
  from groupvit_jax.aot import chips, step

  config = groupvit_vits16_gcc_yfcc.get_config('1gpu')
  config.batch_size, config.grad_accum_steps, config.remat = batch, 1, remat
  compiled = step.compile_step(config, chips.find_topology('v5p:1x1x1'))
  return {'batch': batch, 'gb': compiled.wanted_bytes / 1e9, 'compile_s': compiled.compile_s}
