"""Commands get huge pages where the system gives them on request."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from groupvit_jax import huge_pages

ROOT = pathlib.Path(__file__).parents[1]
# A command that says how it was started, and how much of 64 MiB lies in huge pages.
COMMAND = """
import json, os, pathlib, sys
print('started', flush=True)
from groupvit_jax import cli

def main():
  data = bytearray(2**26)
  sizes = dict(line.split(':') for line in pathlib.Path('/proc/self/smaps_rollup').read_text().splitlines()[1:])
  print(json.dumps({'huge_kib': int(sizes['AnonHugePages'].split()[0]), 'process': os.getpid(),
                    'tunables': os.environ.get('GLIBC_TUNABLES'), 'arguments': sys.argv[1:], 'prefix': sys.prefix}))

if __name__ == '__main__':
  cli.run(main)
"""
on_request = pytest.mark.skipif(not huge_pages.environment(), reason='huge pages are not to be had on request')


@pytest.fixture
def command(tmp_path) -> pathlib.Path:
  path = tmp_path / 'command.py'
  path.write_text(COMMAND)
  return path


def run(arguments: list[str], tunables: str | None = None, **options) -> tuple[int, dict[str, object], int]:
  """How often a command started, what it said, and its process's number."""
  environment = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
  environment |= {'PYTHONPATH': str(ROOT)} | ({} if tunables is None else {'GLIBC_TUNABLES': tunables})
  process = subprocess.Popen(
    [sys.executable, *arguments], env=environment, text=True, stdout=subprocess.PIPE, **options
  )
  *starts, said = process.communicate(timeout=60)[0].splitlines()
  assert process.returncode == 0 and set(starts) == {'started'}
  return len(starts), json.loads(said), process.pid


@on_request
def test_a_command_starts_once_more_and_has_them(command):
  starts, said, process = run([str(command), '--verbosity=1'])
  assert starts == 2 and said['tunables'] == 'glibc.malloc.hugetlb=1' and said['huge_kib'] > 2**15
  assert said['process'] == process and said['prefix'] == sys.prefix and said['arguments'] == ['--verbosity=1']
  assert run(['-m', command.stem], cwd=command.parent)[1]['huge_kib'] > 2**15


@on_request
def test_what_a_person_set_stays(command):
  starts, said, _ = run([str(command)], 'glibc.malloc.hugetlb=0')
  assert starts == 1 and said['tunables'] == 'glibc.malloc.hugetlb=0' and said['huge_kib'] < 2**15
  assert run([str(command)], 'glibc.malloc.check=0')[1]['tunables'] == 'glibc.malloc.check=0:glibc.malloc.hugetlb=1'


@on_request
def test_a_guest_of_another_program_does_not_restart_it(command, tmp_path):
  host = tmp_path / 'host.py'
  host.write_text(f'import runpy, sys\nsys.argv[1:] = []\nrunpy.run_path({str(command)!r}, run_name="__main__")\n')
  starts, said, _ = run([str(host), 'of the host'])
  assert starts == 1 and said['tunables'] is None


@pytest.mark.parametrize('system', ['[always] madvise never\n', 'always madvise [never]\n', None])
def test_systems_that_do_not_wait_to_be_asked(system, monkeypatch, tmp_path):
  if system:
    (tmp_path / 'enabled').write_text(system)
  monkeypatch.setattr(huge_pages, '_SYSTEM', tmp_path / 'enabled')
  assert huge_pages.environment() == {}
