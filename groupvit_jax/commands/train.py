"""Trains a GroupViT: `python train.py --config=configs/quickstart.py --workdir=runs/quickstart`."""

from absl import flags
from ml_collections import config_flags

from groupvit_jax import cli
from groupvit_jax.running import cluster


def main() -> int:
  from groupvit_jax.running import processes

  metadata = {'workdir': WORKDIR.value, 'config': CONFIG.value.to_json()}
  return processes.run(CLUSTER(), metadata, start, saves=not CONFIG.value.dry_run)


def start() -> int:
  from groupvit_jax.running import processes
  from groupvit_jax.train import dry_run, loop, workdir

  workdir.check_location(WORKDIR.value)
  with workdir.complete_config('the config', 'give it one; configs/quickstart.py shows what every config has'):
    config = workdir.upgrade_config(CONFIG.value)
    if config.dry_run:
      return dry_run.check(config, WORKDIR.value)
    if PROGRAMS.value:
      processes.enable_compilation_cache(PROGRAMS.value.replace('WORKDIR', WORKDIR.value))
    return loop.train(config, WORKDIR.value)


if __name__ == '__main__':
  CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment; --config.x.y=value overrides an entry.')
  WORKDIR = flags.DEFINE_string('workdir', None, 'Checkpoints, logs and pictures go here; a run in it is resumed.')
  PROGRAMS = flags.DEFINE_string(
    'programs', 'WORKDIR/programs', "Compiled programs are kept here, for restarts; '' keeps none."
  )
  CLUSTER = cluster.define_flags()
  flags.mark_flags_as_required(['config', 'workdir'])
  cli.run(main)
