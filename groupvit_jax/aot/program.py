"""Reads a compiled program's text: what it moves between chips and to and from their memory, loops included."""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import re

# What one of n devices sends, of the bytes that a collective gathers, sums or exchanges: in a ring, which is the least.
SENT = {
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1,
}

# Operations that move nothing by themselves. What a loop or call moves is what it contains.
_FREE = frozenset(
  (
    'parameter',
    'constant',
    'tuple',
    'get-tuple-element',
    'bitcast',
    'while',
    'conditional',
    'call',
    'after-all',
    'partition-id',
    'iota',
    'copy-done',
    'async-start',
    'async-update',
    'async-done',
  )
)
_BITS = {'pred': 8, 'bf16': 16, 'f16': 16, 'u4': 4, 's4': 4, 'f8e4m3fn': 8, 'f8e5m2': 8}

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'(?:^|\s)([a-z][\w\-]*)\(')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PARTITIONS = re.compile(r'num_partitions=(\d+)')


@dataclasses.dataclass(frozen=True)
class _Operation:
  name: str
  opcode: str
  sizes: tuple[int, ...]  # bytes of its results, in the chips' main memory or not
  main_bytes: int  # of all those, in the main memory
  operands: tuple[str, ...]
  rest: str  # attributes

  @property
  def bytes(self) -> int:
    return sum(self.sizes)


@dataclasses.dataclass
class Traffic:
  """What a program moves when it is run once, a device.

  Attributes:
    hbm_bytes: read from and written to the main memory.
    cycles: that the compiler expects its operations to take, one after the other; it says so of most.
    sent: bytes that a device sends in collectives of each kind.
    counts: how many of each kind are run.
  """

  hbm_bytes: float = 0
  cycles: int = 0
  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  counts: dict[str, int] = dataclasses.field(default_factory=dict)


def read_traffic(text: str) -> Traffic:
  """Adds up the traffic of a compiled program, given as HLO text.

  A loop's body counts as often as it is run. Of an operand that is only sliced, the slices count.
  """
  computations, entry = _parse(text)
  devices = _PARTITIONS.search(text)
  traffic = Traffic()
  _add(traffic, computations, entry, 1, int(devices[1]) if devices else 1)
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
  result, rest = text[: opcode.start()], text[opcode.end() :]
  inside, _, attributes = rest.partition(')')
  # Memory 0 is the main one, 1 lies beside the processor, 2 holds flags that say when something has arrived.
  sizes = [
    (_size(kind, shape), 'S(' not in layout) for kind, shape, layout in _ARRAY.findall(result) if 'S(2)' not in layout
  ]
  return _Operation(
    name,
    opcode[1],
    tuple(size for size, _ in sizes),
    sum(size for size, main in sizes if main),
    tuple(re.findall(r'%([\w.\-]+)', inside)),
    inside if opcode[1] in ('constant', 'parameter') else attributes,
  )


def _size(kind: str, shape: str) -> int:
  digits = re.search(r'\d+', kind)
  bits = _BITS.get(kind) or (int(digits[0]) if digits else 0)
  return math.prod(map(int, filter(None, shape.split(',')))) * bits // 8


def _add(traffic: Traffic, computations: Mapping, name: str, times: int, devices: int) -> None:
  """Adds a computation that is run so many times."""
  operations = computations[name]
  for kind, sent in _collectives(operations, computations, devices).values():
    traffic.sent[kind] = traffic.sent.get(kind, 0) + times * sent
    traffic.counts[kind] = traffic.counts.get(kind, 0) + times
  for operation in operations.values():
    for inner, repeats in _contained(operation, computations):
      _add(traffic, computations, inner, times * repeats, devices)
    if estimate := _CYCLES.search(operation.rest):
      traffic.cycles += times * int(estimate[1])
    if operation.opcode not in _FREE:
      traffic.hbm_bytes += times * _moved(operation, operations, computations)


def _collectives(
  operations: Mapping[str, _Operation], computations: Mapping, devices: int
) -> dict[str, tuple[str, float]]:
  """Kind and bytes sent of the collectives of a computation, those inside its fusions included.

  A collective that happens behind several fusions stands in each of them, with one channel.
  """
  found, last = {}, list(operations.values())[-1]
  for operation in operations.values():
    kind = operation.opcode.removesuffix('-start')
    if kind in SENT:
      count = _group_size(operation.rest, devices)
      size = _payload(operation, kind) * (count if kind == 'reduce-scatter' else 1)
      if last.opcode == 'dynamic-slice' and last.operands[0] == operation.name:
        kind = 'reduce-scatter'  # which this compiler writes as a sum of which a part is taken
      found[operation.name] = kind, SENT[kind](count) * size
    elif operation.opcode == 'fusion' and (inner := computations.get(_attribute(operation, 'calls') or '')):
      behind = _collectives(inner, computations, devices)
      found |= {
        _attribute(inner[name], 'channel_id') if name in inner else name: value for name, value in behind.items()
      }
  return found


def _payload(operation: _Operation, kind: str) -> int:
  """Bytes of a collective's result; where it is only started, operands come first among its results."""
  if operation.opcode.endswith('-start') and kind != 'all-reduce':
    count = len(operation.operands)
    return sum(operation.sizes[count : 2 * count])
  return operation.bytes


def _group_size(attributes: str, devices: int) -> int:
  """How many devices take part in a collective together, by any of the forms in which they are written."""
  if found := re.search(r'replica_groups=mesh\[(.*?)\] \{(.*?)\}', attributes):  # mesh['a'=4,'b'=2] {'a'}
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])  # of an axis, or of a part of it, as in 'a':(1)2
    return math.prod(int(part or sizes[axis]) for axis, part in parts)
  if found := re.search(r'replica_groups=\[\d+,(\d+)\]<=', attributes):  # [groups,size]<=[devices]
    return int(found[1])
  if found := re.search(r'replica_groups=\{\{([\d,]*)\}', attributes):  # {{0,1},{2,3}}
    return len(found[1].split(','))
  return devices


def _contained(operation: _Operation, computations: Mapping) -> Iterator[tuple[str, int]]:
  """Computations that an operation runs, and how often; those of fusions move nothing by themselves."""
  if operation.opcode == 'while':
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', operation.rest)
    yield (
      _attribute(operation, 'body'),
      (int(known[1]) if known else _repeats(computations[_attribute(operation, 'condition')])),
    )
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
  """How often a loop runs: it counts from 0 to the constant that its condition compares with.

  Where that depends on data there is none, and it counts for nothing: such loops do what is left over (see
  packed_texts.py).
  """
  last = list(condition.values())[-1]
  bounds = (
    [condition[name].rest for name in last.operands if name in condition and condition[name].opcode == 'constant']
    if last.opcode == 'compare'
    else []
  )
  return int(bounds[0]) if bounds and bounds[0].isdigit() else 0


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
