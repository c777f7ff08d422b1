"""Saves the state that tests/train/test_checkpoint.py knows, divided over the devices of all processes."""

import sys

from absl import flags

from groupvit_jax import cli
from groupvit_jax.running import cluster

WORKDIR = flags.DEFINE_string('workdir', None, 'Of the checkpoint.')
CLUSTER = cluster.define_flags()


def main() -> int:
  from groupvit_jax.running import processes

  return processes.run(CLUSTER(), {}, save, saves=False)


def save() -> int:
  import jax

  from groupvit_jax.running import sharding
  from groupvit_jax.train import state as train_state
  from groupvit_jax.train.checkpoint import Checkpoints
  from tests.tiny import tiny_config
  from tests.train import test_checkpoint

  mesh = sharding.make_mesh(fsdp=jax.device_count())
  state = train_state.init_state(
    test_checkpoint.MODEL, test_checkpoint.TX, seed=3, text_shape=test_checkpoint.TEXT_SHAPE, mesh=mesh
  )
  kernel = state.params['vision']['stage0_block0']['mlp']['fc1']['kernel']
  if kernel.is_fully_replicated or kernel.is_fully_addressable:
    sys.exit('no parameter is divided over processes')
  checkpoints = Checkpoints(WORKDIR.value, keep=2)
  checkpoints.save(state, tiny_config())
  checkpoints.wait()
  checkpoints.close()
  return 0


if __name__ == '__main__':
  cli.run(main)
