"""Groups the patches of a picture with an exported image tower; needs jax and Pillow, and none of this project's code.

  python -m groupvit_jax.interop.export --workdir=runs/quickstart --format=stablehlo --output=exported
  python examples/run_exported.py exported picture.jpg
"""

import pathlib
import sys

from jax import export
import numpy as np
from PIL import Image

folder, picture = map(pathlib.Path, sys.argv[1:])
tower = export.deserialize((folder / 'image.stablehlo').read_bytes())
_, height, width, _ = tower.in_avals[0].shape
pixels = np.asarray(Image.open(picture).convert('RGB').resize((width, height)))
out = tower.call(pixels[None])  # any batch size

first, *later = (np.asarray(soft[0]) for soft in out['assignments'])  # each [S, N]
for soft in later:
  first = soft @ first
rows = round((first.shape[1] * height / width) ** 0.5)
for row in first.argmax(axis=0).reshape(rows, -1):  # the final segment of each patch
  print(' '.join(f'{segment:2d}' for segment in row))
print('pooled embedding', out['image_embeds'].shape, 'and one of each segment', out['segment_embeds'].shape)
