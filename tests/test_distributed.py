"""Several processes: they meet or say why not, agree, train and save as one, and go on after one of them is killed."""

from collections.abc import Sequence
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from groupvit_jax import cli, cluster
from groupvit_jax.cluster import Cluster
from tests import official_layouts as layouts
from tests.photos import photo

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 200

# Programs are compiled without effort: they run for milliseconds.
CHEAP = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def start(*flags: str, program: str = 'train.py', devices: int = 4) -> subprocess.Popen:
  """A process of a command on the tiny run."""
  config = ['--config=tests/tiny_run.py'] if program == 'train.py' else []
  environment = os.environ | {
    'JAX_NUM_CPU_DEVICES': str(devices), 'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {CHEAP}'}
  return subprocess.Popen([sys.executable, program, *config, *flags], cwd=ROOT, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_two(*flags: str, **options) -> list[subprocess.Popen]:
  """Two processes that will meet."""
  with socket.socket() as sock:
    sock.bind(('localhost', 0))
    port = sock.getsockname()[1]
  meeting = [f'--coordinator=localhost:{port}', '--num_processes=2', f'--startup_timeout={TIMEOUT}']
  return [start(*meeting, f'--process_id={i}', *flags, **options) for i in range(2)]


def finish(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
  """Exit codes and what was said."""
  said = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
  return [(process.returncode, text) for process, text in zip(processes, said)]


def logged(workdir: pathlib.Path, figure: str = 'train/loss') -> dict[int, float]:
  """A figure by step."""
  path = workdir / 'metrics.jsonl'
  lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
  return {line['step']: line[figure] for line in lines if figure in line}


def wait_for(workdir: pathlib.Path, step: int, processes: Sequence[subprocess.Popen]) -> None:
  """Until a step is logged, or a process has ended."""
  while step not in logged(workdir) and all(process.poll() is None for process in processes):
    time.sleep(0.02)


@pytest.fixture(scope='module')
def scenario(tmp_path_factory) -> dict[str, object]:
  """Two processes, one of which is killed; two again, one of which is asked to stop; then one process to the end."""
  workdir = tmp_path_factory.mktemp('several')
  flags = (f'--workdir={workdir}', '--config.total_steps=24', '--config.eval.every_steps=6')
  killed = start_two(*flags, '--peer_timeout=20')
  wait_for(workdir, 7, killed)
  killed[1].kill()
  outcome = {'killed': finish(killed), 'after kill': max(logged(workdir))}

  stopped = start_two(*flags)
  wait_for(workdir, outcome['after kill'] + 2, stopped)
  stopped[1].send_signal(signal.SIGTERM)
  outcome |= {'stopped': finish(stopped), 'after stop': max(logged(workdir)),
              'saved': sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())}

  outcome['alone'] = finish([start(*flags, devices=8)])
  outcome['losses'] = logged(workdir)
  outcome['mious'] = logged(workdir, 'eval/validation/miou')
  return outcome | {'workdir': workdir}


def test_a_table_of_processes(scenario):
  text = scenario['killed'][0][1]
  assert '2 process(es) on 1 host(s), 8 device(s)' in text
  assert [line.split()[:2] for line in text.splitlines() if '4 x cpu' in line] == [['0', '4'], ['1', '4']]


def test_a_killed_process_ends_the_others_with_a_message(scenario):
  (code, text), _ = scenario['killed']
  assert code in (cli.EXIT_PEER_LOST, -signal.SIGABRT), text  # which of the two depends on where it waited
  assert 'another process of the run is gone' in text or 'another task died' in text


def test_the_restart_goes_on_and_a_signal_to_one_stops_both_after_the_same_step(scenario):
  for code, text in scenario['stopped']:
    assert code == cli.EXIT_PREEMPTED, text
  assert 'goes on after step' in scenario['stopped'][0][1]
  assert scenario['after kill'] < scenario['after stop'] < 24
  assert scenario['saved'][-1] == scenario['after stop']


def test_one_process_goes_on_with_what_two_began(scenario, tmp_path):
  """Every step was taken once, on the batch that one process takes there."""
  (code, text), = scenario['alone']
  assert code == 0, text
  assert f'goes on after step {scenario["after stop"]}' in text
  assert sorted(scenario['losses']) == list(range(1, 25)) and sorted(scenario['mious']) == [6, 12, 18, 24]
  (code, text), = finish([start(f'--workdir={tmp_path}', '--config.total_steps=24', '--config.eval.every_steps=6',
                                devices=8)])
  assert code == 0, text
  assert scenario['losses'] == pytest.approx(logged(tmp_path), rel=0.01)


def test_two_processes_evaluate_as_one(scenario, tmp_path):
  """Figures, masks of every picture and the page, of pictures one of which has a window of its own size."""
  layouts.folder(tmp_path / 'mine')
  layouts.save(tmp_path / 'mine/images/d.png', photo(200, 20))
  layouts.save_indices(tmp_path / 'mine/labels/d.png', np.arange(4000, dtype=np.uint8).reshape(200, 20) // 100 % 3)
  flags = [f'--workdir={scenario["workdir"]}', '--benchmark=folder', f'--data_dir={tmp_path / "mine"}', '--masks',
           '--thresholds=0.2,0.4', '--protocol=groupvit', '--protocol.short_side=32', '--protocol.max_long_side=128',
           '--protocol.window=32', '--protocol.stride=16', '--protocol.threshold=0.3']
  output = lambda name: [f'--output={tmp_path / name}', f'--report={tmp_path / name}.html']
  two, one = tmp_path / 'two', tmp_path / 'one'
  processes = [*start_two(*flags, *output('two'), program='eval.py'),
               start(*flags, *output('one'), program='eval.py', devices=8)]
  for code, text in finish(processes):
    assert code == 0, text
  for name in ('confusion.csv', 'pictures.json', *(f'masks/{key}.png' for key in ('a', 'b', 'c.d', 'd'))):
    assert (two / name).read_bytes() == (one / name).read_bytes(), name
  report, expected = (json.loads((folder / 'results.json').read_text()) for folder in (two, one))
  assert report['stage1/entropy'] == pytest.approx(expected['stage1/entropy']) and report['num_images'] == 4
  assert report['threshold_miou'] == expected['threshold_miou']
  headings = [re.findall('<p>(.*?): mIoU', path.with_suffix('.html').read_text()) for path in (two, one)]
  assert headings[0] == headings[1] and sorted(headings[0]) == ['a', 'b', 'c.d', 'd']
  # A picture that one of them cannot use ends both.
  (tmp_path / 'mine/images/b.jpg').write_bytes(b'no picture')
  for code, text in finish(start_two(*flags[:3], *flags[5:], program='eval.py')):
    assert code == cli.EXIT_USAGE and "picture 'b' is" in text, text


@pytest.mark.parametrize('flags, message', [
  (['--coordinator=localhost:1', '--num_processes=2', '--process_id=1'], 'nobody answers at --coordinator=localhost:1'),
  (['--coordinator=no-such-host.invalid:1', '--num_processes=2', '--process_id=1'], 'no host is called no-such-host'),
  (['--coordinator=localhost:0', '--num_processes=2', '--process_id=0'], 'not all of 2 processes came'),
])
def test_nobody_to_meet(flags, message, tmp_path):
  began = time.monotonic()
  (code, text), = finish([start(*flags, f'--workdir={tmp_path / "run"}', '--startup_timeout=2')])
  assert (code, message in text.splitlines()[-1]) == (cli.EXIT_PEER_LOST, True), text
  assert time.monotonic() - began < 100 and not (tmp_path / 'run').exists()


def test_processes_that_would_not_run_the_same(tmp_path):
  with socket.socket() as sock:
    sock.bind(('localhost', 0))
    meeting = [f'--coordinator=localhost:{sock.getsockname()[1]}', '--num_processes=2']
  flags = [f'--workdir={tmp_path / "run"}', *meeting]
  processes = [start(*flags, '--process_id=0'), start(*flags, '--process_id=1', '--config.batch_size=16')]
  for code, text in finish(processes):
    assert code == cli.EXIT_USAGE and 'config.batch_size is 8 in one and 16 in the other' in text, text
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('flags, message', [
  (dict(coordinator='localhost'), '--coordinator=localhost is not HOST:PORT'),
  (dict(num_processes=0), '--num_processes=0 must be at least 1'),
  (dict(num_processes=2, process_id=2), '--process_id=2 is not one of 0 to 2 - 1'),
  (dict(startup_timeout=0), '--startup_timeout=0'),
])
def test_mistakes_in_the_flags(flags, message):
  with pytest.raises(ValueError, match=message):
    Cluster(**(dict(coordinator=None, num_processes=None, process_id=None, startup_timeout=1, peer_timeout=1) | flags)
            ).check()


@pytest.mark.parametrize('environment, own', [
  ({}, False),
  ({'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}, True),  # a process per node
  ({'SLURM_STEP_TASKS_PER_NODE': '1'}, True),
  ({'SLURM_STEP_TASKS_PER_NODE': '8(x4)', 'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'}, False),  # a process per GPU
  ({'SLURM_STEP_TASKS_PER_NODE': '8(x4)', 'CUDA_VISIBLE_DEVICES': '0'}, True),  # the same, each bound to its GPU
  ({'SLURM_STEP_TASKS_PER_NODE': '2,1'}, False),
  ({'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, True),
  ({'OMPI_COMM_WORLD_LOCAL_SIZE': '4'}, False),
])
def test_which_gpus_are_a_processs_own(environment, own):
  assert cluster.sees_its_own_gpus(environment) == own


@pytest.mark.parametrize('environment', [
  {'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': '127.0.0.1', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '{}',
   'SLURM_LOCALID': '{}', 'SLURM_STEP_TASKS_PER_NODE': '2'},
  {'OMPI_MCA_orte_hnp_uri': '8192.0;tcp://127.0.0.1:34911', 'OMPI_COMM_WORLD_SIZE': '2', 'OMPI_COMM_WORLD_RANK': '{}',
   'OMPI_COMM_WORLD_LOCAL_RANK': '{}', 'OMPI_COMM_WORLD_LOCAL_SIZE': '2'},
], ids=['slurm', 'ompi'])
def test_launchers_that_jax_knows(environment, tmp_path, monkeypatch):
  """Their variables alone: the processes meet, and so can find that they differ."""
  processes = []
  for i in range(2):
    for name, value in environment.items():
      monkeypatch.setenv(name, value.format(i))
    processes.append(start(f'--workdir={tmp_path / "run"}', f'--config.seed={i}'))
  for code, text in finish(processes):
    assert code == cli.EXIT_USAGE and 'config.seed is 0 in one and 1 in the other' in text, text
