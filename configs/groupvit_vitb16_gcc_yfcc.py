"""GroupViT-B/16: the recipe of groupvit_vits16_gcc_yfcc.py with towers beyond the paper's, sharded over 8 devices.

  python train.py --config=configs/groupvit_vitb16_gcc_yfcc.py --workdir=runs/vitb16

Hardware: 64 chips or more, in multiples of 8: ask `python -m groupvit_jax.aot` (docs/pods.md). There are no
published results for this size, and the learning rate is the small model's.
"""

import ml_collections

from configs import groupvit_vits16_gcc_yfcc


def get_config() -> ml_collections.ConfigDict:
  """The experiment."""
  config = groupvit_vits16_gcc_yfcc.get_config()
  config.remat = 'blocks'
  config.model.vision.update(width=768, num_heads=12)
  config.model.text.update(width=512, num_heads=8)
  config.mesh.fsdp = 8
  return config
