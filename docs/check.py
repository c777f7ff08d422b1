"""Runs the commands of the documentation, every fenced block that is marked `sh run`, and builds the API reference.

  make docs-check
  python docs/check.py README.md docs/import_export.md

Each document gets a folder of its own with links to everything here, so that its blocks run in order and may use what
earlier ones wrote, and with what the commands speak of: a short run in `runs/quickstart`, pictures, and random weights
in the layout of the released ones in `groupvit-gcc-yfcc` and `group_vit_gcc_yfcc.pth`.
"""

from collections.abc import Iterator, Sequence
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

_SHORT_RUN = ['--config.total_steps=40', '--config.optim.warmup_steps=10', '--config.checkpoint.every_steps=20',
              '--config.eval.every_steps=40', '--config.data.scenes.num_heldout=8',
              '--config.tokenizer.num_captions=500']


def marked_blocks(text: str) -> list[str]:
  """The scripts of a Markdown document that can be run."""
  return re.findall(r'^```sh run\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def write_stand_in(folder: pathlib.Path) -> None:
  """A Hugging Face folder like the released ones, of a narrow model with random weights."""
  from tests.huggingface_models import random_model, small_config, write_clip_folder
  random_model(small_config()).save_pretrained(folder)
  write_clip_folder(folder)


def write_authors_stand_in(path: pathlib.Path) -> None:
  """A file with the authors' names, likewise."""
  import torch
  from tests.huggingface_models import authors_config, authors_state, random_model
  torch.save({'model': authors_state(random_model(authors_config()).state_dict())}, path)


def prepare(folder: pathlib.Path) -> None:
  """Links to the project, and pictures."""
  for path in ROOT.iterdir():
    if path.name not in ('runs', '.git'):
      (folder / path.name).symlink_to(path)
  pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
  for name in ('photo.jpg', 'picture.jpg', 'picture.png'):
    Image.fromarray(pixels).resize((320, 240), Image.Resampling.BICUBIC).save(folder / name)


def run(script: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
  """Runs a block with this Python, as a shell would, up to the first command that fails."""
  path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ['PATH']])
  return subprocess.run(['bash', '-euo', 'pipefail', '-c', script], cwd=folder, text=True, capture_output=True,
                        env=os.environ | {'PATH': path})


def check(documents: Sequence[pathlib.Path]) -> Iterator[str]:
  """Builds the reference, runs all marked blocks, and yields what went wrong with each that failed."""
  with tempfile.TemporaryDirectory() as scratch:
    done = run(f'python -m pdoc --docformat=google --output-directory={scratch}/reference groupvit_jax', ROOT)
    if done.returncode or 'Warn:' in done.stderr:
      yield f'the API reference does not build without warnings:\n{done.stderr}'
    trained = pathlib.Path(scratch) / 'quickstart'
    done = run(' '.join(['python train.py --config=configs/quickstart.py', f'--workdir={trained}', *_SHORT_RUN]), ROOT)
    if done.returncode:
      yield f'the short run failed:\n{done.stderr}'
      return
    for document in documents:
      scripts = marked_blocks(document.read_text())
      if not scripts:
        continue
      folder = pathlib.Path(scratch) / document.stem
      (folder / 'runs').mkdir(parents=True)
      prepare(folder)
      write_stand_in(folder / 'groupvit-gcc-yfcc')
      write_authors_stand_in(folder / 'group_vit_gcc_yfcc.pth')
      (folder / 'runs' / 'quickstart').symlink_to(trained)
      for script in scripts:
        print(f'{document.name}:\n{script}', flush=True)
        done = run(script, folder)
        if done.returncode:
          yield f'{document.name}:\n{script}\n{done.stderr}'


if __name__ == '__main__':
  failures = list(check([pathlib.Path(name) for name in sys.argv[1:]]))
  sys.exit('\n\n'.join(failures) if failures else 0)
