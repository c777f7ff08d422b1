"""Pictures a second of one core, ours and the peer's, and where a second goes: prints JSON.

  python -m benchmarks.input_pipeline [--photos=FOLDER]

The peer is webdataset, Pillow, timm's `create_transform` with the paper's arguments and the same
noun prompts. Both sides take turns on one core, on the same tars. The first run makes the peer's
environment in `.cache/peer`.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import venv

from benchmarks import rounds, shards
from groupvit_jax.data import tokenizer

CACHE = rounds.ROOT / '.cache'
REQUIREMENTS = pathlib.Path(__file__).with_name('requirements-peer.txt')
PEER = (
  'webdataset + Pillow + timm create_transform on CPU tensors, random erasing and '
  'normalisation included, no loader process; texts by our functions; torchvision without '
  'its compiled operators, which Pillow transforms do not use'
)
VOCABULARY = 4000


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--photos', default='', help='folder of JPEGs; otherwise made-up pictures')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--pictures', type=int, default=256, help='pictures of a round')
  parser.add_argument(
    '--workers', type=int, nargs='*', default=[], help='numbers of worker processes to time as well, on all cores'
  )
  parser.add_argument('--no-peer', action='store_true', help='ours alone')
  args = parser.parse_args()
  folder = CACHE / 'input_pipeline' / (args.photos.strip('/').replace('/', '_') or 'made_up')
  pattern = shards.write_shards(folder, args.photos)
  vocabulary = folder / tokenizer.SENTENCEPIECE_FILE
  if not vocabulary.exists():
    tokenizer.train_sentencepiece(shards.captions(folder), vocabulary, VOCABULARY)
  arguments = [f'--shards={pattern}', f'--tokenizer={vocabulary}']
  sides = {'ours': _start(sys.executable, 'benchmarks.our_pipeline', arguments)}
  if not args.no_peer:
    sides['peer'] = _start(_peer_python(), 'benchmarks.peer_pipeline', arguments)
  rates = _measure(sides, args.rounds, args.pictures)
  report = _report(sides, rates)
  for side in sides.values():
    side.close()
  report['workers'] = {n: _with_workers(n, arguments, args) for n in args.workers}
  print(json.dumps(report, indent=2))


def _start(python: str, module: str, arguments: list[str]) -> rounds.Side:
  cores = os.sched_getaffinity(0) if hasattr(os, 'sched_getaffinity') else {0}
  return rounds.Side(python, module, arguments, {min(cores)})


def _measure(sides: dict[str, rounds.Side], number: int, pictures: int) -> dict[tuple[str, str], rounds.Rate]:
  works = [('ours', work) for work in ('full', 'plain', 'bare decode', 'crop and flip')]
  works[1:1] = [('peer', 'full')] * ('peer' in sides)
  works += [(name, stage) for name, side in sides.items() for stage in side.facts['stages']]
  return rounds.take_turns(sides, works, number, pictures)


def _report(sides: dict[str, rounds.Side], rates: dict[tuple[str, str], rounds.Rate]) -> dict:
  """Rates by the clock of the core, for machines that do other things as well."""
  rate = lambda *pair: round(rates[pair].per_cpu_s, 1)
  report = {
    'machine': {
      'processor': _processor(),
      'cores': os.cpu_count(),
      'load': round(os.getloadavg()[0], 1),
      'python': platform.python_version(),
    },
    'pictures': 'longer side 512, JPEG quality 95',
    'per_core_s': {
      'full_recipe': rate('ours', 'full'),
      'crop_flip_whole_pipeline': rate('ours', 'plain'),
      'crop_flip_pictures': rate('ours', 'crop and flip'),
      'bare_decode': rate('ours', 'bare decode'),
    },
    'crop_flip_share_of_bare_decode': round(
      rates['ours', 'crop and flip'].per_cpu_s / rates['ours', 'bare decode'].per_cpu_s, 3
    ),
  }
  if 'peer' in sides:
    report['peer'] = PEER
    report['per_core_s']['peer_full_recipe'] = rate('peer', 'full')
    report['full_recipe_against_peer'] = {
      'by_cpu_clock': round(rates['ours', 'full'].per_cpu_s / rates['peer', 'full'].per_cpu_s, 2),
      'by_wall_clock': round(rates['ours', 'full'].per_wall_s / rates['peer', 'full'].per_wall_s, 2),
    }
  for name, side in sides.items():
    stages = {stage: 1e3 / rates[name, stage].per_cpu_s for stage in side.facts.pop('stages')}
    whole = 1e3 / rates[name, 'full'].per_cpu_s
    # The transfer is the training process's work, and no part of what was timed.
    rest = whole - sum(ms for stage, ms in stages.items() if stage != 'transfer')
    report[f'{name}_ms_a_picture'] = {
      stage: round(ms, 3) for stage, ms in (stages | {'rest': rest, 'whole': whole}).items()
    }
    report[f'{name}_versions'] = side.facts
  return report


def _with_workers(number: int, arguments: list[str], args: argparse.Namespace) -> float:
  """Pictures a second by the wall's clock, worker processes on all cores."""
  side = rounds.Side(sys.executable, 'benchmarks.our_pipeline', [*arguments, f'--workers={number}'], None)
  rate = rounds.take_turns({'': side}, [('', 'full')], args.rounds, 8 * args.pictures)
  side.close()
  return round(rate['', 'full'].per_wall_s, 1)


def _peer_python() -> str:
  python = CACHE / 'peer' / 'bin' / 'python'
  done = CACHE / 'peer' / REQUIREMENTS.name
  if not done.exists() or done.read_bytes() != REQUIREMENTS.read_bytes():
    venv.create(CACHE / 'peer', with_pip=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '-r', REQUIREMENTS], check=True, stdout=sys.stderr)
    done.write_bytes(REQUIREMENTS.read_bytes())
  return str(python)


def _processor() -> str:
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor()


if __name__ == '__main__':
  main()
