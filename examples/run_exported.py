"""Groups the patches of an image and names each segment, with jax and Pillow alone.

python -m groupvit_jax.commands.export --workdir=runs/quickstart --format=stablehlo --output=exported
python examples/run_exported.py exported image.jpg
"""

import json
import pathlib
import sys

from jax import export
import numpy as np
from PIL import Image

folder, image = map(pathlib.Path, sys.argv[1:])
image_tower, text_tower = (
  export.deserialize((folder / f'{side}.stablehlo').read_bytes()) for side in ('image', 'text')
)
bundle = json.loads((folder / 'bundle.json').read_text())
height, width = bundle['image_size']  # or any other multiples of bundle['patch_size']
out = image_tower.call(np.asarray(Image.open(image).convert('RGB').resize((width, height)))[None])

first, *later = (np.asarray(soft[0]) for soft in out['assignments'])  # each [S, N]
for soft in later:
  first = soft @ first
for row in first.argmax(axis=0).reshape(height // bundle['patch_size'], -1):  # the final segment of each patch
  print(' '.join(f'{segment:2d}' for segment in row))

names, ids = zip(*bundle['trial_texts'].items())  # ids of other texts: with the tokenizer in the folder
segments, texts = (
  x / np.linalg.norm(x, axis=-1, keepdims=True)
  for x in (np.asarray(out['segment_embeds'][0]), np.asarray(text_tower.call(np.array(ids, np.int32))))
)
for segment, best in enumerate((segments @ texts.T).argmax(axis=1)):
  print(f'segment {segment}: {names[best]}')
