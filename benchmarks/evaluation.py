"""Images a second of protocol `groupvit`, GroupViT-S/16 at VOC's sizes, beside the reference procedure.

  python -m benchmarks evaluation --output=docs/speed_evaluation.json

The reference runs `transformers`' encoder in torch, one window at a time and twice for each. Both label the same
images, which are in memory, with the same weights, take turns on the same hardware, and their label maps are compared.
Ours is also timed as eval.py --output runs it: from JPEG and PNG files, with the oracle's second pass and a score for
each image.
"""

import argparse
import functools
import pathlib
import sys
import tempfile

import cv2
import numpy as np

from benchmarks import our_side, processes, speed, tars

WINDOW, STRIDE, THRESHOLD = 448, 224, 0.95
# (H, W) that most of VOC's images have; 448 on the short side gives 2, 2, 3 and 3 windows, in all of val 3.1.
SIZES = ((375, 500), (500, 375), (333, 500), (500, 333))
_VAL_PICTURES, _VAL_WINDOWS = 1449, 4500


@functools.cache
def draw_image(index: int) -> tuple[np.ndarray, np.ndarray]:
  """uint8 [H, W, 3], detail at every scale, and labels 0..20, uint8 [H, W]; the same in every process."""
  rng = np.random.default_rng(index)
  height, width = SIZES[index % len(SIZES)]
  pixels = tars.noise(rng, height, width, [2**i for i in range(1, 9)], 0.5)
  pixels -= pixels.min()
  labels = rng.integers(0, 21, (4, 4)).astype(np.uint8)
  return (255 * pixels / pixels.max()).astype(np.uint8), cv2.resize(labels, (width, height), interpolation=0)


def class_embeds() -> np.ndarray:
  """Unit vectors [20, 256], float32."""
  embeds = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float32)
  return embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)


def add_side_flags(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--pictures', type=int, default=8, help='in a round; a multiple of 4 has all sizes equally often')
  add_side_flags(parser)
  parser.add_argument('--output', type=pathlib.Path, help='JSON file.')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    flags = [f'--folder={folder}', f'--device={args.device}', f'--dtype={args.dtype}']
    peer = processes.Side('peer_evaluation', flags, huge=True).wait()  # writes the weights that ours reads
    ours = processes.Side('our_evaluation', flags, huge=True).wait()
    agreement = _compare_maps(pathlib.Path(folder))
    machine = processes.machine()
    works = [('ours', 'labels'), ('ours', 'as_eval_py'), ('peer', 'labels'), ('ours', 'multiply')]
    found = processes.take_turns({'ours': ours, 'peer': peer}, works, args.rounds, args.pictures, before=4)
    report = _report(args, ours, peer, found)
    ours.close(), peer.close()
  report |= {'command': ' '.join(sys.orig_argv[1:]), 'machine': machine, 'label_maps': agreement}
  processes.write(report, args.output)


def _compare_maps(folder: pathlib.Path) -> dict[str, float]:
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
  ours: processes.Side,
  peer: processes.Side,
  found: dict[tuple[str, str], list[processes.Rate]],
) -> dict[str, object]:
  """Rates of each round, their medians and ratios, and the minutes of VOC val that follow."""
  median = {pair: processes.median(rates) for pair, rates in found.items()}
  named = {
    'ours': median['ours', 'labels'],
    'ours_as_eval_py': median['ours', 'as_eval_py'],
    'peer': median['peer', 'labels'],
  }
  windows = float(np.mean([_count_windows(size) for size in SIZES]))
  flops = our_side.model_flops('windows', 1, WINDOW) * windows
  peak = median['ours', 'multiply'].per_wall_s * ours.facts['product_flop']
  published = speed.PUBLISHED.get(ours.facts['kind']) if args.dtype == 'bfloat16' else None
  rate = named['ours'].per_wall_s
  return {
    'ours': ours.facts,
    'peer': peer.facts,
    'rounds': args.rounds,
    'pictures_a_round': args.pictures,
    'windows_a_picture': windows,
    'dtype': args.dtype,
    'pictures_per_s': {side: round(rate.per_wall_s, 4) for side, rate in named.items()},
    'pictures_per_cpu_s': {side: round(rate.per_cpu_s, 4) for side, rate in named.items()},
    'of_each_round': {
      f'{side}, {work}': [round(rate.per_wall_s, 4) for rate in rates]
      for (side, work), rates in found.items()
      if work != 'multiply'
    },
    'ratio': {
      'by_wall_clock': round(rate / named['peer'].per_wall_s, 2),
      'by_cpu_clock': round(named['ours'].per_cpu_s / named['peer'].per_cpu_s, 2),
    },
    'peak_mb': {'ours': round(ours.peak_mb), 'peer': round(peer.peak_mb)},
    # The model's own matmuls, as a share of what large ones reach there.
    'share_of_peak': round(rate * flops / peak, 3),
    'peak_gflop_per_s': round(peak / 1e9),
    'share_of_published_peak': published and round(rate * flops / published, 3),
    f'minutes_of_voc_val_{_VAL_PICTURES}_pictures_{_VAL_WINDOWS}_windows': {
      side: round(_VAL_WINDOWS / (rate.per_wall_s * windows) / 60, 1) for side, rate in named.items()
    },
  }


def _count_windows(size: tuple[int, int]) -> int:
  """Windows that an image (H, W) is cut into."""
  along = [-(-(int(length * WINDOW / min(size) + 0.5) - WINDOW) // STRIDE) + 1 for length in size]
  return along[0] * along[1]
