"""All comparisons on one GPU, in under ten minutes; JSON into a folder.

  python -m benchmarks gpu docs/gpu
  python -m benchmarks tables docs/gpu/*.json

Most of the time goes into compiling. So the peer is first measured eager; then all that is compiled starts at once, and
is measured one comparison after the other. Each is written when it is done. What is not ready by the deadline is left
out, and named. Needs a GPU of 80 GB.
"""

import argparse
from collections.abc import Mapping
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import processes, speed

COMMON = dict(
  device='gpu',
  dtype='bfloat16',
  rounds=7,
  steps=10,
  remat='none',
  text_budget=64,
  size=224,
  trace=None,
  peer_modes=['eager', 'torch.compile'],
)
PLANS = {
  'windows': ('windows', dict(batch=64, size=448)),
  'inference': ('encoding', dict(batch=256)),
  'train_256': ('training', dict(batch=256)),
  'train_1024': ('training', dict(batch=1024, steps=5, peer_modes=[])),
}
TRACED = 'train_1024'  # the last to start


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--plans', nargs='+', choices=list(PLANS), default=list(PLANS))
  parser.add_argument('--seconds', type=float, default=500, help='after which nothing more is waited for')
  args = parser.parse_args()
  args.folder.mkdir(parents=True, exist_ok=True)
  deadline, machine, trace = time.monotonic() + args.seconds, processes.machine(), pathlib.Path(tempfile.mkdtemp())
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # processes share the memory
  plans = {name: (PLANS[name][0], argparse.Namespace(**COMMON | PLANS[name][1])) for name in args.plans}
  found, started = {name: speed.Comparison({}, {}, {}, {}) for name in plans}, {}
  for name, (work, options) in plans.items():
    if 'eager' in options.peer_modes:
      take_turns(found[name], {'eager': speed.start(work, options, 'eager')}, work, options, deadline)
  for name, (work, options) in plans.items():
    if name == TRACED:
      options.trace, os.environ['XLA_FLAGS'] = trace, '--xla_gpu_enable_command_buffer='  # whose kernels have no names
    sides = ['ours', *(mode for mode in options.peer_modes if mode != 'eager')]
    started[name] = {side: speed.start(work, options, side) for side in sides}
  for name, (work, options) in plans.items():
    take_turns(found[name], started[name], work, options, deadline)
    if 'ours' in found[name].facts:
      processes.write(speed.report(work, options, found[name], machine), args.folder / f'{name}.json')
  if (trace / 'program.txt').exists():
    command = [sys.executable, '-m', 'benchmarks', 'trace', trace, '--steps=3', f'--json={args.folder}/trace_1024.json']
    subprocess.run(command, check=False)


def take_turns(
  found: speed.Comparison, sides: Mapping[str, processes.Side], work: str, options: argparse.Namespace, deadline: float
) -> None:
  """Adds rounds of those sides that are ready in time, and have not ended."""
  ready = {}
  for name, side in sides.items():
    try:
      ready[name] = side.wait(deadline - time.monotonic())
    except SystemExit as error:
      found.failed[name] = str(error)
      print(work, name, error, flush=True)
  if ready:
    found.take_turns(ready, work, options)
