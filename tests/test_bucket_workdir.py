"""Runs whose workdir is a bucket: logs, which cannot grow there, and what is refused."""

import json

import pytest

from groupvit_jax import workdir as workdir_lib
from groupvit_jax.run_log import RunLog
from tests.test_remote import bucket  # noqa: F401
from tests.tiny import tiny_config


def log_steps(workdir: str, *steps: int) -> None:
  log = RunLog(workdir, first_step=steps[0] - 1, total_steps=9, batch_size=8)
  for step in steps:
    log.figures(step, {'x': step})
  log.close()


def test_a_log_goes_on_where_files_cannot_grow(bucket):  # noqa: F811
  from groupvit_jax.data import shards
  log_steps(f'{bucket}/run', 1, 2, 3)
  log_steps(f'{bucket}/run', 3, 4)
  system = shards._system(bucket)
  lines = system.cat(f'{bucket}/run/metrics.jsonl').decode().splitlines()
  assert [json.loads(line)['x'] for line in lines] == [1, 2, 3, 4]
  assert system.glob(f'{bucket}/run/tensorboard/events*')


def test_where_checkpoints_cannot_go(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match='--workdir=s3://bucket/run: Orbax writes checkpoints to disks and to gs://'):
    workdir_lib.claim('s3://bucket/run', tiny_config())
  monkeypatch.setattr(workdir_lib.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='pip install gcsfs'):
    workdir_lib.claim('gs://bucket/run', tiny_config())
