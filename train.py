"""Trains a GroupViT: `python train.py --config=configs/quickstart.py --workdir=runs/quickstart`."""

from groupvit_jax.__main__ import run

if __name__ == '__main__':
  run('train')
