"""All that one GPU can say of this code's speed beside PyTorch, in under ten minutes; JSON into a folder:

  python -m benchmarks.gpu_report docs/gpu
  python -m benchmarks.speed_table docs/gpu/*.json

Most of the time goes into compiling. So the peer is first measured eager; then all that is compiled starts at once, and
is measured one comparison after the other. Ours takes memory when it is its turn. Each comparison is written when it is
done. What is not ready by the deadline is left out, and named. Needs a GPU of 80 GB.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks import rounds, speed, trace_summary

COMMON = dict(
  device='gpu',
  dtype='bfloat16',
  rounds=7,
  steps=10,
  one_core=False,
  remat='none',
  text_budget=64,
  size=224,
  trace=None,
  hold=True,
  peer_modes=['eager', 'torch.compile'],
)
PLANS = {
  'windows': ('windows', dict(batch=64, size=448)),
  'inference': ('encode', dict(batch=256)),
  'train_256': ('train', dict(batch=256)),
  'train_1024': ('train', dict(batch=1024, steps=5, peer_modes=[])),
}
TRACED = 'train_1024'  # the last to start


def main() -> None:
  """Measures and writes."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--plans', nargs='+', choices=list(PLANS), default=list(PLANS))
  parser.add_argument('--seconds', type=float, default=500, help='after which nothing more is waited for')
  args = parser.parse_args()
  args.folder.mkdir(parents=True, exist_ok=True)
  deadline, load = time.monotonic() + args.seconds, os.getloadavg()[0]
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # processes share the memory
  trace = tempfile.mkdtemp()
  plans = {
    name: (work, argparse.Namespace(**COMMON | options))
    for name, (work, options) in PLANS.items()
    if name in args.plans
  }
  found = {name: speed.Found({}, {}, {}, {}) for name in plans}
  for name, (work, options) in plans.items():
    if 'eager' in options.peer_modes:
      take_turns(found[name], {'eager': speed.start(work, options, 'eager', wait=False)}, work, options, deadline)
  started = {}
  for name, (work, options) in plans.items():
    if name == TRACED:
      options.trace, os.environ['XLA_FLAGS'] = trace, '--xla_gpu_enable_command_buffer='  # whose kernels have no names
    started[name] = {
      side: speed.start(work, options, side, wait=False) for side in ['ours', *options.peer_modes] if side != 'eager'
    }
  for name, (work, options) in plans.items():
    take_turns(found[name], started[name], work, options, deadline)
    if 'ours' in found[name].facts:
      text = json.dumps(speed.report(work, options, found[name], load), indent=2) + '\n'
      (args.folder / f'{name}.json').write_text(text, encoding='utf-8')
      print(name, speed.report(work, options, found[name], load)['pictures_per_s'], flush=True)
  if (pathlib.Path(trace) / 'program.txt').exists():
    subprocess.run(
      [sys.executable, '-m', trace_summary.__name__, trace, '--steps=3', f'--json={args.folder}/trace_1024.json'],
      check=False,
    )


def take_turns(
  found: speed.Found, sides: dict[str, rounds.Side], work: str, options: argparse.Namespace, deadline: float
) -> None:
  """Rounds of those sides that are ready in time, and have not ended."""
  ready = {}
  for name, side in sides.items():
    try:
      if name == 'ours':
        side.release()
      if not side.ready(deadline - time.monotonic()):
        side.kill()
        raise SystemExit('not ready in time')
      side.facts  # noqa: B018 (fails where the process has ended)
      ready[name] = side
    except SystemExit as error:
      found.failed[name] = str(error)
      print(work, name, error, flush=True)
  if ready:
    found.take_turns(ready, work, options)


if __name__ == '__main__':
  main()
