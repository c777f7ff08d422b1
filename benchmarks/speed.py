"""Our model and its peer, eager and compiled; figures as JSON."""

import argparse
from collections.abc import Mapping, Sequence
import json
import os
import pathlib
import platform
import statistics
import sys
from typing import NamedTuple

from benchmarks import caption_lengths, model_flops, our_model, rounds

COMPILE, LONGEST = '--compile=default', '--longest'
HUGE = 'huge pages'  # not an argument: it matters how the process is started
TRAINING_MODES = {
  'eager': [],
  'torch.compile': [COMPILE],
  'eager, padded to the longest': [LONGEST],
  'torch.compile, padded to the longest': [LONGEST, COMPILE],
  'eager, huge pages': [HUGE],
  'torch.compile, padded to the longest, huge pages': [LONGEST, COMPILE, HUGE],
}
INFERENCE_MODES = {
  'eager': [],
  'torch.compile': [COMPILE],
  'torch.compile, reduce-overhead': ['--compile=reduce-overhead'],
  'eager, huge pages': [HUGE],
  'torch.compile, huge pages': [COMPILE, HUGE],
}
PEER_MODES = {'train': TRAINING_MODES, 'encode': INFERENCE_MODES, 'windows': INFERENCE_MODES}
# Published, of dense products in bfloat16, FLOPs a second (nvidia.com/en-us/data-center/h100, /h200, /a100).
PUBLISHED = {'NVIDIA H100 80GB HBM3': 989.4e12, 'NVIDIA H200': 989.4e12, 'NVIDIA A100-SXM4-80GB': 312e12}


def measure(work: str, description: str, size: int, batches: Sequence[int], sizes: Sequence[int]) -> None:
  """Compares at one batch, then lets ours grow; writes what was found.

  Args:
    work: 'train', 'encode' or 'windows'.
    description: of the command.
    size: of the pictures that are compared.
    batches: at the compared size, ours alone.
    sizes: of pictures at the compared batch, ours alone.
  """
  parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument(
    '--steps',
    type=int,
    default=caption_lengths.BATCHES if work == 'train' else 3,
    help=('of each round; of training a multiple of 8, whose texts differ'),
  )
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--size', type=int, default=size)
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--remat', choices=('none', 'dots', 'blocks'), default='none', help='of ours')
  parser.add_argument('--text_budget', type=int, default=64, help='of ours')
  parser.add_argument('--peer_modes', nargs='*', choices=list(PEER_MODES[work]))
  parser.add_argument(
    '--one_core',
    action='store_true',
    help=('One core and thread for each side, timed by its own clock, which other programs hardly disturb.'),
  )
  parser.add_argument('--growth', action='store_true', help='Ours at other batches and sizes as well.')
  parser.add_argument('--trace', type=pathlib.Path, help='Folder for a profile of ours: benchmarks/trace_summary.py.')
  parser.add_argument('--output', type=pathlib.Path, required=True, help='JSON file.')
  parser.set_defaults(hold=False)
  args = parser.parse_args()
  if args.peer_modes is None:
    args.peer_modes = usual_modes(work, args.device)
  load = os.getloadavg()[0]
  written = report(work, args, run_sides(work, args), load)
  if args.growth:
    points = dict.fromkeys([(batch, args.size) for batch in batches] + [(args.batch, size) for size in sizes])
    written['growth'] = [grow(work, args, *point) for point in points]
  text = json.dumps(written, indent=2) + '\n'
  args.output.write_text(text, encoding='utf-8')
  print(text, end='')


def usual_modes(work: str, device: str) -> list[str]:
  """Of the peer, where none are asked for; pages matter on CPUs alone."""
  return [
    mode
    for mode, arguments in PEER_MODES[work].items()
    if 'reduce-overhead' not in mode and (device == 'cpu' or HUGE not in arguments)
  ]


class Found(NamedTuple):
  """What the sides of a comparison did."""

  facts: dict[str, dict[str, object]]  # by side
  peak_mb: dict[str, float]
  rates: dict[tuple[str, str], list[rounds.Rate]]  # by (side, work), of each round
  failed: dict[str, str]  # why a mode of the peer has no figures

  def take_turns(self, sides: Mapping[str, rounds.Side], work: str, args: argparse.Namespace) -> None:
    """Adds rounds of some sides, and ends them."""
    order = [(name, work) for name in sides] + [('ours', 'multiply')] * ('ours' in sides)
    self.rates.update(rounds.record_turns(sides, order, args.rounds, args.steps * args.batch, before=args.batch))
    for name, side in sides.items():
      self.facts[name], self.peak_mb[name] = side.facts, side.peak_mb
      side.close()


def run_sides(work: str, args: argparse.Namespace) -> Found:
  """Runs a comparison.

  On a CPU, which other programs use as well, the sides take turns. A GPU's memory may not hold them all: there each
  starts when the one before has ended, and a mode of the peer that does not fit is left out.
  """
  found, names = Found({}, {}, {}, {}), ['ours', *args.peer_modes]
  for group in [names] if args.device == 'cpu' else [[name] for name in names]:
    try:
      found.take_turns({name: start(work, args, name) for name in group}, work, args)
    except SystemExit as error:
      if 'ours' in group:
        raise
      found.failed[group[0]] = str(error)
  return found


def report(work: str, args: argparse.Namespace, found: Found, load: float) -> dict[str, object]:
  """Ours beside the peer's modes: rounds and their medians. `load` is of the machine, before."""
  clock = 'per_cpu_s' if args.one_core else 'per_wall_s'
  values = {pair: [getattr(rate, clock) for rate in rates] for pair, rates in found.rates.items()}
  rates, ours = {side: statistics.median(values[side, work]) for side in found.facts}, found.facts['ours']
  peak = statistics.median(values['ours', 'multiply']) * ours['product_flop']
  published = PUBLISHED.get(ours['device']) if args.dtype == 'bfloat16' else None
  flops = needed_flops(work, args.batch, args.size)
  share = lambda peak: {side: rate * flops / args.batch / peak for side, rate in rates.items()}
  return {
    'work': work,
    'batch': args.batch,
    'size': args.size,
    'dtype': args.dtype,
    'device': ours['device'],
    'rounds': args.rounds,
    'steps': args.steps,
    'command': ' '.join(sys.orig_argv[1:]),
    'cores': 1 if args.one_core else len(os.sched_getaffinity(0)),
    'clock': clock,
    'processor': processor(),
    'python': platform.python_version(),
    'load_average': load,
    'pictures_per_s': rates,
    'of_each_round': {side: values[side, work] for side in rates},
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


def grow(work: str, args: argparse.Namespace, batch: int, size: int) -> dict[str, float]:
  """Ours alone."""
  args = argparse.Namespace(**vars(args) | dict(batch=batch, size=size, trace=None))
  side = start(work, args, 'ours')
  found = rounds.record_turns({'ours': side}, [('ours', work)], args.rounds, args.steps * batch, before=batch)
  side.close()
  clock = 'per_cpu_s' if args.one_core else 'per_wall_s'
  values = [getattr(rate, clock) for rate in found['ours', work]]
  return {
    'batch': batch,
    'size': size,
    'pictures_per_s': statistics.median(values),
    'of_each_round': values,
    'peak_mb': side.peak_mb,
    'model_gflop': needed_flops(work, batch, size) / 1e9,
  } | {key: value for key, value in side.facts.items() if key in ('compile_s', 'temporaries_mb')}


def start(work: str, args: argparse.Namespace, name: str, wait: bool = True) -> rounds.Side:
  """A process of ours, with huge pages as train.py has them, or of a mode of the peer; on one core or on all."""
  arguments = [work, f'--batch={args.batch}', f'--size={args.size}', f'--device={args.device}', f'--dtype={args.dtype}']
  options = [*our_options(args), HUGE] if name == 'ours' else PEER_MODES[work][name]
  arguments += [option for option in options if option != HUGE]
  cores = sorted(os.sched_getaffinity(0))
  return rounds.Side(
    sys.executable,
    f'benchmarks.{"our" if name == "ours" else "peer"}_model',
    arguments,
    {cores[0]} if args.one_core else None,
    threads=1 if args.one_core else len(cores),
    wait=wait,
    huge=HUGE in options,
  )


def our_options(args: argparse.Namespace) -> list[str]:
  """Of ours alone."""
  trace = [f'--trace={args.trace}'] if args.trace else []
  return [f'--remat={args.remat}', f'--text_budget={args.text_budget}', *trace, *['--hold'] * args.hold]


def needed_flops(work: str, batch: int, size: int) -> float:
  """Model FLOPs of the work, by hand."""
  config = our_model.make_config(batch, 'float32', 0, size)
  if work != 'train':
    return {'encode': model_flops.encode_images, 'windows': model_flops.encode_windows}[work](config.model, batch, size)
  return statistics.mean(
    model_flops.train_step(
      config.model, caption_lengths.draw_lengths(batch, config.data.num_prompts, our_model.CONTEXT, seed).tolist()
    )
    for seed in range(caption_lengths.BATCHES)
  )


def processor() -> str:
  """What the machine calls its processor."""
  lines = pathlib.Path('/proc/cpuinfo')
  names = (
    [line.split(':', 1)[1].strip() for line in lines.read_text().splitlines() if line.startswith('model name')]
    if lines.exists()
    else []
  )
  return names[0] if names else platform.processor()
