"""Fuzzing by seeded mutations of valid inputs. `make fuzz` does for minutes what the tests do for seconds."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import copy
import json
import os
import random
import resource
import signal
import time
from typing import Any

from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.errors import UserError

# Seconds for each target, and a file for the counts; set by `make fuzz`.
_SECONDS, _REPORT = float(os.environ.get('FUZZ_SECONDS', 0)), os.environ.get('FUZZ_REPORT')
_MEMORY = 2**30  # bytes that reading one input may take
_TOKENS = (b'\0', b'\xff', b'/', b'..', b'%00', b'"', b'\\', b'\xf0\x9f\x90\xb6', b'-1', b'1e999', b'null', b'{}', b'[')
_NUMBERS = (0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_VALUES = (
  None,
  True,
  -1,
  0,
  1,
  7,
  2**31,
  10**9,
  1e308,
  -0.5,
  float('nan'),
  '',
  'x',
  '../x',
  '\ud800',
  [],
  [0],
  {},
  [[]],
)


def fuzz(target: str, mutant: Callable[[random.Random], Any], read: Callable[[Any], object], examples: int) -> None:
  """Reads mutants; each must be read or refused, with a second of the processor's time and a gigabyte.

  Args:
    target: name of what is read.
    mutant: makes an input.
    read: reads it, or raises UserError or BadRecord.
    examples: how many at least.
  """
  number = refused = 0
  end = time.monotonic() + _SECONDS
  while number < examples or time.monotonic() < end:
    made = mutant(random.Random(number))
    try:
      with _limited():
        read(made)
    except (UserError, BadRecord):
      refused += 1
    except BaseException as error:
      raise AssertionError(f'{target}, example {number}: {made!r:.2000}') from error
    number += 1
  assert number > refused > 0  # a fuzzer that refuses everything reads nothing
  if _REPORT:
    with open(_REPORT, 'a') as file:
      file.write(json.dumps(dict(target=target, examples=number, refused=refused)) + '\n')


def mutate(data: bytes, draw: random.Random) -> bytes:
  """Changes a few bytes: overwritten, deleted, repeated, cut off, or replaced by what readers trip over."""
  for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice((0, 1, 1, 2, 4, 8, draw.randrange(len(data) + 1))))
    data = data[:start] + _replacement(data[start:end], draw) + data[end:]
  return data[: draw.randrange(len(data) + 1)] if draw.random() < 0.05 else data


def mutate_json(value: Any, draw: random.Random) -> Any:
  """Changes a few values at any depth: replaced or left out."""
  value = copy.deepcopy(value)
  for _ in range(draw.choice((1, 1, 2, 4))):
    holders = list(_holders(value))
    holder = draw.choice(holders)
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    if draw.random() < 0.2:
      del holder[key]
    else:
      holder[key] = copy.deepcopy(draw.choice(_VALUES))
    if not value:
      break
  return value


def _holders(value: Any) -> Iterator[dict | list]:
  if isinstance(value, (dict, list)) and value:
    yield value
    for each in value.values() if isinstance(value, dict) else value:
      yield from _holders(each)


def _replacement(piece: bytes, draw: random.Random) -> bytes:
  match draw.randrange(6):
    case 0:
      return draw.randbytes(min(len(piece), 64))
    case 1:
      return bytes(byte ^ 1 << draw.randrange(8) for byte in piece[:8]) + piece[8:]
    case 2:
      return b''
    case 3:
      return piece * (draw.choice((2, 3, 50)) if len(piece) < 1024 else 2)  # eight times over at most
    case 4:
      return draw.choice(_TOKENS)
    case _:
      number = draw.choice((*_NUMBERS, draw.randrange(2**16)))
      return number.to_bytes(8, draw.choice(('little', 'big')))[-max(1, len(piece)) :]


@contextlib.contextmanager
def _limited() -> Iterator[None]:
  """Raises TimeoutError after a second of the processor's time, and MemoryError beyond `_MEMORY`."""

  def stop(*_: object) -> None:
    raise TimeoutError('it takes more than a second')

  used = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmData:')) * 1024
  soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
  handler = signal.signal(signal.SIGPROF, stop)
  resource.setrlimit(resource.RLIMIT_DATA, (used + _MEMORY, hard))
  signal.setitimer(signal.ITIMER_PROF, 1)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    signal.signal(signal.SIGPROF, handler)


def mutated(seeds: Sequence[bytes]) -> Callable[[random.Random], bytes]:
  """Mutants of some inputs."""
  return lambda draw: mutate(draw.choice(seeds), draw)
