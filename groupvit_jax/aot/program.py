"""Traffic, cycles and collectives of a compiled program, read from its HLO text, loops included.

Each asynchronous operation counts once, where it starts, with the bytes that it moves.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import math
import re

# Bytes that one of n devices sends for each byte that a collective gathers, sums or exchanges: in a ring, the least.
SENT: Mapping[str, Callable[[int], float]] = {
  'all-reduce': lambda n: 2 * (n - 1) / n,
  'all-gather': lambda n: (n - 1) / n,
  'reduce-scatter': lambda n: (n - 1) / n,
  'all-to-all': lambda n: (n - 1) / n,
  'collective-permute': lambda n: 1,
}

# Operations that move nothing by themselves. A loop or call moves what it contains.
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
  )
)
# Custom calls that name memory: parts that were fetched one by one as a whole, or room for what comes later.
_VIRTUAL_CALLS = ('ConcatBitcast', 'AllocateBuffer')
_SLICES = ('dynamic-slice', 'slice', 'gather')
_BITS = {'pred': 8, 'bf16': 16, 'f16': 16, 'u4': 4, 's4': 4, 'f8e4m3fn': 8, 'f8e5m2': 8}

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_OPCODE = re.compile(r'(?:^|\s)([a-z][\w\-]*)\(')
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(r'"cost_estimate":\{([^}]*)\}')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_PARTITIONS = re.compile(r'num_partitions=(\d+)')


@dataclasses.dataclass(frozen=True)
class _Array:
  bytes: int
  in_main: bool  # in the chip's main memory


@dataclasses.dataclass(frozen=True)
class _Operation:
  name: str
  opcode: str
  results: tuple[_Array, ...]
  operands: tuple[str, ...]
  rest: str  # attributes

  @property
  def bytes(self) -> int:
    return sum(array.bytes for array in self.results)

  @property
  def main_bytes(self) -> int:
    return sum(array.bytes for array in self.results if array.in_main)

  def attribute(self, name: str) -> str | None:
    found = re.search(rf'\b{name}=%?([\w.\-]+)', self.rest)
    return found[1] if found else None


_Computation = Mapping[str, _Operation]


@dataclasses.dataclass
class Kernels:
  """Work of custom kernels, by the cost estimates that they were written with."""

  count: int = 0
  flops: float = 0
  transcendentals: float = 0
  bytes: float = 0

  def add(self, other: 'Kernels', times: int = 1) -> None:
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


@dataclasses.dataclass
class Cost:
  """Cost of some operations on a device.

  Attributes:
    hbm_bytes: read from and written to the main memory, by custom kernels too.
    cycles: that the compiler expects the operations to take, one after the other.
    operations: how many run that move something.
    kernels: custom kernels, of which the compiler gives no cycles.
  """

  hbm_bytes: float = 0
  cycles: int = 0
  operations: int = 0
  kernels: Kernels = dataclasses.field(default_factory=Kernels)


@dataclasses.dataclass
class Traffic(Cost):
  """Cost of a program that is run once, on a device.

  Attributes:
    sent: bytes that a device sends in collectives of each kind.
    counts: how many collectives of each kind run.
    by_name: cost by the `op_name` of operations; what has none counts where its result is used.
  """

  sent: dict[str, float] = dataclasses.field(default_factory=dict)
  counts: dict[str, int] = dataclasses.field(default_factory=dict)
  by_name: dict[str, Cost] = dataclasses.field(default_factory=dict)


def read_traffic(text: str) -> Traffic:
  """Adds up the traffic of a compiled program, given as HLO text.

  A loop's body counts as often as it runs. Of an operand that is only sliced, the slices count.
  """
  computations, entry = _parse(text)
  devices = _PARTITIONS.search(text)
  traffic = Traffic()
  _add(traffic, computations, entry, 1, int(devices[1]) if devices else 1)
  return traffic


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  """Operations by name, of computations by name; and the name of the entry computation."""
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
      current[found[1]] = _operation(found[1], found[2])
  return computations, entry


def _operation(name: str, text: str) -> _Operation:
  opcode = _OPCODE.search(text)
  result, rest = text[: opcode.start()], text[opcode.end() :]
  inside, _, attributes = rest.partition(')')
  # Memory 0 is the main one, 1 lies beside the processor, 2 holds flags that say when something has arrived.
  arrays = [
    _Array(_size(kind, shape), 'S(' not in layout)
    for kind, shape, layout in _ARRAY.findall(result)
    if 'S(2)' not in layout
  ]
  operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  return _Operation(
    name, opcode[1], tuple(arrays), operands, inside if opcode[1] in ('constant', 'parameter') else attributes
  )


def _size(kind: str, shape: str) -> int:
  digits = re.search(r'\d+', kind)
  bits = _BITS.get(kind) or (int(digits[0]) if digits else 0)
  return math.prod(map(int, filter(None, shape.split(',')))) * bits // 8


def _add(traffic: Traffic, computations: Mapping[str, _Computation], name: str, times: int, devices: int) -> None:
  """Adds a computation that is run so many times."""
  operations = computations[name]
  users = _users(operations)
  for kind, sent in _collectives(operations, computations, devices).values():
    traffic.sent[kind] = traffic.sent.get(kind, 0) + times * sent
    traffic.counts[kind] = traffic.counts.get(kind, 0) + times
  for operation in operations.values():
    for inner, repeats in _contained(operation, computations):
      _add(traffic, computations, inner, times * repeats, devices)
    cost = _cost(operation, operations, computations)
    if cost.hbm_bytes or cost.cycles or cost.kernels.count:
      op_name = _op_name(operation, operations, users)
      for total in (traffic, traffic.by_name.setdefault(op_name, Cost())):
        total.hbm_bytes += times * cost.hbm_bytes
        total.cycles += times * cost.cycles
        total.operations += times
        total.kernels.add(cost.kernels, times)


def _cost(operation: _Operation, operations: _Computation, computations: Mapping[str, _Computation]) -> Cost:
  """Of an operation that is run once, without the computations that it runs."""
  cycles = _CYCLES.search(operation.rest)
  cost = Cost(cycles=int(cycles[1]) if cycles else 0)
  if kernel := _KERNEL.search(operation.rest):
    values = {key: float(value) for key, value in re.findall(r'"(\w+)":"?([\d.]+)', kernel[1])}
    names = ('flops', 'transcendentals', 'bytes_accessed')
    cost.kernels = Kernels(1, *(values.get(name, 0.0) for name in names))
    cost.hbm_bytes = cost.kernels.bytes
  elif operation.opcode not in _FREE:
    cost.hbm_bytes = _moved(operation, operations, computations)
  return cost


def _users(operations: _Computation) -> Mapping[str, _Operation]:
  """The first operation that uses each result."""
  users: dict[str, _Operation] = {}
  for operation in operations.values():
    for name in operation.operands:
      users.setdefault(name, operation)
  return users


def _op_name(operation: _Operation, operations: _Computation, users: Mapping[str, _Operation]) -> str:
  """The operation's name, or of the first with a name that its result goes to, or that its operands come from."""
  current: _Operation | None = operation
  for step in (lambda op: users.get(op.name), lambda op: operations.get(op.operands[0]) if op.operands else None):
    current = operation
    for _ in range(8):
      if current is None:
        break
      if found := _OP_NAME.search(current.rest):
        return found[1]
      current = step(current)
  return ''


def _collectives(
  operations: _Computation, computations: Mapping[str, _Computation], devices: int
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
    elif operation.opcode == 'fusion' and (inner := computations.get(operation.attribute('calls') or '')):
      behind = _collectives(inner, computations, devices)
      found |= {inner[name].attribute('channel_id') if name in inner else name: value for name, value in behind.items()}
  return found


def _payload(operation: _Operation, kind: str) -> int:
  """Bytes of a collective's result; where it is only started, operands come first among its results."""
  if operation.opcode.endswith('-start') and kind != 'all-reduce':
    count = len(operation.operands)
    return sum(array.bytes for array in operation.results[count : 2 * count])
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


def _contained(operation: _Operation, computations: Mapping[str, _Computation]) -> Iterator[tuple[str, int]]:
  """Computations that an operation runs, and how often; those of fusions move nothing by themselves."""
  if operation.opcode == 'while':
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', operation.rest)
    repeats = int(known[1]) if known else _repeats(computations[operation.attribute('condition')])
    yield operation.attribute('body'), repeats
  elif operation.opcode in ('call', 'async-start'):
    if inner := operation.attribute('to_apply') or operation.attribute('calls'):
      yield inner, 1
  elif operation.opcode == 'conditional':
    branches = re.search(r'branch_computations=\{([^}]*)\}', operation.rest)
    yield from ((inner.strip().lstrip('%'), 1) for inner in (branches[1].split(',')[-1:] if branches else ()))


def _repeats(condition: _Computation) -> int:
  """How often a loop runs: it counts from 0 to the constant that its condition compares with.

  A loop whose length depends on data counts for nothing: text_packing.py has such loops, for rare leftovers.
  """
  last = list(condition.values())[-1]
  bounds = (
    [condition[name].rest for name in last.operands if name in condition and condition[name].opcode == 'constant']
    if last.opcode == 'compare'
    else []
  )
  return int(bounds[0]) if bounds and bounds[0].isdigit() else 0


def _moved(operation: _Operation, operations: _Computation, computations: Mapping[str, _Computation]) -> int:
  """Bytes that an operation reads from and writes to the main memory."""
  opcode, source = operation.opcode, operations.get(operation.operands[0]) if operation.operands else None
  if opcode.endswith(('-done', '-update')) or opcode == 'async-start':
    return 0
  if opcode == 'copy-start':  # of (to, from, state)
    return operation.main_bytes
  if opcode == 'slice-start':  # of ((operands), slice, state)
    moved = operation.results[-1].bytes
    return sum(moved for array in (operation.results[0], operation.results[-1]) if array.in_main)
  if opcode.removesuffix('-start') in SENT:  # reads its operands and writes its results
    results = operation.results[len(operation.operands) :] if opcode.endswith('-start') else operation.results
    results = results if results or opcode != 'all-reduce-start' else operation.results
    read = sum(operations[name].main_bytes for name in operation.operands if name in operations)
    return read + sum(array.bytes for array in results if array.in_main)
  if opcode == 'custom-call' and any(f'"{name}"' in operation.rest for name in _VIRTUAL_CALLS):
    return 0
  if opcode in _SLICES:
    return operation.main_bytes + (operation.bytes if source is None or source.main_bytes else 0)
  inner = computations.get(operation.attribute('calls') or '', {}) if opcode == 'fusion' else {}
  read = 0
  for index, name in enumerate(operation.operands):
    whole = operations[name].main_bytes if name in operations else 0
    read += min(whole, _read_of_parameter(inner, index, whole, computations))
  written = operation.main_bytes
  updates = [op for op in inner.values() if op.opcode == 'dynamic-update-slice']
  if updates:  # in place: only the slice is written
    written -= sum(op.bytes - inner[op.operands[1]].bytes for op in updates if op.operands[1] in inner)
  return read + max(written, 0)


def _read_of_parameter(inner: _Computation, index: int, whole: int, computations: Mapping[str, _Computation]) -> int:
  """How much of an operand a fusion reads."""
  parameter = next((op.name for op in inner.values() if op.opcode == 'parameter' and op.rest == str(index)), None)
  users = [op for op in inner.values() if parameter in op.operands]
  if not users:
    return whole
  read = 0
  for user in users:
    if user.opcode in _SLICES and user.operands[0] == parameter:
      read += user.bytes
    elif user.opcode == 'fusion':
      nested = computations.get(user.attribute('calls') or '', {})
      read += _read_of_parameter(nested, user.operands.index(parameter), whole, computations)
    elif not (user.opcode == 'dynamic-update-slice' and user.operands[0] == parameter):
      return whole
  return read
