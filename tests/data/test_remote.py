"""Shards behind a web server and in a bucket, read as local ones are."""

import numpy as np
import pytest

from groupvit_jax import storage
from groupvit_jax.data import pipeline, tars
from groupvit_jax.data.sources import build_source
from groupvit_jax.eval.output_folder import OutputFolder
from tests import gcs
from tests.tars import data_config, encode, make_examples, set_config, write_set

pytest.importorskip('aiohttp')
from benchmarks.range_server import RangeServer  # noqa: E402


@pytest.fixture(autouse=True)
def quick(own_cache, monkeypatch):
  monkeypatch.setattr(storage, 'RETRY_DELAYS', (0.0, 0.01, 0.01))


@pytest.fixture
def server(tmp_path):
  server = RangeServer(str(tmp_path))
  with server.running() as server.address:
    yield server


def open_set(*patterns: str, index_dir: str = '') -> tars.WebDataset:
  return tars.open_webdataset(patterns, 'txt', index_dir, 'data.sets.x')


def batches(source, num_threads: int) -> list[dict[str, np.ndarray]]:
  examples = make_examples(source, num_batches=3)
  return list(pipeline.iterate(examples, num_threads=num_threads, num_workers=0, prefetch_batches=2))


def test_batches_are_those_of_local_shards_and_requests_overlap(server, tmp_path):
  local = write_set(tmp_path / 'set', 24)
  remote = build_source(data_config(a=set_config(local.replace(str(tmp_path), server.address))), (16, 16))
  alone = batches(build_source(data_config(a=set_config(local)), (16, 16)), 0)
  server.delay, server.requests, server.most_at_once = 0.2, 0, 0
  for ours, theirs in zip(batches(remote, 12), alone, strict=True):
    for name in theirs:
      np.testing.assert_array_equal(ours[name], theirs[name])
  assert server.requests == 48  # one a sample
  assert 8 <= server.most_at_once <= 12


def test_index_of_remote_shards_is_built_in_parallel_and_kept(server, tmp_path):
  pattern = write_set(tmp_path / 'set', 64).replace(str(tmp_path), server.address)
  server.delay = 0.2
  source = open_set(pattern)
  assert server.most_at_once >= 3 and server.requests == 16  # one to look, one to read, per shard
  assert source[20]['text'] == 'a dog number 20' and source[20]['image'] == encode(20)
  assert list((tmp_path / 'cache').rglob('0000.tar.*.npy')) and not (tmp_path / 'set' / '.index').exists()
  server.requests = 0
  assert open_set(pattern).index == source.index
  assert server.requests == 8  # one look at each
  write_set(tmp_path / 'set', 63)
  assert len(open_set(pattern)) == 63


def test_a_failing_server_is_asked_again(server, tmp_path):
  source = open_set(write_set(tmp_path / 'set', 8).replace(str(tmp_path), server.address))
  server.failures = 3
  assert source[1]['text'] == 'a dog number 1'
  server.failures = 4
  with pytest.raises(OSError, match=f'cannot read {server.address}/set/0000.tar after 4 attempts: 503'):
    source[1]
  (tmp_path / 'set' / '0000.tar').unlink()
  server.failures, server.requests = 0, 0
  with pytest.raises(OSError, match='cannot read .*0000.tar'):
    source[1]
  assert server.requests == 1


def test_a_server_without_ranges_is_refused_before_it_sends_every_tar_whole(server, tmp_path):
  pattern = write_set(tmp_path / 'set', 16).replace(str(tmp_path), server.address)
  source = open_set(pattern)
  server.ranges, server.requests = False, 0
  with pytest.raises(OSError, match='the server ignores byte ranges'):
    source[1]
  assert server.requests == 1


def test_what_cannot_be_reached_is_said_at_once(server, tmp_path):
  write_set(tmp_path / 'set', 16)
  with pytest.raises(ValueError, match=f'x: 2 of 4 shards are missing, first {server.address}/set/0002.tar'):
    open_set(f'{server.address}/set/{{0000..0003}}.tar')
  server.failures = 100
  with pytest.raises(ValueError, match=f'cannot reach {server.address}/set/0000.tar: 503'):
    open_set(f'{server.address}/set/0000.tar')
  with pytest.raises(ValueError, match='cannot reach http://127.0.0.1:9/a.tar: Cannot connect'):
    open_set('http://127.0.0.1:9/a.tar')


@pytest.fixture(scope='module')
def bucket():
  gcs.create_bucket('photographs')
  return 'gs://photographs'


def test_a_bucket_holds_shards_and_their_index(bucket, tmp_path, monkeypatch):
  local = write_set(tmp_path / 'set', 20)
  for path in storage.expand_braces(local):
    storage.write_atomic(path.replace(str(tmp_path), bucket), open(path, 'rb').read())
  source = open_set(local.replace(str(tmp_path), bucket), index_dir=f'{bucket}/index')
  assert [source[n] for n in (0, 9, 19)] == [open_set(local)[n] for n in (0, 9, 19)]
  (tmp_path / 'cache').rename(tmp_path / 'gone')  # another machine: only the bucket's index is there
  system = storage._system(bucket)
  assert len(system.ls(f'{bucket}/index')) == 3
  monkeypatch.delattr(tars, 'index_tar')  # it must not be built again
  assert len(open_set(f'{bucket}/set/*.tar', index_dir=f'{bucket}/index')) == 20
  with pytest.raises(ValueError, match='x: 1 of 2 shards are missing, first gs://photographs/set/0007.tar'):
    open_set(f'{bucket}/set/{{0000,0007}}.tar')


def test_results_in_a_bucket(bucket):
  """Also TensorBoard's file; what an earlier evaluation left goes."""
  folder = OutputFolder(f'{bucket}/out', overwrite=False)
  folder.begin()
  folder.write_board(3, {'miou': 0.5}, {'settings': '{}'}, {'thresholds': np.zeros((4, 4, 3), np.uint8)})
  folder.write_text('thresholds.png', 'old')
  system = storage._system(bucket)
  names = lambda: [path.removeprefix('photographs/out/').split('.')[0] for path in sorted(system.find(f'{bucket}/out'))]
  assert names() == ['results', 'tensorboard/events', 'thresholds']
  OutputFolder(f'{bucket}/out', overwrite=False).begin()
  assert names() == ['results']
