"""Trains a GroupViT: `python train.py --config=configs/quickstart.py --workdir=runs/quickstart`."""

from absl import flags
from ml_collections import config_flags

from groupvit_jax import cli
from groupvit_jax import cluster

CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment; --config.x.y=value overrides an entry.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Checkpoints, logs and pictures go here; a run in it is resumed.')
CLUSTER = cluster.define_flags()
flags.mark_flags_as_required(['config', 'workdir'])


def main() -> int:
  # After the flags: a mistake should not wait for JAX.
  from groupvit_jax import distributed, dry_run, train_loop, workdir

  def start() -> int:
    with workdir.complete_config('the config', 'give it one; configs/quickstart.py shows what every config has'):
      command = dry_run.check if CONFIG.value.dry_run else train_loop.train
      return command(CONFIG.value, WORKDIR.value)

  facts = {'workdir': WORKDIR.value, 'config': CONFIG.value.to_json()}
  return distributed.run(CLUSTER(), facts, start)


if __name__ == '__main__':
  cli.run(main)
