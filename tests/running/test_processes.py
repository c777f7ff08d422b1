"""Several processes: they meet or say why not, agree, train and save as one, and go on after one of them is killed."""

from collections.abc import Sequence
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from groupvit_jax import cli
from groupvit_jax.running import cluster
from groupvit_jax.running import processes as distributed
from groupvit_jax.running.cluster import Cluster
from groupvit_jax.train import run as run_lib
from tests import official_layouts as layouts
from tests.photos import photo
from tests.runs import logged, ROOT, run_command
from tests.staged import row_digests
from tests.tiny import tiny_config
from tests.trained import trained_workdir

TIMEOUT = 200

# Programs are compiled without effort: they run for milliseconds.
CHEAP = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'


def start(
  *flags: str, program: str = 'train.py', devices: int = 2, staged: str = '', cwd: pathlib.Path = ROOT
) -> subprocess.Popen:
  """A process of a command on the tiny run; `staged` as `tests.staged` takes it."""
  config = ['--config=tests/tiny_run.py'] if program == 'train.py' else []
  environment = os.environ | {'JAX_NUM_CPU_DEVICES': str(devices), 'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {CHEAP}'}
  command = [sys.executable, *(('-m', 'tests.staged', staged) if staged else ()), program, *config, *flags]
  return subprocess.Popen(
    command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def free_port() -> int:
  with socket.socket() as sock:
    sock.bind(('localhost', 0))
    return sock.getsockname()[1]


def start_two(
  *flags: str, first: dict[str, object] | None = None, second: dict[str, object] | None = None, **options
) -> list[subprocess.Popen]:
  """Two processes that will meet; `first` and `second` are options of one of them."""
  meeting = [f'--coordinator=localhost:{free_port()}', '--num_processes=2', f'--startup_timeout={TIMEOUT}', *flags]
  return [start(*meeting, f'--process_id={i}', **(options | (own or {}))) for i, own in enumerate((first, second))]


def finish(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
  """Exit codes and what was said."""
  said = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
  return [(process.returncode, text) for process, text in zip(processes, said)]


def wait_for(workdir: pathlib.Path, step: int, processes: Sequence[subprocess.Popen]) -> None:
  """Until a step is logged, or a process has ended."""
  while step not in logged(workdir) and all(process.poll() is None for process in processes):
    time.sleep(0.02)


def taken(workdir: pathlib.Path) -> dict[int, set[str]]:
  """Rows by step, of all processes and starts together."""
  rows = {}
  for path in workdir.glob('*.rows'):
    for step, found in map(json.loads, path.read_text().splitlines()):
      rows.setdefault(step, set()).update(found)
  return rows


def saved(workdir: pathlib.Path) -> list[int]:
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())


# Of both scenarios. Every run starts from another one's weights.
FLAGS = ('--config.total_steps=24', '--config.eval.every_steps=12')


def flags_of(workdir: pathlib.Path) -> tuple[str, ...]:
  return (f'--workdir={workdir}', f'--config.init_from={trained_workdir()}', *FLAGS)


@pytest.fixture(scope='module')
def scenario(tmp_path_factory) -> dict[str, object]:
  """Two processes, one of which is killed; two again, one of which gets a signal while they evaluate; then one."""
  workdir = tmp_path_factory.mktemp('several')
  flags, staged = flags_of(workdir), f'rows:{workdir}'
  killed = start_two(*flags, '--peer_timeout=20', staged=staged)
  wait_for(workdir, 7, killed)
  killed[1].kill()
  outcome = {'killed': finish(killed)}
  stopped = start_two(*flags, staged=staged, second={'staged': f'{staged},signal:evaluation:{signal.SIGTERM:d}'})
  outcome |= {'stopped': finish(stopped), 'saved': saved(workdir)}
  outcome['alone'] = finish([start(*flags, devices=4, staged=staged)])
  outcome['losses'] = logged(workdir)
  outcome['mious'] = logged(workdir, 'eval/validation/miou')
  return outcome | {'workdir': workdir}


@pytest.fixture(scope='module')
def split(tmp_path_factory) -> dict[str, object]:
  """Two processes over which heads and hidden units are split: one gets a signal before the first step; then the first
  one is killed in its first save."""
  workdir = tmp_path_factory.mktemp('split')
  flags = (*flags_of(workdir), '--config.mesh.model=2', '--config.checkpoint.every_steps=6')
  stopped = finish(start_two(*flags, devices=1, second={'staged': f'signal:warm-up:{signal.SIGTERM:d}'}))
  outcome = {'stopped': stopped, 'saved': saved(workdir)}
  killed = start_two(*flags, '--peer_timeout=20', devices=1, first={'staged': f'signal:save:{signal.SIGKILL:d}'})
  return outcome | {'killed': finish(killed), 'losses': logged(workdir)}


def test_a_table_of_processes(scenario):
  text = scenario['killed'][0][1]
  assert '2 processes on 1 host(s), 4 devices' in text
  assert [line.split()[:2] for line in text.splitlines() if '2 x cpu' in line] == [['0', '2'], ['1', '2']]


def test_a_killed_process_ends_the_others_with_a_message(scenario):
  (code, text), _ = scenario['killed']
  assert code in (cli.EXIT_PEER_LOST, -signal.SIGABRT), text  # which of the two depends on where it waited
  assert 'another process of the run is gone' in text or 'another task died' in text


@pytest.mark.parametrize('processes, step', [('scenario', 13), ('split', 1)])
def test_a_signal_to_one_in_any_phase_stops_both_after_the_step_that_follows(processes, step, request):
  """In an evaluation, which follows step 12, and before the first step."""
  outcome = request.getfixturevalue(processes)
  for code, text in outcome['stopped']:
    assert code == cli.EXIT_PREEMPTED, text
  assert ('resumes after step' in outcome['stopped'][0][1]) == (processes == 'scenario')
  assert outcome['saved'][-1] == step


def test_the_first_process_may_be_the_one_that_is_killed(split):
  (first, _), (code, text) = split['killed']
  assert first == -signal.SIGKILL
  assert code in (cli.EXIT_PEER_LOST, -signal.SIGABRT), text
  assert 'another process of the run is gone' in text or 'oordination service' in text, text


def test_parameters_split_over_processes_change_nothing(split, scenario):
  """Both processes read all rows of a batch; losses are those of one process that is not split. They start low."""
  steps = range(1, 6)
  assert [split['losses'][step] for step in steps] == pytest.approx(
    [scenario['losses'][step] for step in steps], rel=0.01
  )
  assert scenario['losses'][1] < logged(trained_workdir())[1]


def test_one_process_goes_on_with_what_two_began(scenario, tmp_path):
  """Every step was taken once, on the batch that one process takes there."""
  ((code, text),) = scenario['alone']
  assert code == 0, text
  assert 'resumes after step' in text and '1 process with 4 x cpu' in text
  assert sorted(scenario['losses']) == list(range(1, 25)) and sorted(scenario['mious']) == [12, 24]
  config = tiny_config()
  config.total_steps, config.eval.every_steps = 24, 12
  batches = run_lib.read_batches(run_lib.set_up(config, tmp_path), 0)
  assert taken(scenario['workdir']) == {step: set(row_digests(batch)) for step, batch in enumerate(batches, 1)}


def test_two_processes_evaluate_as_one(scenario, tmp_path):
  """Figures, masks of every picture and the page, of pictures one of which has a window of its own size."""
  layouts.folder(tmp_path / 'mine')
  layouts.save(tmp_path / 'mine/images/d.png', photo(200, 20))
  layouts.save_indices(tmp_path / 'mine/labels/d.png', np.arange(4000, dtype=np.uint8).reshape(200, 20) // 100 % 3)
  flags = [
    f'--workdir={scenario["workdir"]}',
    '--benchmark=folder',
    f'--data_dir={tmp_path / "mine"}',
    '--masks',
    '--thresholds=0.2,0.4',
    '--protocol=groupvit',
    '--protocol.short_side=32',
    '--protocol.max_long_side=128',
    '--protocol.window=32',
    '--protocol.stride=16',
    '--protocol.threshold=0.3',
  ]
  output = lambda name: [f'--output={tmp_path / name}', f'--report={tmp_path / name}.html']
  two, one = tmp_path / 'two', tmp_path / 'one'
  processes = [
    *start_two(*flags, *output('two'), program='eval.py'),
    start(*flags, *output('one'), program='eval.py', devices=4),
  ]
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
    assert code == cli.EXIT_USAGE and "image 'b' has no format" in text, text


def test_nobody_to_meet(tmp_path):
  began = time.monotonic()
  cases = {
    'nobody answers at --coordinator=localhost:1': ('localhost:1', 1),
    'no host is called no-such-host': ('no-such-host.invalid:1', 1),
    'not all of 2 processes came': ('localhost:0', 0),
  }
  flags = (f'--workdir={tmp_path / "run"}', '--startup_timeout=2', '--num_processes=2')
  processes = [start(*flags, f'--coordinator={host}', f'--process_id={i}') for host, i in cases.values()]
  for message, (code, text) in zip(cases, finish(processes)):
    assert (code, message in text.splitlines()[-1]) == (cli.EXIT_PEER_LOST, True), text
  assert time.monotonic() - began < 100 and not (tmp_path / 'run').exists()


def test_processes_with_different_numbers_of_devices(tmp_path):
  for code, text in finish(start_two(f'--workdir={tmp_path / "run"}', first={'devices': 1}, second={'devices': 2})):
    assert code == cli.EXIT_USAGE and 'processes have different numbers of devices: [1, 2]' in text, text


@pytest.fixture
def other_host(tmp_path) -> pathlib.Path:
  """A copy of the code, in which a relative workdir is another folder."""
  for name in ('groupvit_jax', 'configs', 'tests'):
    shutil.copytree(ROOT / name, tmp_path / 'host' / name, ignore=shutil.ignore_patterns('__pycache__'))
  shutil.copy(ROOT / 'train.py', tmp_path / 'host')
  return tmp_path / 'host'


def test_processes_that_would_not_run_the_same(other_host, tmp_path):
  with (other_host / 'groupvit_jax/model/losses.py').open('a') as file:
    file.write('# Another version.')
  flags = [f'--workdir={tmp_path / "run"}', f'--coordinator=localhost:{free_port()}', '--num_processes=2']
  processes = [start(*flags, '--process_id=0')]
  processes.append(start(*flags, '--process_id=1', '--config.batch_size=16', cwd=other_host))
  for code, text in finish(processes):
    assert code == cli.EXIT_USAGE and 'config.batch_size is 8 in one and 16 in the other' in text, text
    assert re.search(r'code is \w{12} in one and \w{12} in', text), text
  assert not (tmp_path / 'run').exists()


def test_a_workdir_that_the_other_process_does_not_see(other_host):
  workdir = f'.cache/not-shared-{os.getpid()}'
  processes = start_two(f'--workdir={workdir}', '--peer_timeout=20', devices=1, second={'cwd': other_host})
  try:
    (first, _), (code, text) = finish(processes)
  finally:
    shutil.rmtree(ROOT / workdir, ignore_errors=True)
  assert code == cli.EXIT_USAGE and f'process 1 does not see what process 0 wrote in {workdir}' in text, text
  assert first not in (0, cli.EXIT_USAGE)


@pytest.mark.parametrize(
  'flags, message',
  [
    (dict(coordinator='localhost'), '--coordinator=localhost is not HOST:PORT'),
    (dict(num_processes=2, process_id=2), '--process_id=2 is not one of 0 to 2 - 1'),
  ],
)
def test_mistakes_in_the_flags(flags, message):
  with pytest.raises(ValueError, match=message):
    Cluster(
      **(dict(coordinator=None, num_processes=None, process_id=None, startup_timeout=1, peer_timeout=1) | flags)
    ).check()


@pytest.mark.parametrize(
  'environment, own',
  [
    ({}, False),
    ({'SLURM_STEP_TASKS_PER_NODE': '1(x4)'}, True),  # a process per node
    ({'SLURM_STEP_TASKS_PER_NODE': '1'}, True),
    ({'SLURM_STEP_TASKS_PER_NODE': '8(x4)', 'CUDA_VISIBLE_DEVICES': '0,1,2,3,4,5,6,7'}, False),  # a process per GPU
    ({'SLURM_STEP_TASKS_PER_NODE': '8(x4)', 'CUDA_VISIBLE_DEVICES': '0'}, True),  # the same, each bound to its GPU
    ({'SLURM_STEP_TASKS_PER_NODE': '2,1'}, False),
    ({'OMPI_COMM_WORLD_LOCAL_SIZE': '1'}, True),
    ({'OMPI_COMM_WORLD_LOCAL_SIZE': '4'}, False),
  ],
)
def test_which_gpus_are_a_processs_own(environment, own):
  assert cluster.sees_its_own_gpus(environment) == own


SLURM = {
  'SLURM_JOB_ID': '1',
  'SLURM_STEP_NODELIST': '127.0.0.1',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '{}',
  'SLURM_LOCALID': '{}',
  'SLURM_STEP_TASKS_PER_NODE': '2',
}


def start_launched(environment: dict[str, str], monkeypatch, *flags: str, staged: str = '') -> list[subprocess.Popen]:
  """Two processes that know each other by these variables alone; {} is the number of each."""
  monkeypatch.setenv('JAX_COORDINATOR_PORT', str(free_port()))
  processes = []
  for i in range(2):
    for name, value in environment.items():
      monkeypatch.setenv(name, value.format(i))
    processes.append(start(*(flag.format(i) for flag in flags), staged=staged.format(i)))
  return processes


def test_what_saves_nothing_is_ended_by_a_signal(tmp_path, monkeypatch):
  """A dry run, after the processes have met and agreed: JAX does not keep the signal to itself."""
  processes = start_launched(
    SLURM,
    monkeypatch,
    f'--workdir={tmp_path / "run"}',
    '--config.dry_run=True',
    staged=f'signal:warm-up:{signal.SIGTERM:d}',
  )
  (code, text), (other, its_text) = finish(processes)
  assert code == -signal.SIGTERM, text
  # The runtime may end it first, because process 0, which it asks how all are, is gone.
  assert other in (-signal.SIGTERM, -signal.SIGABRT, cli.EXIT_PEER_LOST), its_text
  assert '2 processes on 1 host(s), 4 devices' in text and 'compiling the step' in text


@pytest.mark.parametrize(
  'name, value, remedy',
  [
    ('SLURM_NTASKS', '16', 'start them with srun'),
    ('OMPI_COMM_WORLD_SIZE', '2', 'Open MPI before version 5'),
    ('PMI_SIZE', '2', 'give all of --coordinator, --num_processes and --process_id'),
    ('JOB_COMPLETION_INDEX', '0', r'jax\[k8s\]'),
    ('JAX_COORDINATOR_ADDRESS', 'host:1', 'give --num_processes and --process_id'),
  ],
)
def test_launchers_whose_processes_would_not_meet(name, value, remedy):
  cluster.check_nobody_else({'SLURM_NTASKS': '1', 'OMPI_COMM_WORLD_SIZE': '1', 'PMI_SIZE': '1'})
  with pytest.raises(ValueError, match=f'{name}={value} .*{remedy}.* --num_processes=1'):
    cluster.check_nobody_else({name: value})


def raised(error: Exception, cause: Exception | None = None) -> Exception:
  try:
    raise error from cause
  except Exception as caught:
    return caught


def test_what_means_that_a_process_is_gone():
  """What a collective says, also where a save fails for it; no connection of our own that breaks."""
  gloo = jax.errors.JaxRuntimeError('UNKNOWN: Gloo all-reduce failed: Connection closed by peer')
  assert 'Gloo' in distributed._lost_peer(raised(gloo))
  assert 'Gloo' in distributed._lost_peer(raised(OSError('cannot save a checkpoint'), gloo))
  assert distributed._lost_peer(raised(OSError('cannot read gs://x: connection reset'), ConnectionError())) is None
  assert distributed._lost_peer(raised(ValueError('no socket'))) is None


# What the runtime does to a process whose peer is gone, while its main thread is busy: an abort from a thread of C's.
ABORTED = """
import ctypes, sys
from absl import app
from groupvit_jax.running import processes as distributed

def main(_):
  distributed.print_aborting_stack_only()
  libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
  libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.abort, ctypes.c_void_p), None)
  while True:
    pass

app.run(main)
"""


def test_a_process_that_is_aborted_leaves_the_stacks_of_busy_threads_alone():
  """Reading them may fault, and SIGSEGV is no code of a lost process."""
  ended = run_command('-c', ABORTED, timeout=TIMEOUT)
  assert ended.returncode == -signal.SIGABRT, ended.stderr
  assert 'Fatal Python error: Aborted' in ended.stderr and 'most recent call first' not in ended.stderr
