"""Runs the documentation's commands, every fenced block marked `sh run` or `python run`.

  make docs-check
  python docs/check.py README.md docs/import_export.md

Each document gets a folder of its own with links to everything here, so that its blocks run in order and may use what
earlier ones wrote, and with what the commands speak of: a short run in `runs/quickstart`, pictures with labels in two
layouts, captions, and random weights as the released ones lie in `groupvit-gcc-yfcc` and `group_vit_gcc_yfcc.pth`.

A block that is not run says why in the place of `run`: one of `REASONS`, or the test that runs it.
"""

from collections.abc import Iterator, Sequence
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_SHORT_RUN = [
  '--config.total_steps=40',
  '--config.optim.warmup_steps=10',
  '--config.checkpoint.every_steps=20',
  '--config.eval.every_steps=40',
  '--config.data.scenes.num_heldout=8',
  '--config.tokenizer.num_captions=500',
]

# Why a block is not run.
REASONS = {
  'needs-network': 'it installs or downloads something',
  'needs-data': 'it reads data sets, photographs or weights that do not come with this project',
  'needs-minutes': 'it trains or compiles for longer than such a check may take',
  'needs-quiet-machine': 'it measures, and writes what these pages quote',
}


class Block(NamedTuple):
  """A fenced block of a Markdown document."""

  language: str  # 'sh', 'python' or another
  mark: str  # 'run', or why it is not run
  text: str

  @property
  def script(self) -> str:
    """What a shell runs."""
    return f"python - <<'END'\n{self.text}END\n" if self.language == 'python' else self.text


def fenced_blocks(text: str) -> list[Block]:
  """The fenced blocks of a Markdown document."""
  return [Block(*found) for found in re.findall(r'^```(\w*) *(.*)\n((?:.*\n)*?)```$', text, re.MULTILINE)]


def prepare(folder: pathlib.Path) -> None:
  """Links to the project, and what commands speak of but for trained runs."""
  import torch

  from tests import huggingface_models, official_layouts

  for path in ROOT.iterdir():
    if path.name not in ('runs', '.git'):
      (folder / path.name).symlink_to(path)
  rng = np.random.default_rng(0)
  for name in ('photo.jpg', 'image.jpg', 'image.png', 'a.png', 'b.png'):
    pixels = rng.integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(folder / name)
  official_layouts.voc2012(folder / 'downloads')
  official_layouts.folder(folder / 'coco_mini')
  words = [''.join(rng.choice(list('aeioubdgklmnprst'), rng.integers(3, 9))) for _ in range(3000)]
  (folder / 'captions.txt').write_text(''.join(' '.join(rng.choice(words, 8)) + '\n' for _ in range(5000)))
  huggingface_models.write_released_folder(folder / 'groupvit-gcc-yfcc')
  authors = huggingface_models.random_model(huggingface_models.authors_config()).state_dict()
  torch.save({'model': huggingface_models.authors_state(authors)}, folder / 'group_vit_gcc_yfcc.pth')


def run(script: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
  """Runs a script with this Python, as a shell would, up to the first command that fails."""
  path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ['PATH']])
  return subprocess.run(
    ['bash', '-euo', 'pipefail', '-c', script],
    cwd=folder,
    text=True,
    capture_output=True,
    env=os.environ | {'PATH': path},
  )


def check(documents: Sequence[pathlib.Path]) -> Iterator[str]:
  """Runs all marked blocks, and yields what went wrong with each that failed."""
  with tempfile.TemporaryDirectory() as scratch:
    staged = pathlib.Path(scratch) / 'staged'
    staged.mkdir()
    prepare(staged)
    train = ['python train.py --config=configs/quickstart.py --workdir=runs/quickstart', *_SHORT_RUN]
    done = run(' '.join(train), staged)
    if done.returncode:
      yield f'the run that the commands speak of cannot be made:\n{done.stderr}'
      return
    for document in documents:
      folder = pathlib.Path(scratch) / document.stem
      shutil.copytree(staged, folder, symlinks=True)
      for block in fenced_blocks(document.read_text()):
        if block.mark != 'run':
          if block.mark in REASONS:
            print(f'{document.name}: not run, for {REASONS[block.mark]}:\n{block.text}', flush=True)
          continue
        print(f'{document.name}:\n{block.text}', flush=True)
        started = time.perf_counter()
        done = run(block.script, folder)
        print(f'({time.perf_counter() - started:.0f} s)\n', flush=True)
        if done.returncode:
          yield f'{document.name}:\n{block.text}\n{done.stderr}'


if __name__ == '__main__':
  failures = list(check([pathlib.Path(name) for name in sys.argv[1:]]))
  sys.exit('\n\n'.join(failures) if failures else 0)
