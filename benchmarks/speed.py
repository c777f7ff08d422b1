"""Our training step, image encoder or segmentation windows beside transformers' in PyTorch.

  python -m benchmarks training --growth --rounds=5 --output=docs/speed_train.json
  python -m benchmarks encoding --growth --output=docs/speed_inference.json
  python -m benchmarks windows --growth --output=docs/speed_windows.json
  python -m benchmarks encoding --runtime=openvino-bfloat16 --dtype=bfloat16 --output=docs/speed_openvino.json
  python -m benchmarks training --device=gpu --dtype=bfloat16 --batch=256 --output=gpu_train.json

Each side, and each mode of the peer, is a process of its own on all cores. On a CPU they take turns.
"""

import argparse
from collections.abc import Mapping
import pathlib
import statistics
import sys
from typing import get_args, NamedTuple

from benchmarks import caption_lengths, our_side, processes
from groupvit_jax.interop import onnx

COMPILE, LONGEST = '--compile', '--longest'
HUGE = 'huge pages'  # not an argument: it matters how the process is started
_TRAINING_MODES = {
  'eager': [],
  'torch.compile': [COMPILE],
  'eager, padded to the longest': [LONGEST],
  'torch.compile, padded to the longest': [LONGEST, COMPILE],
  'eager, huge pages': [HUGE],
  'torch.compile, padded to the longest, huge pages': [LONGEST, COMPILE, HUGE],
}
_INFERENCE_MODES = {
  'eager': [],
  'torch.compile': [COMPILE],
  'eager, huge pages': [HUGE],
  'torch.compile, huge pages': [COMPILE, HUGE],
}
PEER_MODES = {'training': _TRAINING_MODES, 'encoding': _INFERENCE_MODES, 'windows': _INFERENCE_MODES}
# Size of the images that are compared; batches and sizes at which ours is measured alone.
SIZES = {'training': 224, 'encoding': 224, 'windows': 448}
GROWTH = {
  'training': ((4, 8, 16), (160, 224, 320)),
  'encoding': ((1, 8, 32), (224, 448)),
  'windows': ((1, 8, 16), (448,)),
}
WORK_KEYS = {'training': 'train', 'encoding': 'encode', 'windows': 'windows'}  # in reports
# Published, of dense matmuls in bfloat16, FLOPs a second (nvidia.com/en-us/data-center/h100, /h200, /a100).
PUBLISHED = {'NVIDIA H100 80GB HBM3': 989.4e12, 'NVIDIA H200': 989.4e12, 'NVIDIA A100-SXM4-80GB': 312e12}


def main(work: str) -> None:
  """Compares at one batch, then lets ours grow."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument(
    '--steps',
    type=int,
    default=caption_lengths.BATCHES if work == 'training' else 3,
    help='of each round; of training a multiple of 8, whose texts differ',
  )
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--size', type=int, default=SIZES[work])
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--remat', choices=('none', 'dots', 'blocks'), default='none', help='of ours')
  parser.add_argument('--text_budget', type=int, default=64, help='of ours')
  parser.add_argument('--runtime', choices=get_args(onnx.Runtime), help='of ours, from its ONNX export; else JAX')
  parser.add_argument('--peer_modes', nargs='*', choices=list(PEER_MODES[work]))
  parser.add_argument('--growth', action='store_true', help='Ours at other batches and sizes as well.')
  parser.add_argument('--output', type=pathlib.Path, help='JSON file.')
  args = parser.parse_args()
  if args.peer_modes is None:  # pages matter on CPUs alone
    args.peer_modes = [
      mode for mode, options in PEER_MODES[work].items() if args.device == 'cpu' or HUGE not in options
    ]
  machine = processes.machine()
  written = report(work, args, compare(work, args), machine)
  if args.growth:
    batches, sizes = GROWTH[work]
    points = dict.fromkeys([(batch, args.size) for batch in batches] + [(args.batch, size) for size in sizes])
    written['growth'] = [grow(work, args, *point) for point in points]
  processes.write(written, args.output)


class Comparison(NamedTuple):
  """What the sides did."""

  facts: dict[str, dict[str, object]]  # by side
  peak_mb: dict[str, float]
  rates: dict[str, list[float]]  # images a second in each round, by side; 'multiply': matmuls of ours
  failed: dict[str, str]  # why a mode of the peer has no rates

  def take_turns(self, sides: Mapping[str, processes.Side], work: str, args: argparse.Namespace) -> None:
    """Adds rounds of some sides, and ends them."""
    order = [(name, work) for name in sides] + [('ours', 'multiply')] * ('ours' in sides)
    found = processes.take_turns(sides, order, args.rounds, args.steps * args.batch, before=args.batch)
    for (name, done), rates in found.items():
      self.rates[name if done == work else done] = [rate.per_wall_s for rate in rates]
    for name, side in sides.items():
      self.facts[name], self.peak_mb[name] = side.facts, side.peak_mb
      side.close()


def compare(work: str, args: argparse.Namespace) -> Comparison:
  """Runs a comparison.

  On a CPU, which other programs use as well, the sides take turns. A GPU's memory may not hold them all: there each
  starts when the one before has ended, and a mode of the peer that does not fit is left out.
  """
  found, names = Comparison({}, {}, {}, {}), ['ours', *args.peer_modes]
  for group in [names] if args.device == 'cpu' else [[name] for name in names]:
    try:
      found.take_turns({name: start(work, args, name).wait() for name in group}, work, args)
    except SystemExit as error:
      if 'ours' in group:
        raise
      found.failed[group[0]] = str(error)
  return found


def start(work: str, args: argparse.Namespace, name: str) -> processes.Side:
  """Starts a process of ours, with huge pages as train.py has them, or of a mode of the peer."""
  arguments = [work, *(f'--{key}={getattr(args, key)}' for key in ('batch', 'size', 'device', 'dtype'))]
  if name != 'ours':
    options = PEER_MODES[work][name]
    return processes.Side('peer_side', [*arguments, *(o for o in options if o != HUGE)], huge=HUGE in options)
  options = [f'--remat={args.remat}', f'--text_budget={args.text_budget}']
  options += [f'--runtime={args.runtime}'] * bool(args.runtime)
  return processes.Side('our_side', arguments + options, huge=True)


def report(work: str, args: argparse.Namespace, found: Comparison, machine: Mapping[str, object]) -> dict[str, object]:
  """Ours beside the peer's modes: rounds and their medians. `machine` is as it was before."""
  rates, ours = {side: statistics.median(found.rates[side]) for side in found.facts}, found.facts['ours']
  peak = statistics.median(found.rates['multiply']) * ours['product_flop']
  published = PUBLISHED.get(ours['device']) if args.dtype == 'bfloat16' else None
  flops = our_side.model_flops(work, args.batch, args.size)
  share = lambda peak: {side: rate * flops / args.batch / peak for side, rate in rates.items()}
  return {
    'work': WORK_KEYS[work],
    'batch': args.batch,
    'size': args.size,
    'dtype': args.dtype,
    'device': ours['device'],
    'rounds': args.rounds,
    'steps': args.steps,
    'command': ' '.join(sys.orig_argv[1:]),
    'cores': machine['cores'],
    'processor': machine['processor'],
    'python': machine['python'],
    'load_average': machine['load'],
    'pictures_per_s': rates,
    'of_each_round': {side: found.rates[side] for side in rates},
    'ratio_to': {mode: rates['ours'] / rate for mode, rate in rates.items() if mode != 'ours'},
    'failed': found.failed,
    'peak_mb': found.peak_mb,
    'model_gflop': flops / 1e9,
    'machine_gflop_per_s': peak / 1e9,
    'utilisation': share(peak),
    'published_gflop_per_s': published and published / 1e9,
    'utilisation_of_published': published and share(published),
    'facts': found.facts,
  }


def grow(work: str, args: argparse.Namespace, batch: int, size: int) -> dict[str, object]:
  """Ours alone at another batch or size."""
  args = argparse.Namespace(**vars(args) | dict(batch=batch, size=size))
  side = start(work, args, 'ours').wait()
  found = processes.take_turns({'ours': side}, [('ours', work)], args.rounds, args.steps * batch, before=batch)
  side.close()
  rates = [rate.per_wall_s for rate in found['ours', work]]
  return {
    'batch': batch,
    'size': size,
    'pictures_per_s': statistics.median(rates),
    'of_each_round': rates,
    'peak_mb': side.peak_mb,
    'model_gflop': our_side.model_flops(work, batch, size) / 1e9,
  } | {key: value for key, value in side.facts.items() if key in ('compile_s', 'temporaries_mb')}
