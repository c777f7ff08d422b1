"""GroupViT-S/16 on CC3M + CC12M + RedCaps12M, captions alone: the paper's second released model.

  python train.py --config=configs/groupvit_vits16_gcc_redcaps.py --workdir=runs/gcc_redcaps

`.py:8gpu`, `.py:1gpu`, `clip_tokenizer`, paths, hardware, time and variance are those of groupvit_vits16_gcc_yfcc.py.

Expected, by the authors' weights and protocol `groupvit`:
mIoU on VOC 50.8, Context 23.7, COCO-Object 27.5; top-1 accuracy on ImageNet 51.6.
"""

import ml_collections

from configs import groupvit_vits16_gcc_yfcc as base


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The experiment; see the base for `variant`, but for 'named'."""
  config = base.build(variant)
  config.data.num_prompts = 0  # captions of RedCaps hold few nouns
  config.text_budget = 32
  with config.unlocked():
    del config.data.sets.yfcc14m
    config.data.sets.redcaps12m = base.records('/data/tfds/redcaps12m/1.0.0', expected=11_866_987)
  base.set_epochs(config)
  return config
