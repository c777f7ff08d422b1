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
  parser.add_argument('--output', type=pathlib.Path, required=True, help='JSON file.')
  args = parser.parse_args()
  report = compare(work, args.rounds, args.peer_modes)
  points = dict.fromkeys([(batch, SIZE) for batch in batches] + [(BATCH, size) for size in sizes])
  report['growth'] = [grow(work, batch, size, args.rounds) for batch, size in points]
  text = json.dumps(report, indent=2) + '\n'
  args.output.write_text(text, encoding='utf-8')
  print(text, end='')


def compare(work: str, number: int, peer_modes: list[str]) -> dict[str, object]:
  """Ours beside the peer's modes: medians of interleaved rounds."""
  arguments = [work, f'--batch={BATCH}', f'--size={SIZE}']
  sides = {'ours': start('our_model', arguments)}
  sides |= {mode: start('peer_model', arguments + PEER_MODES[mode]) for mode in peer_modes}
  order = [(side, work) for side in sides] + [('ours', 'multiply')]
  found = rounds.take_turns(sides, order, number, BATCH)
  for side in sides.values():
    side.close()
  rates = {side: found[side, work].per_wall_s for side in sides}
  peak = found['ours', 'multiply'].per_wall_s * 2 * our_model.PEAK_SIZE**3
  flops = needed_flops(work, BATCH, SIZE)
  return {
      'work': work, 'batch': BATCH, 'size': SIZE, 'dtype': 'float32', 'rounds': number,
      'command': ' '.join(sys.orig_argv[1:]), 'cores': os.cpu_count(), 'processor': processor(),
      'python': platform.python_version(), 'load_average': os.getloadavg()[0],
      'images_per_s': rates, 'ratio_to': {mode: rates['ours'] / rates[mode] for mode in peer_modes},
      'peak_mb': {side: process.peak_mb for side, process in sides.items()},
      'model_gflop': flops / 1e9, 'machine_gflop_per_s': peak / 1e9,
      'utilisation': {side: rate * flops / BATCH / peak for side, rate in rates.items()},
      'facts': {side: process.facts for side, process in sides.items()}}


def grow(work: str, batch: int, size: int, number: int) -> dict[str, float]:
  """Ours alone."""
  side = start('our_model', [work, f'--batch={batch}', f'--size={size}'])
  rate = statistics.median(side.run(work, batch).per_wall_s for _ in range(number))
  side.close()
  return {'batch': batch, 'size': size, 'images_per_s': rate, 'peak_mb': side.peak_mb,
          'model_gflop': needed_flops(work, batch, size) / 1e9} | {
              key: value for key, value in side.facts.items() if key in ('compile_s', 'temporaries_mb')}


def start(module: str, arguments: list[str]) -> rounds.Side:
  """A process of one side, on all cores."""
  return rounds.Side(sys.executable, f'benchmarks.{module}', arguments, None, threads=os.cpu_count())


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
