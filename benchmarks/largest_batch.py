"""The largest batch of GroupViT-S/16 that one device of 80 GB can train with, by the compiler's own account:

  python -m benchmarks.largest_batch --output=docs/largest_batch.json

The step is compiled, as a run would, for one chip of a TPU v5p, which has 95 GB, and counts as fitting up to 80 GB; no
compiler for GPUs runs without a GPU. Arguments, temporaries and program count. Batches are multiples of 256, found by
bisection; takes a minute or so for each that is tried. Needs libtpu and no TPU.
"""

import argparse
import json
import os
import pathlib

DEVICE_BYTES, UNIT = 80e9, 256
MOST = {'none': 8192, 'dots': 16_384, 'blocks': 32_768}  # to look for


def main() -> None:
  """Writes JSON, and prints a table."""
  os.environ['JAX_PLATFORMS'] = 'cpu'  # whatever there is here: nothing is run on it
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--remat', nargs='+', choices=list(MOST), default=list(MOST))
  parser.add_argument('--output', type=pathlib.Path, required=True, help='JSON file.')
  args = parser.parse_args()
  found = {remat: search(remat) for remat in args.remat}
  args.output.write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')
  print('| remat | largest batch | GB | the next that was tried | GB |\n|:--|--:|--:|--:|--:|')
  for remat, tried in found.items():
    fits = [entry for entry in tried if entry['gb'] * 1e9 <= DEVICE_BYTES]
    above = [entry for entry in tried if entry['gb'] * 1e9 > DEVICE_BYTES]
    largest, smallest = max(fits, key=lambda entry: entry['batch']), min(above, key=lambda entry: entry['batch'])
    print(f'| `{remat}` | {largest["batch"]:,} | {largest["gb"]:.1f} | {smallest["batch"]:,} | {smallest["gb"]:.1f} |')


def search(remat: str) -> list[dict[str, float]]:
  """All batches that were tried, with what they need: the last that fits is the largest but for `UNIT`."""
  fits, too_large, tried = 0, MOST[remat] // UNIT + 1, []
  guess = 1024 // UNIT
  while too_large - fits > 1:
    tried.append(needs(remat, guess * UNIT))
    print(remat, tried[-1], flush=True)
    gb = tried[-1]['gb']
    if gb * 1e9 <= DEVICE_BYTES:
      fits = guess
    else:
      too_large = guess
    # Memory is about proportional to the batch: where it would reach the limit, or just beyond what is known.
    guess = min(max(int(guess * DEVICE_BYTES / 1e9 / gb), fits + 1), too_large - 1)
  return tried


def needs(remat: str, batch: int) -> dict[str, float]:
  """What a step needs of a device."""
  from configs import groupvit_vits16_gcc_yfcc  # after the platform is chosen
  from groupvit_jax.aot import chips, step

  config = groupvit_vits16_gcc_yfcc.get_config('1gpu')
  config.batch_size, config.grad_accum_steps, config.remat = batch, 1, remat
  topology = chips.find_topology('v5p:1x1x1')
  compiled = step.compile_step(config, topology)
  return {'batch': batch, 'gb': compiled.wanted_bytes / 1e9, 'compile_s': compiled.compile_s}


if __name__ == '__main__':
  main()
