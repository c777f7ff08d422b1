"""Our model and its peer, eager and compiled; figures as JSON."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys
from collections.abc import Sequence

from benchmarks import caption_lengths, model_flops, our_model, rounds

TRAINING_MODES = {
    'eager': [], 'torch.compile': ['--compile=default'],
    'eager, padded to the longest': ['--longest'],
    'torch.compile, padded to the longest': ['--longest', '--compile=default']}
INFERENCE_MODES = {
    'eager': [], 'torch.compile': ['--compile=default'],
    'torch.compile, reduce-overhead': ['--compile=reduce-overhead']}
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
  modes = [mode for mode in PEER_MODES[work] if mode != 'torch.compile, reduce-overhead']
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--steps', type=int, default=3, help='of each round')
  parser.add_argument('--batch', type=int, default=8)
  parser.add_argument('--size', type=int, default=size)
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--remat', choices=('none', 'dots', 'blocks'), default='none', help='of ours')
  parser.add_argument('--peer_modes', nargs='*', choices=list(PEER_MODES[work]), default=modes)
  parser.add_argument('--one_core', action='store_true', help=(
      'One core and thread for each side, timed by its own clock, which other programs hardly disturb.'))
  parser.add_argument('--growth', action='store_true', help='Ours at other batches and sizes as well.')
  parser.add_argument('--trace', type=pathlib.Path, help='Folder for a profile of ours: benchmarks/trace_summary.py.')
  parser.add_argument('--output', type=pathlib.Path, required=True, help='JSON file.')
  args = parser.parse_args()
  report = compare(work, args)
  if args.growth:
    points = dict.fromkeys([(batch, args.size) for batch in batches] + [(args.batch, size) for size in sizes])
    report['growth'] = [grow(work, args, *point) for point in points]
  text = json.dumps(report, indent=2) + '\n'
  args.output.write_text(text, encoding='utf-8')
  print(text, end='')


def compare(work: str, args: argparse.Namespace) -> dict[str, object]:
  """Ours beside the peer's modes: rounds and their medians."""
  load = os.getloadavg()[0]
  facts, peaks, found, failed = run_sides(work, args)
  clock = 'per_cpu_s' if args.one_core else 'per_wall_s'
  values = {pair: [getattr(rate, clock) for rate in rates] for pair, rates in found.items()}
  rates = {side: statistics.median(values[side, work]) for side in facts}
  peak = statistics.median(values['ours', 'multiply']) * facts['ours']['product_flop']
  published = PUBLISHED.get(facts['ours']['device']) if args.dtype == 'bfloat16' else None
  flops = needed_flops(work, args.batch, args.size)
  share = lambda peak: {side: rate * flops / args.batch / peak for side, rate in rates.items()}
  return {
      'work': work, 'batch': args.batch, 'size': args.size, 'dtype': args.dtype, 'device': facts['ours']['device'],
      'rounds': args.rounds, 'steps': args.steps, 'command': ' '.join(sys.orig_argv[1:]),
      'cores': 1 if args.one_core else len(os.sched_getaffinity(0)), 'clock': clock, 'processor': processor(),
      'python': platform.python_version(), 'load_average': load,
      'pictures_per_s': rates, 'of_each_round': {side: values[side, work] for side in rates},
      'ratio_to': {mode: rates['ours'] / rate for mode, rate in rates.items() if mode != 'ours'},
      'failed': failed, 'peak_mb': peaks,
      'model_gflop': flops / 1e9, 'machine_gflop_per_s': peak / 1e9, 'utilisation': share(peak),
      'published_gflop_per_s': published and published / 1e9,
      'utilisation_of_published': published and share(published), 'facts': facts}


def run_sides(work: str, args: argparse.Namespace) -> tuple[dict, dict, dict, dict[str, str]]:
  """Facts and peaks by side, rates by (side, work), and the peer's modes that did not run.

  On a CPU, which other programs use as well, the sides take turns. A GPU's memory would not hold them all: there each
  starts when the one before has ended.
  """
  modes = {'ours': []} | {mode: PEER_MODES[work][mode] for mode in args.peer_modes}
  facts, peaks, found, failed = {}, {}, {}, {}
  for names in [list(modes)] if args.device == 'cpu' else [[name] for name in modes]:
    try:
      sides = {name: start(work, args, name, modes[name]) for name in names}
      order = [(name, work) for name in sides] + [('ours', 'multiply')] * ('ours' in sides)
      found |= rounds.record_turns(sides, order, args.rounds, args.steps * args.batch)
    except SystemExit as error:
      if 'ours' in names:
        raise
      failed |= {name: str(error) for name in names}
      continue
    for name, side in sides.items():
      facts[name], peaks[name] = side.facts, side.peak_mb
      side.close()
  return facts, peaks, found, failed


def grow(work: str, args: argparse.Namespace, batch: int, size: int) -> dict[str, float]:
  """Ours alone."""
  args = argparse.Namespace(**vars(args) | dict(batch=batch, size=size, trace=None))
  side = start(work, args, 'ours', [])
  found = rounds.record_turns({'ours': side}, [('ours', work)], args.rounds, args.steps * batch)
  side.close()
  clock = 'per_cpu_s' if args.one_core else 'per_wall_s'
  values = [getattr(rate, clock) for rate in found['ours', work]]
  return {'batch': batch, 'size': size, 'pictures_per_s': statistics.median(values), 'of_each_round': values,
          'peak_mb': side.peak_mb, 'model_gflop': needed_flops(work, batch, size) / 1e9} | {
              key: value for key, value in side.facts.items() if key in ('compile_s', 'temporaries_mb')}


def start(work: str, args: argparse.Namespace, name: str, mode: list[str]) -> rounds.Side:
  """A process of one side, on one core or on all."""
  arguments = [work, f'--batch={args.batch}', f'--size={args.size}', f'--device={args.device}',
               f'--dtype={args.dtype}', *mode]
  if name == 'ours':
    arguments += [f'--remat={args.remat}'] + ([f'--trace={args.trace}'] if args.trace else [])
  cores = sorted(os.sched_getaffinity(0))
  return rounds.Side(sys.executable, f'benchmarks.{"our" if name == "ours" else "peer"}_model', arguments,
                     {cores[0]} if args.one_core else None, threads=1 if args.one_core else len(cores))


def needed_flops(work: str, batch: int, size: int) -> float:
  """Model FLOPs of the work, by hand."""
  config = our_model.make_config(batch, 'float32', 0, size)
  if work != 'train':
    return {'encode': model_flops.encode_images, 'windows': model_flops.encode_windows}[work](
        config.model, batch, size)
  lengths = caption_lengths.draw_lengths(batch, config.data.num_prompts, our_model.CONTEXT)
  return model_flops.train_step(config.model, lengths.tolist())


def processor() -> str:
  """What the machine calls its processor."""
  lines = pathlib.Path('/proc/cpuinfo')
  names = [line.split(':', 1)[1].strip() for line in lines.read_text().splitlines()
           if line.startswith('model name')] if lines.exists() else []
  return names[0] if names else platform.processor()
