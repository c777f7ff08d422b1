"""The lock of a folder: a second command is refused, whoever was killed or waited too long is no hindrance."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import fsspec
import pytest

from groupvit_jax import cli
from groupvit_jax.errors import UserError
from groupvit_jax.eval.output_folder import OutputFolder
from groupvit_jax.running import folder_lock
from groupvit_jax.train import loop
from groupvit_jax.train import workdir as workdir_lib
from tests import folder_bucket, gcs
from tests.runs import run_command
from tests.tiny import tiny_config

HOLD = """
import sys, time
from tests import folder_bucket
from groupvit_jax.running import folder_lock
folder_bucket.install(sys.argv[2])
with folder_lock.hold(sys.argv[1], '--workdir'):
  print('held', flush=True)
  time.sleep(300)
"""


@pytest.fixture(params=['disk', 'gs', 's3'])
def folder(request, tmp_path, monkeypatch) -> str:
  """A folder on a disk, in an emulated gs:// or in a stand-in for s3://."""
  monkeypatch.setattr(folder_lock, '_RENEWAL_S', 0.1)
  monkeypatch.setattr(folder_lock, '_LEASE_S', 0.6)
  monkeypatch.setattr(folder_lock, '_LOOK_S', 0.02)
  if request.param == 'gs':
    name = f'lock-{os.getpid()}-{time.monotonic_ns()}'
    gcs.create_bucket(name)
    workdir_lib.check_location(f'gs://{name}/run')
    return f'gs://{name}/run'
  folder_bucket.use(monkeypatch, tmp_path)
  return str(tmp_path / 'run') if request.param == 'disk' else 's3://bucket/run'


def lock_files(folder: str) -> list[str]:
  system, root = fsspec.core.url_to_fs(folder)
  system.invalidate_cache()
  return [path for path in system.find(root) if folder_lock.NAME in path]


def test_a_second_command_is_refused_and_a_killed_one_is_not_in_the_way(folder, tmp_path):
  command = [sys.executable, '-c', HOLD, folder, str(tmp_path)]
  holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert holder.stdout.readline() == 'held\n'
  kept = lock_files(folder)
  line = rf'--workdir={folder} is in use by -c on \S+ \(process {holder.pid}\) since 20\S+ \S+ UTC; wait for it, end'
  with pytest.raises(UserError, match=line), folder_lock.hold(folder, '--workdir'):
    pass
  assert lock_files(folder) == kept and holder.poll() is None
  holder.kill()
  holder.wait()
  began = time.monotonic()
  with folder_lock.hold(folder, '--workdir'):
    assert time.monotonic() - began < folder_lock._LEASE_S  # gone from this machine
    with pytest.raises(UserError, match=f'process {os.getpid()}'), folder_lock.hold(folder, '--workdir'):
      pass
  assert not lock_files(folder) and not pathlib.Path(folder).exists()


@pytest.mark.parametrize('folder', ['gs', 's3'], indirect=True)
def test_a_lease_of_another_machine_is_waited_for_and_a_late_holder_ends(folder, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(folder_lock, '_machine', lambda: None)  # as on two machines
    with folder_lock.hold(folder, '--workdir') as check:
      with pytest.raises(UserError, match='is in use by'), folder_lock.hold(folder, '--workdir'):
        pass
      check()
      patch.setattr(folder_lock._Leases, 'write', lambda *_: time.sleep(1.5))  # a store that does not answer
      began = time.monotonic()
      with folder_lock.hold(folder, '--workdir'):
        assert 0.5 < time.monotonic() - began < 1.4
        deadline = time.monotonic() + 10
        with pytest.raises(UserError, match='was taken over by .* did not renew its lock for 1 s; nothing more'):
          while time.monotonic() < deadline:
            check()
            time.sleep(0.05)
  assert not lock_files(folder)


@pytest.mark.parametrize('folder', ['disk', 's3'], indirect=True)
def test_of_many_at_once_one_holds_it(folder):
  held, refused, most = [], [], []
  start = threading.Barrier(8)

  def compete():
    start.wait()
    try:
      with folder_lock.hold(folder, '--output'):
        held.append(1)
        most.append(len(held))
        time.sleep(0.3)
        held.pop()
    except UserError as error:
      refused.append(error)

  threads = [threading.Thread(target=compete) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert max(most) == 1 and len(most) + len(refused) == 8


def test_train_and_eval_hold_their_folders(tmp_path):
  config, workdir, output = tiny_config(), tmp_path / 'run', tmp_path / 'out'
  with folder_lock.hold(str(workdir), '--workdir'):
    with pytest.raises(UserError, match=f'--workdir={workdir} is in use by'):
      loop.train(config, workdir)
    assert [path.name for path in workdir.iterdir()] == [folder_lock.NAME]
  with folder_lock.hold(str(output), '--output'):
    done = run_command('eval.py', f'--workdir={workdir}', f'--output={output}')
    assert done.returncode == cli.EXIT_USAGE and done.stderr.startswith(f'error: --output={output} is in use by')
    OutputFolder(output, overwrite=False)  # a lock is no result of others
