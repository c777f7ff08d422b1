"""Reads a compiled program's text: what it moves between chips and to and from their memory, loops included."""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')
# What a chip sends for each byte of the result, in a ring of many chips.
SENT = {'all-reduce': 2, 'all-gather': 1, 'reduce-scatter': 1, 'collective-permute': 1, 'all-to-all': 1}

# Operations that move nothing by themselves. What a loop or call moves is what it contains.
_FREE = frozenset(('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call',
                   'after-all', 'partition-id', 'iota', 'copy-done', 'async-start', 'async-update', 'async-done'))
_BITS = {'pred': 8, 'bf16': 16, 'f16': 16, 'u4': 4, 's4': 4, 'f8e4m3fn': 8, 'f8e5m2': 8}

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'(?:^|\s)([a-z][\w\-]*)\(')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')


@dataclasses.dataclass(frozen=True)
class _Operation:
  name: str
  opcode: str
  bytes: int  # of its result, in the chips' main memory or not
  main_bytes: int  # of those, in the main memory
  operands: tuple[str, ...]
  rest: str  # attributes


@dataclasses.dataclass
class Traffic:
  """What a program moves when it is run once, a device.

  Attributes:
    hbm_bytes: read from and written to the main memory.
    collectives: bytes of the results of each kind.
    counts: how many of each kind are run.
  """

  hbm_bytes: float = 0
  collectives: dict[str, float] = dataclasses.field(default_factory=dict)
  counts: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def sent_bytes(self) -> float:
    """What a device sends to others."""
    return sum(SENT[kind] * size for kind, size in self.collectives.items())


def read_traffic(text: str) -> Traffic:
  """Adds up the traffic of a compiled program, given as HLO text.

  A loop's body counts as often as it is run. Of an operand that is only sliced, the slices count.
  """
  computations, entry = _parse(text)
  traffic = Traffic()
  _add(traffic, computations, entry, 1)
  return traffic


def _parse(text: str) -> tuple[Mapping[str, Mapping[str, _Operation]], str]:
  """Operations by name, of computations by name; and the name of the outermost one."""
  computations: dict[str, dict[str, _Operation]] = {}
  entry, current = '', None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif line == '}':
      current = None
    elif current is not None and (found := _LINE.match(line)):
      operation = _operation(found[1], found[2])
      current[operation.name] = operation
  return computations, entry


def _operation(name: str, text: str) -> _Operation:
  opcode = _OPCODE.search(text)
  result, rest = text[:opcode.start()], text[opcode.end():]
  inside, _, attributes = rest.partition(')')
  # Memory 0 is the main one, 1 lies beside the processor, 2 holds flags that say when something has arrived.
  sizes = [(_size(kind, shape), 'S(' not in layout) for kind, shape, layout in _ARRAY.findall(result)
           if 'S(2)' not in layout]
  return _Operation(name, opcode[1], sum(size for size, _ in sizes), sum(size for size, main in sizes if main),
                    tuple(re.findall(r'%([\w.\-]+)', inside)),
                    inside if opcode[1] in ('constant', 'parameter') else attributes)


def _size(kind: str, shape: str) -> int:
  digits = re.search(r'\d+', kind)
  bits = _BITS.get(kind) or (int(digits[0]) if digits else 0)
  return math.prod(map(int, filter(None, shape.split(',')))) * bits // 8


def _add(traffic: Traffic, computations: Mapping, name: str, times: int) -> None:
  """Adds a computation that is run so many times."""
  operations = computations[name]
  for operation in operations.values():
    kind = operation.opcode.removesuffix('-start')
    if kind in COLLECTIVES:
      size = operation.bytes // (2 if operation.opcode.endswith('-start') and kind != 'all-reduce' else 1)
      traffic.collectives[kind] = traffic.collectives.get(kind, 0) + times * size
      traffic.counts[kind] = traffic.counts.get(kind, 0) + times
    for inner, repeats in _contained(operation, computations):
      _add(traffic, computations, inner, times * repeats)
    if operation.opcode not in _FREE:
      traffic.hbm_bytes += times * _moved(operation, operations, computations)


def _contained(operation: _Operation, computations: Mapping) -> Iterator[tuple[str, int]]:
  """Computations that an operation runs, and how often; those of fusions move nothing by themselves."""
  if operation.opcode == 'while':
    yield _attribute(operation, 'body'), _repeats(computations[_attribute(operation, 'condition')])
  elif operation.opcode in ('call', 'async-start'):
    inner = _attribute(operation, 'to_apply') or _attribute(operation, 'calls')
    if inner:
      yield inner, 1
  elif operation.opcode == 'conditional':
    branches = re.search(r'branch_computations=\{([^}]*)\}', operation.rest)
    yield from ((inner.strip().lstrip('%'), 1) for inner in (branches[1].split(',')[-1:] if branches else ()))


def _attribute(operation: _Operation, name: str) -> str | None:
  found = re.search(rf'\b{name}=%?([\w.\-]+)', operation.rest)
  return found[1] if found else None


def _repeats(condition: Mapping[str, _Operation]) -> int:
  """How often a loop runs: it counts from 0 to the constant in its condition.

  Where that depends on data it has none, and counts for nothing: such loops do what is left over (see packed_texts.py).
  """
  constants = [int(operation.rest) for operation in condition.values()
               if operation.opcode == 'constant' and re.fullmatch(r'\d+', operation.rest)]
  return max(constants, default=0)


def _moved(operation: _Operation, operations: Mapping[str, _Operation], computations: Mapping) -> int:
  """Bytes that an operation reads from and writes to the main memory."""
  if operation.opcode == 'copy-start':  # of (to, from, state), what lies in the main memory
    return operation.main_bytes
  if operation.opcode in ('dynamic-slice', 'slice', 'gather'):
    source = operations.get(operation.operands[0])
    return operation.main_bytes + (operation.bytes if source is None or source.main_bytes else 0)
  inner = computations.get(_attribute(operation, 'calls') or '', {}) if operation.opcode == 'fusion' else {}
  read = 0
  for index, name in enumerate(operation.operands):
    whole = operations[name].main_bytes if name in operations else 0
    read += min(whole, _read_of_parameter(inner, index, whole))
  written = operation.main_bytes
  updates = [op for op in inner.values() if op.opcode == 'dynamic-update-slice']
  if updates:  # in place: only the slice is written
    written -= sum(op.bytes - inner[op.operands[1]].bytes for op in updates if op.operands[1] in inner)
  return read + max(written, 0)


def _read_of_parameter(inner: Mapping[str, _Operation], index: int, whole: int) -> int:
  """How much of an operand a fusion reads."""
  parameter = next((op.name for op in inner.values() if op.opcode == 'parameter' and op.rest == str(index)), None)
  users = [op for op in inner.values() if parameter in op.operands]
  if not users:
    return whole
  read = 0
  for user in users:
    if user.opcode in ('dynamic-slice', 'slice', 'gather') and user.operands[0] == parameter:
      read += user.bytes
    elif not (user.opcode == 'dynamic-update-slice' and user.operands[0] == parameter):
      return whole
  return read
