"""Images a second that one core prepares, ours and the peer's.

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
  args = parser.parse_args()
  folder = CACHE / 'input_pipeline' / (args.photos.strip('/').replace('/', '_') or 'made_up')
  pattern = tars.write_shards(folder, args.photos)
  vocabulary = folder / tokenizer.SENTENCEPIECE_FILE
  if not vocabulary.exists():
    tokenizer.train_sentencepiece(tars.read_captions(folder), vocabulary, VOCABULARY)
  arguments = [f'--shards={pattern}', f'--tokenizer={vocabulary}']
  cores = {min(os.sched_getaffinity(0))}
  sides = {
    'ours': processes.Side('our_pipeline', arguments, cores=cores).wait(),
    'peer': processes.Side('peer_pipeline', arguments, cores=cores, python=_peer_python()).wait(),
  }
  machine = processes.machine()
  works = [(name, 'full') for name in sides] + [('ours', work) for work in ('plain', 'bare decode', 'crop and flip')]
  found = processes.take_turns(sides, works, args.rounds, args.pictures)
  rates = {f'{side}, {work}': processes.median(rounds) for (side, work), rounds in found.items()}
  report = {
    'machine': machine,
    'versions': {name: side.facts for name, side in sides.items()},
    'images': f'longer side {tars.LONGER_SIDE}, JPEG quality {tars.QUALITY}',
    # By the clock of the core, for machines that do other things as well.
    'images_per_core_s': {name: round(rate.per_cpu_s, 1) for name, rate in rates.items()},
    'full_recipe_against_peer': round(rates['ours, full'].per_cpu_s / rates['peer, full'].per_cpu_s, 3),
  }
  for side in sides.values():
    side.close()
  processes.write(report)


def _peer_python() -> str:
  python, done = CACHE / 'peer' / 'bin' / 'python', CACHE / 'peer' / REQUIREMENTS.name
  if not done.exists() or done.read_bytes() != REQUIREMENTS.read_bytes():
    venv.create(CACHE / 'peer', with_pip=True)
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '-r', REQUIREMENTS], check=True, stdout=sys.stderr)
    done.write_bytes(REQUIREMENTS.read_bytes())
  return str(python)
