"""Kills, signals and preemptions of tiny runs, and what was lost; writes the table of docs/reliability.md.

  python -m benchmarks reliability

Each command is a process of its own on fake CPU devices. The reference of the preempted run changes its device count at
the same steps in memory, without checkpoints.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback

from etils import epath
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.processes import ROOT
from groupvit_jax import cli
from groupvit_jax.commands import export, score
from groupvit_jax.data import pipeline
from groupvit_jax.eval.evaluator import Evaluator
from groupvit_jax.running import folder_lock, processes, sharding
from groupvit_jax.train import loop
from groupvit_jax.train import run as run_lib
from groupvit_jax.train.checkpoint import Checkpoints
from tests.runs import logged
from tests.tiny import tiny_config

_PAGE = ROOT / 'docs' / 'reliability.md'
_MARKS = '<!-- figures: python -m benchmarks reliability -->', '<!-- end of figures -->'
_DEVICES = (1, 2, 4, 8)
_PHASES = {
  'set-up': (loop, 'set_up'),
  'restoring': (loop, 'restore_or_init'),
  'compiling': (loop, 'jit_step'),
  'evaluating': (Evaluator, 'evaluate'),
  'saving': (Checkpoints, 'save'),
}
_PAUSES = {  # of a writer: its name, where it waits
  'before arrays are written': (ocp.type_handlers.ArrayHandler, 'serialize'),
  'before a checkpoint is complete': (type(epath.Path()), 'rename'),
}


class Child:
  """A command in a process of its own, with so many devices; nothing of JAX has run before the fork."""

  def __init__(self, command: Callable[[], object], devices: int, log: pathlib.Path):
    self._log = log
    self.pid = os.fork()
    if not self.pid:
      with log.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
      jax.config.update('jax_num_cpu_devices', devices)
      code = 1
      try:
        code = command() or 0
      except BaseException:
        traceback.print_exc()
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)

  @functools.cached_property
  def code(self) -> int:
    """The exit code, or minus the signal, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

  def is_running(self) -> bool:
    """Whether it has not ended."""
    if 'code' in self.__dict__:
      return False
    pid, status = os.waitpid(self.pid, os.WNOHANG)
    if pid:
      self.code = os.waitstatus_to_exitcode(status)
    return not pid

  def end(self, number: int) -> int:
    """Sends a signal; the exit code."""
    os.kill(self.pid, number)
    return self.code

  def check(self, *codes: int) -> None:
    """Ends the benchmark with the log, unless the exit code is one of these."""
    if self.code not in codes:
      sys.exit(f'exit code {self.code}, not one of {codes}\n{self._log.read_text()[-3000:]}')


def config(total_steps: int) -> ml_collections.ConfigDict:
  """The tiny run of the tests, of so many steps."""
  result = tiny_config()
  result.total_steps, result.checkpoint.every_steps, result.eval.every_steps = total_steps, 3, 0
  return result


def train(given: ml_collections.ConfigDict, workdir: pathlib.Path) -> int:
  """Trains; programs are kept for the next start."""
  processes.enable_compilation_cache(workdir.parent / 'programs')
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  return loop.train(given, workdir)


def save_numbers(state: object, path: pathlib.Path) -> None:
  """Writes all numbers of a state."""
  as_bits = lambda leaf: jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
  np.savez(path, *[np.asarray(as_bits(leaf)) for leaf in jax.tree.leaves(state)])


def final_numbers(given: ml_collections.ConfigDict, workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Writes the numbers of the newest checkpoint."""
  save_numbers(run_lib.restore_or_init(run_lib.set_up(given, workdir), Checkpoints(workdir, keep=3)), path)


def undisturbed(given: ml_collections.ConfigDict, folder: pathlib.Path, segments: Sequence[tuple[int, int]]) -> None:
  """Trains in one process; from each step of `segments` on, on so many devices. Writes its last numbers."""
  processes.enable_compilation_cache(folder.parent / 'programs')
  make_mesh, state = sharding.make_mesh, None
  ends = [step for step, _ in segments[1:]] + [given.total_steps]
  for (first, devices), last in zip(segments, ends, strict=True):
    sharding.make_mesh = functools.partial(make_mesh, devices=jax.devices()[:devices])
    run = run_lib.set_up(given, folder)
    fresh = run_lib.initial_weights.initial_state(
      run.model, run.tx, given.seed, run.text_shape, run.mesh, average=run.averages
    )
    state = fresh if state is None else jax.tree.map(lambda old, new: jax.device_put(old, new.sharding), state, fresh)
    step_fn = run_lib.jit_step(run, state)
    with contextlib.closing(run_lib.read_batches(run, first)) as batches:
      for _, batch in zip(range(first, last), batches, strict=False):
        batch.pop('bad_records')
        state, _ = step_fn(state, pipeline.to_devices(batch, run.mesh))
        sharding.synchronize(state, run.mesh)
    jax.block_until_ready(state)
  save_numbers(state, folder / 'numbers.npz')


def equal(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Whether two files of numbers are equal bit for bit."""
  with np.load(one) as ours, np.load(other) as theirs:
    return len(ours.files) == len(theirs.files) and all(
      ours[name].tobytes() == theirs[name].tobytes() for name in ours.files
    )


def preempt(folder: pathlib.Path, preemptions: int, rng: random.Random) -> dict[str, object]:
  """Preempts a run again and again, on changing device counts; compares its last state with the undisturbed one's."""
  given, workdir, log = config(12 * preemptions), folder / 'preempted', folder / 'log'
  segments, codes = [], []
  for number in range(preemptions + 1):
    devices = _DEVICES[number % len(_DEVICES)]
    before = max(logged(workdir), default=0)
    child = Child(lambda: train(given, workdir), devices, log)
    if number < preemptions:
      target = before + rng.randrange(2, 8)
      while child.is_running() and max(logged(workdir), default=0) < target:
        time.sleep(0.002)
      time.sleep(rng.uniform(0, 0.05))
      codes.append(child.end(signal.SIGTERM if number % 2 else signal.SIGKILL))
      child.check(cli.EXIT_PREEMPTED, -signal.SIGKILL)
    else:
      child.check(0)
    resumed = re.search(r'resumes after step (\d+)', log.read_text())
    segments.append((int(resumed[1]) if resumed else 0, devices))
  Child(lambda: final_numbers(given, workdir, folder / 'preempted.npz'), 1, log).check(0)
  reference = folder / 'reference'
  Child(lambda: undisturbed(given, reference, segments), max(_DEVICES), log).check(0)
  return {
    'sigkill': codes.count(-signal.SIGKILL),
    'sigterm': codes.count(cli.EXIT_PREEMPTED),
    'device_changes': sum(one != other for (_, one), (_, other) in zip(segments, segments[1:])),
    'equal': equal(folder / 'preempted.npz', reference / 'numbers.npz'),
  }


def acting(owner: object, name: str, act: Callable[[], None], command: Callable[[], int]) -> int:
  """Runs a command that acts when it first calls a function."""
  original = getattr(owner, name)

  def replaced(*args, **kwargs):
    setattr(owner, name, original)
    act()
    return original(*args, **kwargs)

  setattr(owner, name, replaced)
  return command()


def signal_self(number: int) -> None:
  """Sends this process a signal."""
  os.kill(os.getpid(), number)


def interrupt_phases(folder: pathlib.Path) -> dict[str, dict[str, bool]]:
  """SIGTERM and SIGKILL at the start of every phase of training; whether the resumed run equals the undisturbed one."""
  given, log, whole = config(6), folder / 'log', folder / 'whole'
  given.eval.every_steps = 3
  Child(lambda: train(given, whole), 1, log).check(0)

  def resume(workdir: pathlib.Path) -> bool:
    Child(lambda: train(given, workdir), 1, log).check(0)
    return logged(workdir) == logged(whole)

  def interrupt(workdir: pathlib.Path, owner: object, name: str, number: int) -> bool:
    command = lambda: acting(owner, name, lambda: signal_self(number), lambda: train(given, workdir))
    Child(command, 1, log).check(cli.EXIT_PREEMPTED, -signal.SIGKILL)
    return resume(workdir)

  def kill_in_save(workdir: pathlib.Path, owner: object, name: str) -> bool:
    reached = folder / f'{workdir.name}-reached'
    pause = lambda: acting(owner, name, lambda: (reached.touch(), time.sleep(600)), lambda: 0)
    child = Child(lambda: acting(Checkpoints, 'save', pause, lambda: train(given, workdir)), 1, log)
    while child.is_running() and not reached.exists():
      time.sleep(0.01)
    child.end(signal.SIGKILL)
    child.check(-signal.SIGKILL)
    return resume(workdir)

  found = {
    number.name: {
      phase: interrupt(folder / f'{phase}-{number.name}', *place, number) for phase, place in _PHASES.items()
    }
    for number in (signal.SIGTERM, signal.SIGKILL)
  }
  for pause, place in _PAUSES.items():
    found['SIGKILL'][f'saving, {pause}'] = kill_in_save(folder / pause.replace(' ', '-'), *place)
  return found


def interrupt_results(folder: pathlib.Path, workdir: pathlib.Path) -> dict[str, bool]:
  """Kills evaluation and export; whether the same command then writes what an undisturbed one does."""
  log = folder / 'log'

  def evaluate(output: pathlib.Path) -> int:
    with folder_lock.hold(str(output), '--output'):
      return score.evaluate_benchmark(str(workdir), score.Request('scenes', output=str(output)))

  def kill(name: str, command: Callable[[pathlib.Path], int], result: str, owner: object, function: str) -> bool:
    whole, disturbed = folder / f'{name}-whole', folder / f'{name}-disturbed'
    Child(lambda: command(whole), 1, log).check(0)
    again = lambda: command(disturbed)
    Child(lambda: acting(owner, function, lambda: signal_self(signal.SIGKILL), again), 1, log).check(-signal.SIGKILL)
    claimed = (disturbed / result).exists() and '"complete": false' not in (disturbed / result).read_text()
    Child(again, 1, log).check(0)
    return not claimed and (whole / result).read_bytes() == (disturbed / result).read_bytes()

  write = lambda output: export.export(str(workdir), 'safetensors', str(output)) and 0
  return {
    'evaluation': kill('evaluation', evaluate, 'results.json', Evaluator, 'evaluate'),
    'export': kill('export', write, 'model.safetensors', type(epath.Path()), 'rename'),
  }


def soak(folder: pathlib.Path, seconds: float) -> dict[str, float]:
  """Trains for some time; the growth of its resident memory, fitted to all but the first third of the looks."""
  given, log, looks = config(10**6), folder / 'log', []
  given.checkpoint.every_steps, given.log_every = 1000, 10
  workdir = folder / 'soak'
  child = Child(lambda: train(given, workdir), 1, log)
  while not logged(workdir) and child.is_running():
    time.sleep(0.5)
  began = time.monotonic()
  while time.monotonic() - began < seconds and child.is_running():
    time.sleep(2)
    pages = int(pathlib.Path(f'/proc/{child.pid}/statm').read_text().split()[1])
    looks.append((max(logged(workdir)), pages * os.sysconf('SC_PAGE_SIZE') / 2**20))
  child.end(signal.SIGTERM)
  child.check(cli.EXIT_PREEMPTED)
  steps, memory = np.array(looks[len(looks) // 3 :]).T
  growth = 1000 * np.polyfit(steps, memory, 1)[0]
  return {'minutes': seconds / 60, 'steps': int(steps[-1]), 'mib': memory[-1], 'mib_per_1000_steps': float(growth)}


def table(found: dict[str, object]) -> Iterator[str]:
  """The lines of the page's table."""
  preempted, long = found['preemptions'], found['soak']
  count = lambda results: f'{sum(results.values())} of {len(results)} equal ({", ".join(results)})'
  yield '| what is interrupted | how | result |'
  yield '|:--|:--|:--|'
  yield (
    '| training, on 1, 2, 4 and 8 devices in turn '
    f'| {preempted["sigkill"]} x SIGKILL, {preempted["sigterm"]} x SIGTERM, '
    f'{preempted["device_changes"]} changes of the device count '
    f'| state {"equal" if preempted["equal"] else "**different**"}, bit for bit, to that of one process that changes '
    'devices likewise |'
  )
  for name, results in found['phases'].items():
    yield f'| training, in every phase | {name} | {count(results)} |'
  yield f'| evaluation, export | SIGKILL before the results | {count(found["results"])} |'
  yield (
    f'| nothing: a soak of {long["minutes"]:g} minutes | {long["steps"]:,} steps '
    f'| resident memory {long["mib"]:.0f} MiB, growing by {long["mib_per_1000_steps"]:+.2f} MiB per 1,000 steps |'
  )
  yield ''
  yield found['made']


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--preemptions', type=int, default=24)
  parser.add_argument('--soak_minutes', type=float, default=2)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  # Eight devices share few cores: threads for all, and time to wait for each other.
  timeouts = ('call_terminate_timeout', 'timeout')
  os.environ['XLA_FLAGS'] = ' '.join(
    ['--xla_backend_optimization_level=0', *(f'--xla_cpu_collective_{name}_seconds=900' for name in timeouts)]
  )
  os.environ['NPROC'] = '64'
  jax.config.update('jax_platforms', 'cpu')
  began, folder = time.monotonic(), pathlib.Path(tempfile.mkdtemp(prefix='groupvit-reliability-'))
  try:
    found = {'soak': soak(folder, args.soak_minutes * 60)}
    found |= {'phases': interrupt_phases(folder), 'results': interrupt_results(folder, folder / 'whole')}
    found['preemptions'] = preempt(folder, args.preemptions, random.Random(args.seed))
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in ('jax', 'flax', 'orbax-checkpoint'))
  found['made'] = (
    f'{datetime.date.today()}, {(time.monotonic() - began) / 60:.0f} minutes on {os.cpu_count()} cores: '
    f'Python {platform.python_version()}, {versions}.'
  )
  before, _, rest = _PAGE.read_text().partition(_MARKS[0])
  after = rest.partition(_MARKS[1])[2]
  _PAGE.write_text('\n'.join([f'{before}{_MARKS[0]}', *table(found), f'{_MARKS[1]}{after}']))
  print(json.dumps(found, indent=2))
  everything = [*found['results'].values(), found['preemptions']['equal']]
  everything += [good for results in found['phases'].values() for good in results.values()]
  return int(not all(everything))
