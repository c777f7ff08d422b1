"""Images a second that one core prepares, ours and the peer's, and where the time goes.

  python -m benchmarks input_pipeline [--photos=FOLDER]

The peer is webdataset, Pillow, timm's `create_transform` with the paper's arguments, random erasing and normalisation
included, and the same noun prompts. Both sides take turns on one core, on the same tars. The first run creates the
peer's environment in `.cache/peer`.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import venv

from benchmarks import processes, tars
from groupvit_jax.data import tokenizer

CACHE = processes.ROOT / '.cache'
REQUIREMENTS = pathlib.Path(__file__).with_name('requirements-peer.txt')
VOCABULARY = 4000


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--photos', default='', help='folder of JPEGs; otherwise made-up images')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--pictures', type=int, default=256, help='images of a round')
  parser.add_argument('--workers', type=int, nargs='*', default=[], help='numbers of worker processes to time as well')
  parser.add_argument('--no-peer', action='store_true', help='ours alone')
  args = parser.parse_args()
  folder = CACHE / 'input_pipeline' / (args.photos.strip('/').replace('/', '_') or 'made_up')
  pattern = tars.write_shards(folder, args.photos)
  vocabulary = folder / tokenizer.SENTENCEPIECE_FILE
  if not vocabulary.exists():
    tokenizer.train_sentencepiece(tars.read_captions(folder), vocabulary, VOCABULARY)
  arguments = [f'--shards={pattern}', f'--tokenizer={vocabulary}']
  cores = {min(os.sched_getaffinity(0))}
  sides = {'ours': processes.Side('our_pipeline', arguments, cores=cores).wait()}
  if not args.no_peer:
    sides['peer'] = processes.Side('peer_pipeline', arguments, cores=cores, python=_peer_python()).wait()
  machine = processes.machine()
  works = [(name, 'full') for name in sides] + [('ours', work) for work in ('plain', 'bare decode', 'crop and flip')]
  works += [(name, stage) for name, side in sides.items() for stage in side.facts['stages']]
  found = processes.take_turns(sides, works, args.rounds, args.pictures)
  report = {'machine': machine} | _report(sides, {pair: processes.median(rates) for pair, rates in found.items()})
  for side in sides.values():
    side.close()
  report['workers'] = {n: _with_workers(n, arguments, args) for n in args.workers}
  processes.write(report)


def _report(sides: dict[str, processes.Side], rates: dict[tuple[str, str], processes.Rate]) -> dict:
  """Rates by the clock of the core, for machines that do other things as well."""
  ratio = lambda one, other, clock: round(getattr(rates[one], clock) / getattr(rates[other], clock), 3)
  report = {
    'pictures': f'longer side {tars.LONGER_SIDE}, JPEG quality {tars.QUALITY}',
    'per_core_s': {
      f'{side}, {work}': round(rates[side, work].per_cpu_s, 1)
      for side, work in rates
      if work not in sides[side].facts['stages']
    },
    'crop_flip_share_of_bare_decode': ratio(('ours', 'crop and flip'), ('ours', 'bare decode'), 'per_cpu_s'),
  }
  if 'peer' in sides:
    report['full_recipe_against_peer'] = {
      f'by_{name}_clock': ratio(('ours', 'full'), ('peer', 'full'), f'per_{name}_s') for name in ('cpu', 'wall')
    }
  for name, side in sides.items():
    ms = {stage: 1e3 / rates[name, stage].per_cpu_s for stage in side.facts['stages']}
    whole = 1e3 / rates[name, 'full'].per_cpu_s
    # The transfer is the training process's work, and no part of what was timed.
    rest = whole - sum(value for stage, value in ms.items() if stage != 'transfer')
    ms |= {'rest': rest, 'whole': whole}
    report[f'{name}_ms_a_picture'] = {stage: round(value, 3) for stage, value in ms.items()}
    report[f'{name}_versions'] = {key: value for key, value in side.facts.items() if key != 'stages'}
  return report


def _with_workers(number: int, arguments: list[str], args: argparse.Namespace) -> float:
  """Images a second by the wall's clock, worker processes on all cores."""
  side = processes.Side('our_pipeline', [*arguments, f'--workers={number}']).wait()
  rates = processes.take_turns({'': side}, [('', 'full')], args.rounds, 8 * args.pictures)
  side.close()
  return round(processes.median(rates['', 'full']).per_wall_s, 1)


def _peer_python() -> str:
  python, done = CACHE / 'peer' / 'bin' / 'python', CACHE / 'peer' / REQUIREMENTS.name
  if not done.exists() or done.read_bytes() != REQUIREMENTS.read_bytes():
    venv.create(CACHE / 'peer', with_pip=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '-r', REQUIREMENTS], check=True, stdout=sys.stderr)
    done.write_bytes(REQUIREMENTS.read_bytes())
  return str(python)
