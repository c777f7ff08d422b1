"""Our model and its peer, eager and compiled, taking turns; figures as JSON."""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys

from benchmarks import caption_lengths, model_flops, our_model, rounds

PEER_MODES = {'eager': [], 'torch.compile': ['--compile']}
BATCH, SIZE = 8, 224  # of the comparison


def measure(work: str, description: str, batches: tuple[int, ...], sizes: tuple[int, ...]) -> None:
  """Compares at one batch, then lets ours grow; writes what was found.

  Args:
    work: 'train' or 'encode'.
    description: of the command.
    batches: at `SIZE`, ours alone.
    sizes: of pictures at `BATCH`, ours alone.
  """
  parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--peer_modes', nargs='*', choices=sorted(PEER_MODES), default=sorted(PEER_MODES))
  parser.add_argument('--one_core', action='store_true', help=(
      'One core and thread for each side, timed by its own clock, which other programs hardly disturb.'))
  parser.add_argument('--growth', action='store_true', help='Ours at other batches and sizes as well.')
  parser.add_argument('--output', type=pathlib.Path, required=True, help='JSON file.')
  args = parser.parse_args()
  report = compare(work, args.rounds, args.peer_modes, args.one_core)
  if args.growth:
    points = dict.fromkeys([(batch, SIZE) for batch in batches] + [(BATCH, size) for size in sizes])
    report['growth'] = [grow(work, *point, args.rounds, args.one_core) for point in points]
  text = json.dumps(report, indent=2) + '\n'
  args.output.write_text(text, encoding='utf-8')
  print(text, end='')


def compare(work: str, number: int, peer_modes: list[str], one_core: bool) -> dict[str, object]:
  """Ours beside the peer's modes: medians of interleaved rounds."""
  arguments = [work, f'--batch={BATCH}', f'--size={SIZE}']
  load = os.getloadavg()[0]
  sides = {'ours': start('our_model', arguments, one_core)}
  sides |= {mode: start('peer_model', arguments + PEER_MODES[mode], one_core) for mode in peer_modes}
  order = [(side, work) for side in sides] + [('ours', 'multiply')]
  found = rounds.take_turns(sides, order, number, BATCH)
  for side in sides.values():
    side.close()
  clock = 'per_cpu_s' if one_core else 'per_wall_s'
  rates = {side: getattr(found[side, work], clock) for side in sides}
  peak = getattr(found['ours', 'multiply'], clock) * 2 * our_model.PEAK_SIZE**3
  flops = needed_flops(work, BATCH, SIZE)
  return {
      'work': work, 'batch': BATCH, 'size': SIZE, 'dtype': 'float32', 'rounds': number,
      'command': ' '.join(sys.orig_argv[1:]),
      'cores': 1 if one_core else os.cpu_count(), 'clock': clock, 'processor': processor(),
      'python': platform.python_version(), 'load_average': load,
      'images_per_s': rates, 'ratio_to': {mode: rates['ours'] / rates[mode] for mode in peer_modes},
      'peak_mb': {side: process.peak_mb for side, process in sides.items()},
      'model_gflop': flops / 1e9, 'machine_gflop_per_s': peak / 1e9,
      'utilisation': {side: rate * flops / BATCH / peak for side, rate in rates.items()},
      'facts': {side: process.facts for side, process in sides.items()}}


def grow(work: str, batch: int, size: int, number: int, one_core: bool) -> dict[str, float]:
  """Ours alone."""
  side = start('our_model', [work, f'--batch={batch}', f'--size={size}'], one_core)
  clock = 'per_cpu_s' if one_core else 'per_wall_s'
  rate = statistics.median(getattr(side.run(work, batch), clock) for _ in range(number))
  side.close()
  return {'batch': batch, 'size': size, 'images_per_s': rate, 'peak_mb': side.peak_mb,
          'model_gflop': needed_flops(work, batch, size) / 1e9} | {
              key: value for key, value in side.facts.items() if key in ('compile_s', 'temporaries_mb')}


def start(module: str, arguments: list[str], one_core: bool) -> rounds.Side:
  """A process of one side, on one core or on all."""
  cores = {min(os.sched_getaffinity(0))} if one_core else None
  return rounds.Side(sys.executable, f'benchmarks.{module}', arguments, cores,
                     threads=1 if one_core else os.cpu_count())


def needed_flops(work: str, batch: int, size: int) -> float:
  """Model FLOPs of the work, by hand."""
  config = our_model.make_config(batch, 'float32', 0)
  if work == 'encode':
    return model_flops.encode_images(config.model, batch, size)
  lengths = caption_lengths.draw_lengths(batch, config.data.num_prompts, our_model.CONTEXT)
  return model_flops.train_step(config.model, lengths.tolist())


def processor() -> str:
  """What the machine calls its processor."""
  lines = pathlib.Path('/proc/cpuinfo')
  names = [line.split(':', 1)[1].strip() for line in lines.read_text().splitlines()
           if line.startswith('model name')] if lines.exists() else []
  return names[0] if names else platform.processor()
