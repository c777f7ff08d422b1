"""Pictures a second of protocol `groupvit`, GroupViT-S/16 at VOC's sizes, against the reference procedure.

  python -m benchmarks.evaluation --output=evaluation.json

The reference runs `transformers`' encoder in torch, one window at a time and twice for each. Both label the same
pictures, which are in memory, with the same weights, take turns on the same hardware, and their label maps are
compared. Ours is also timed as eval.py --output runs it: from JPEG and PNG files, with the oracle's second pass and a
score for each picture.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile

import numpy as np
import transformers

from benchmarks import rounds, speed, voc_pictures

_VAL_PICTURES, _VAL_WINDOWS = 1449, 4500


def main() -> None:
  """Runs the command; see this module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--pictures', type=int, default=8, help='in a round; a multiple of 4 has all sizes equally often')
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--output', type=pathlib.Path)
  args = parser.parse_args()
  config = json.dumps(transformers.GroupViTConfig().to_dict())
  with tempfile.TemporaryDirectory() as folder:
    cores = len(os.sched_getaffinity(0))
    flags = [f'--folder={folder}', f'--device={args.device}', f'--dtype={args.dtype}']
    start = lambda module, *more: rounds.Side(
      sys.executable, f'benchmarks.{module}', [*flags, *more], None, threads=cores, huge=True
    )
    peer = start('peer_evaluation')
    ours = start('our_evaluation', f'--config={config}')
    agreement = _agreement(pathlib.Path(folder))
    load = os.getloadavg()[0]  # of whatever else there is
    works = [('ours', 'labels'), ('ours', 'as_eval_py'), ('peer', 'labels'), ('ours', 'multiply')]
    found = rounds.record_turns({'ours': ours, 'peer': peer}, works, args.rounds, args.pictures, before=4)
    report = _report(args, ours, peer, found, agreement, load)
    ours.close(), peer.close()
  text = json.dumps(report, indent=2)
  print(text)
  if args.output:
    args.output.write_text(text + '\n')


def _agreement(folder: pathlib.Path) -> dict[str, float]:
  """Share of pixels that both sides give the same label, how many labels there are, and the commonest one's share."""
  with np.load(folder / 'our_maps.npz') as ours, np.load(folder / 'peer_maps.npz') as peer:
    same = np.concatenate([(ours[key] == peer[key]).ravel() for key in peer])
    counts = np.bincount(np.concatenate([peer[key].ravel() for key in peer]))
  return {
    'same_label': round(float(same.mean()), 5),
    'labels': int((counts > 0).sum()),
    'largest_label': round(float(counts.max() / counts.sum()), 3),
  }


def _report(
  args: argparse.Namespace,
  ours: rounds.Side,
  peer: rounds.Side,
  found: dict[tuple[str, str], list[rounds.Rate]],
  agreement: dict[str, float],
  load: float,
) -> dict[str, object]:
  """Rates of each round, their medians and ratios, and what they come to for VOC val."""
  median = lambda *pair: rounds.Rate(*map(statistics.median, zip(*found[pair])))
  named = {
    'ours': median('ours', 'labels'),
    'ours_as_eval_py': median('ours', 'as_eval_py'),
    'peer': median('peer', 'labels'),
  }
  mine, other = named['ours'], named['peer']
  windows = np.mean([_windows(size) for size in voc_pictures.SIZES])
  minutes = lambda rate: round(_VAL_WINDOWS / (rate * windows) / 60, 1)
  flops = speed.needed_flops('windows', 1, voc_pictures.WINDOW) * windows
  peak = median('ours', 'multiply').per_wall_s * ours.facts['product_flop']
  published = speed.PUBLISHED.get(ours.facts['kind']) if args.dtype == 'bfloat16' else None
  return {
    'command': ' '.join(sys.orig_argv[1:]),
    'machine': {
      'processor': speed.processor(),
      'cores': len(os.sched_getaffinity(0)),
      'load': round(load, 1),
      'python': platform.python_version(),
    },
    'ours': ours.facts,
    'peer': peer.facts,
    'rounds': args.rounds,
    'pictures_a_round': args.pictures,
    'windows_a_picture': float(windows),
    'label_maps': agreement,
    'dtype': args.dtype,
    'pictures_per_s': {side: round(rate.per_wall_s, 4) for side, rate in named.items()},
    'pictures_per_cpu_s': {side: round(rate.per_cpu_s, 4) for side, rate in named.items()},
    'of_each_round': {
      f'{side}, {work}': [round(rate.per_wall_s, 4) for rate in rates]
      for (side, work), rates in found.items()
      if work != 'multiply'
    },
    'ratio': {
      'by_wall_clock': round(mine.per_wall_s / other.per_wall_s, 2),
      'by_cpu_clock': round(mine.per_cpu_s / other.per_cpu_s, 2),
    },
    'peak_mb': {'ours': round(ours.peak_mb), 'peer': round(peer.peak_mb)},
    # Of what a product of large matrices reaches there, model FLOPs alone.
    'share_of_peak': round(mine.per_wall_s * flops / peak, 3),
    'peak_gflop_per_s': round(peak / 1e9),
    'share_of_published_peak': published and round(mine.per_wall_s * flops / published, 3),
    f'minutes_of_voc_val_{_VAL_PICTURES}_pictures_{_VAL_WINDOWS}_windows': {
      side: minutes(rate.per_wall_s) for side, rate in named.items()
    },
  }


def _windows(size: tuple[int, int]) -> int:
  """Windows that a picture (H, W) is cut into."""
  side, stride = voc_pictures.WINDOW, voc_pictures.STRIDE
  along = [-(-(int(length * side / min(size) + 0.5) - side) // stride) + 1 for length in size]
  return along[0] * along[1]


if __name__ == '__main__':
  main()
