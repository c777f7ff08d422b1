"""Scores a run, or segments images with it: `python eval.py --workdir=runs/quickstart --output=out`."""

from groupvit_jax.__main__ import run

if __name__ == '__main__':
  run('eval')
