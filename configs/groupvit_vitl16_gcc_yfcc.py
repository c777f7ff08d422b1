"""GroupViT-L/16: the recipe of groupvit_vits16_gcc_yfcc.py with towers beyond the paper's, sharded over 8 devices.

  python train.py --config=configs/groupvit_vitl16_gcc_yfcc.py --workdir=runs/vitl16

Hardware: 64 chips or more, in multiples of 8: ask `python -m groupvit_jax.aot` (docs/pods.md). There are no
published results for this size, and the learning rate is the small model's.
"""

import ml_collections

from configs import groupvit_vitb16_gcc_yfcc


def get_config() -> ml_collections.ConfigDict:
  """The experiment."""
  config = groupvit_vitb16_gcc_yfcc.get_config()
  config.model.vision.update(width=1024, num_heads=16, depths=(12, 6, 6))
  config.model.text.update(width=768, num_heads=12)
  return config
