"""Trains a GroupViT: `python train.py --config=configs/quickstart.py --workdir=runs/quickstart`."""

from absl import flags
from ml_collections import config_flags

from groupvit_jax import cli

CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment; --config.x.y=value overrides an entry.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Checkpoints, logs and pictures go here; a run in it is resumed.')
flags.mark_flags_as_required(['config', 'workdir'])


def main() -> int:
  from groupvit_jax import dry_run, train_loop  # after the flags: a mistake there should not wait for JAX to load
  run = dry_run.check if CONFIG.value.dry_run else train_loop.train
  return run(CONFIG.value, WORKDIR.value)


if __name__ == '__main__':
  cli.run(main)
