"""Pictures a second of protocol `groupvit`, GroupViT-S/16 at VOC's sizes, against the reference procedure.

  python -m benchmarks.evaluation --output=evaluation.json

The reference runs `transformers`' encoder in torch, one window at a time and twice for each. Both label the same
pictures with the same weights, take turns on the same cores, and their label maps are compared.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile

import numpy as np
import transformers

from benchmarks import rounds, speed, voc_pictures

_VAL_PICTURES, _VAL_WINDOWS = 1449, 4500


def main() -> None:
  """Runs the command; see this module."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--pictures', type=int, default=8, help='in a round; a multiple of 4 has all sizes equally often')
  parser.add_argument('--output', type=pathlib.Path)
  args = parser.parse_args()
  config = json.dumps(transformers.GroupViTConfig().to_dict())
  with tempfile.TemporaryDirectory() as folder:
    cores = len(os.sched_getaffinity(0))
    start = lambda module, *more: rounds.Side(
        sys.executable, f'benchmarks.{module}', [f'--folder={folder}', *more], None, threads=cores)
    peer = start('peer_evaluation')
    ours = start('our_evaluation', f'--config={config}')
    agreement = _agreement(pathlib.Path(folder))
    works = [('ours', 'evaluate'), ('peer', 'evaluate'), ('ours', 'multiply')]
    rates = rounds.take_turns({'ours': ours, 'peer': peer}, works, args.rounds, args.pictures)
    report = _report(args, ours, peer, rates, agreement)
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
  return {'same_label': round(float(same.mean()), 5), 'labels': int((counts > 0).sum()),
          'largest_label': round(float(counts.max() / counts.sum()), 3)}


def _report(
    args: argparse.Namespace, ours: rounds.Side, peer: rounds.Side,
    rates: dict[tuple[str, str], rounds.Rate], agreement: dict[str, float]
) -> dict[str, object]:
  """Medians, their ratios, and what they come to for VOC val."""
  mine, other = rates['ours', 'evaluate'], rates['peer', 'evaluate']
  windows = np.mean([_windows(size) for size in voc_pictures.SIZES])
  minutes = lambda rate: round(_VAL_WINDOWS / (rate * windows) / 60, 1)
  flops = speed.needed_flops('windows', 1, voc_pictures.WINDOW) * windows
  peak = rates['ours', 'multiply'].per_wall_s * ours.facts['product_flop']
  return {
      'command': ' '.join(sys.orig_argv[1:]),
      'machine': {'processor': speed.processor(), 'cores': len(os.sched_getaffinity(0)),
                  'load': round(os.getloadavg()[0], 1), 'python': platform.python_version()},
      'ours': ours.facts, 'peer': peer.facts, 'rounds': args.rounds, 'pictures_a_round': args.pictures,
      'windows_a_picture': float(windows), 'label_maps': agreement,
      'pictures_per_s': {'ours': round(mine.per_wall_s, 4), 'peer': round(other.per_wall_s, 4)},
      'pictures_per_cpu_s': {'ours': round(mine.per_cpu_s, 4), 'peer': round(other.per_cpu_s, 4)},
      'ratio': {'by_wall_clock': round(mine.per_wall_s / other.per_wall_s, 2),
                'by_cpu_clock': round(mine.per_cpu_s / other.per_cpu_s, 2)},
      'peak_mb': {'ours': round(ours.peak_mb), 'peer': round(peer.peak_mb)},
      # Of what a product of large matrices reaches there, model FLOPs alone.
      'share_of_peak': round(mine.per_wall_s * flops / peak, 3), 'peak_gflop_per_s': round(peak / 1e9),
      f'minutes_of_voc_val_{_VAL_PICTURES}_pictures_{_VAL_WINDOWS}_windows': {
          'ours': minutes(mine.per_wall_s), 'peer': minutes(other.per_wall_s)},
  }


def _windows(size: tuple[int, int]) -> int:
  """Windows that a picture (H, W) is cut into."""
  side, stride = voc_pictures.WINDOW, voc_pictures.STRIDE
  along = [-(-(int(length * side / min(size) + 0.5) - side) // stride) + 1 for length in size]
  return along[0] * along[1]


if __name__ == '__main__':
  main()
