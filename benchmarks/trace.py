"""Time of a traced step, by part of the model and kind of operation.

  python -m benchmarks training --trace=/tmp/trace --peer_modes --output=/tmp/train.json
  python -m benchmarks trace /tmp/trace --steps=3 --json=docs/trace.json

The folder holds a profile, which names operations, and the program that ran, program.txt, which names the part of each.
Time that one operation spends in others counts as theirs alone. On a GPU, trace with
XLA_FLAGS=--xla_gpu_enable_command_buffer= : operations of a CUDA graph have no names.
"""

import argparse
import collections
import gzip
import json
import pathlib
import re
from typing import NamedTuple

from groupvit_jax.aot import scopes

KINDS = (
  ('fused attention', r'fmha'),
  ('matmuls', r'gemm|matmul|\bdot\b|dot_|cublas|conv_|convolution'),
  ('copies', r'^copy|transpose'),
)
REST = 'the rest'


class Event(NamedTuple):
  """An operation that ran."""

  name: str
  start: float  # microseconds
  duration: float

  @property
  def end(self) -> float:
    return self.start + self.duration


def main() -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--steps', type=int, required=True, help='that were traced')
  parser.add_argument('--json', type=pathlib.Path, help='JSON file.')
  args = parser.parse_args()
  program = (args.folder / 'program.txt').read_text(encoding='utf-8')
  found = summarize(read_events(args.folder, program), read_instructions(program), args.steps)
  print(table(found))
  if args.json:
    args.json.write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')


def read_instructions(program: str) -> dict[str, tuple[str, str]]:
  """Name and kind of each instruction of a compiled program, and the path of its scope."""
  found = {}
  for name, shape_and_call in re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = (.*)$', program, re.MULTILINE):
    path = re.search(r'op_name="([^"]*)"', shape_and_call)
    target = re.search(r'custom_call_target="([^"]*)"', shape_and_call)
    opcode = re.search(r'(?:^|[\s)}])([a-z][\w\-]*)\(', shape_and_call)
    found[name] = (f'{name} {opcode[1] if opcode else ""} {target[1] if target else ""}', path[1] if path else '')
  return found


def read_events(folder: pathlib.Path, program: str) -> list[list[Event]]:
  """The newest trace's operations of that program, thread by thread, in the order in which they started."""
  path = max(folder.rglob('perfetto_trace.json.gz'), key=lambda path: path.stat().st_mtime)
  with gzip.open(path) as file:
    events = json.load(file)['traceEvents']
  module, threads = re.search(r'^HloModule ([\w.\-]+)', program)[1], collections.defaultdict(list)
  for event in events:
    args = event.get('args', {})
    if event.get('ph') == 'X' and 'hlo_op' in args and args.get('hlo_module', module).split('(')[0] == module:
      threads[event['pid'], event['tid']].append(Event(args['hlo_op'], event['ts'], event['dur']))
  return [sorted(thread, key=lambda event: (event.start, -event.duration)) for thread in threads.values()]


def summarize(threads: list[list[Event]], instructions: dict[str, tuple[str, str]], steps: int) -> dict[str, object]:
  """Milliseconds of a step by part, pass and kind, largest part first."""
  parts, kinds = {}, [kind for kind, _ in KINDS] + [REST]
  for thread in threads:
    for event, own in own_times(thread):
      kind, path = instructions.get(event.name, (event.name, ''))
      row = parts.setdefault(scopes.part_of(path), dict.fromkeys(['ms', 'backward_ms', *kinds], 0.0))
      kind = _kind(f'{kind} {path.rpartition("/")[2]}')
      for column in ['ms', kind] + ['backward_ms'] * ('transpose(' in path):
        row[column] += own / 1e3 / steps
  parts = dict(sorted(parts.items(), key=lambda item: -item[1]['ms']))
  return {'ms_a_step': sum(row['ms'] for row in parts.values()), 'parts': parts}


def own_times(thread: list[Event]) -> list[tuple[Event, float]]:
  """What each operation spends outside of those that it contains; on GPUs they merely overlap."""
  own, around = [event.duration for event in thread], []
  for i, event in enumerate(thread):
    while around and thread[around[-1]].end < event.end:
      around.pop()
    if around:
      own[around[-1]] -= event.duration
    around.append(i)
  return list(zip(thread, own))


def _kind(text: str) -> str:
  return next((name for name, pattern in KINDS if re.search(pattern, text)), REST)


def table(found: dict[str, object]) -> str:
  """Markdown: one row for each part."""
  kinds = [kind for kind, _ in KINDS] + [REST]
  lines = [f'| | ms a step | share | backward | {" | ".join(kinds)} |', '|:--|--:|--:|--:|' + '--:|' * len(kinds)]
  rows = list(found['parts'].items())
  rows.append(('**together**', {key: sum(row[key] for _, row in rows) for key in ['ms', 'backward_ms', *kinds]}))
  for part, row in rows:
    lines.append(
      f'| {part} | {row["ms"]:.1f} | {row["ms"] / found["ms_a_step"]:.0%} | {row["backward_ms"]:.1f} | '
      + ' | '.join(f'{row[kind]:.1f}' for kind in kinds)
      + ' |'
    )
  return '\n'.join(lines)
