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

from benchmarks import our_side, processes, tars

WINDOW, STRIDE, THRESHOLD = 448, 224, 0.95
# (H, W) that most of VOC's images have; 448 on the short side gives 2, 2, 3 and 3 windows, in all of val 3.1.
SIZES = ((375, 500), (500, 375), (333, 500), (500, 333))
_VAL_WINDOWS = 4500  # of 1449 images


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


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--pictures', type=int, default=8, help='in a round; a multiple of 4 has all sizes equally often')
  parser.add_argument('--output', type=pathlib.Path, help='JSON file.')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    peer = processes.Side('peer_evaluation', [folder], huge=True).wait()  # writes the weights that ours reads
    ours = processes.Side('our_evaluation', [folder], huge=True).wait()
    with np.load(f'{folder}/our_maps.npz') as our_maps, np.load(f'{folder}/peer_maps.npz') as peer_maps:
      same = np.concatenate([(our_maps[key] == peer_maps[key]).ravel() for key in peer_maps])
    machine = processes.machine()
    works = [('ours', 'labels'), ('ours', 'as_eval_py'), ('peer', 'labels'), ('ours', 'multiply')]
    found = processes.take_turns({'ours': ours, 'peer': peer}, works, args.rounds, args.pictures, before=4)
    report = _report(args, ours, peer, found)
    ours.close(), peer.close()
  report |= {'command': ' '.join(sys.orig_argv[1:]), 'machine': machine, 'same_label': round(float(same.mean()), 5)}
  processes.write(report, args.output)


def _report(
  args: argparse.Namespace,
  ours: processes.Side,
  peer: processes.Side,
  found: dict[tuple[str, str], list[processes.Rate]],
) -> dict[str, object]:
  """Rates of each round, their medians and ratios, and the minutes of VOC val that follow."""
  median = {pair: processes.median(rates).per_wall_s for pair, rates in found.items()}
  named = {
    'ours': median['ours', 'labels'],
    'ours_as_eval_py': median['ours', 'as_eval_py'],
    'peer': median['peer', 'labels'],
  }
  windows = float(np.mean([_count_windows(size) for size in SIZES]))
  flops = our_side.model_flops('windows', 1, WINDOW) * windows  # the model's own matmuls
  return {
    'ours': ours.facts,
    'peer': peer.facts,
    'rounds': args.rounds,
    'pictures_a_round': args.pictures,
    'windows_a_picture': windows,
    'pictures_per_s': {side: round(rate, 4) for side, rate in named.items()},
    'of_each_round': {
      f'{side}, {work}': [round(rate.per_wall_s, 4) for rate in rates]
      for (side, work), rates in found.items()
      if work != 'multiply'
    },
    'ratio': round(named['ours'] / named['peer'], 2),
    'peak_mb': {'ours': round(ours.peak_mb), 'peer': round(peer.peak_mb)},
    'share_of_matmul': round(named['ours'] * flops / (median['ours', 'multiply'] * ours.facts['product_flop']), 3),
    'minutes_of_voc_val': {side: round(_VAL_WINDOWS / (rate * windows) / 60, 1) for side, rate in named.items()},
  }


def _count_windows(size: tuple[int, int]) -> int:
  """Windows that an image (H, W) is cut into."""
  along = [-(-(int(length * WINDOW / min(size) + 0.5) - WINDOW) // STRIDE) + 1 for length in size]
  return along[0] * along[1]
