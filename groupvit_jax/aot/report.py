"""Reports of a compiled step: memory, expected time, bounds, and cost by part of the model."""

from collections.abc import Mapping, Sequence
import re

import ml_collections

from groupvit_jax.aot.chips import Chip, Topology
from groupvit_jax.aot.program import Cost, Kernels
from groupvit_jax.aot.step import CompiledStep

_GIB = 2**30
_LATENCY = 1e-6  # seconds that a chip's message to its neighbour takes at least, however short: a round number
_DAY = 24 * 60 * 60
_VECTOR = 8 * 128  # numbers that a core's vector unit handles in a cycle
_TIMES = ('ms', 'forward', 'recomputed', 'backward')  # of a part

# Parts of a step as the paper names them: the first that matches the path of an operation, of modules and named scopes.
_PARTS = (
  ('optimizer', r'optimizer|^state\.(params|opt_state)'),
  ('losses', r'(caption|multi_label)_loss'),
  ('projectors', r'_projector/|/project/'),
  ('packing texts', r'pack_texts'),
  ('text tower: attention', r'\btext/.*attn\b'),
  ('text tower: MLPs', r'\btext/.*mlp\b'),
  ('text tower: norms', r'\btext/.*norm'),
  ('text tower: rest', r'\btext\b|text_features'),
  ('patch embedding', r'patch_embed|patch_norm'),
  (r'stage \1: grouping', r'stage(\d+)_(?:grouping|group_)'),
  (r'stage \1: attention', r'stage(\d+)_block\d+/.*attn\b'),
  (r'stage \1: MLPs', r'stage(\d+)_block\d+/.*mlp\b'),
  (r'stage \1: norms', r'stage(\d+)_block\d+/.*norm'),
  (r'stage \1: rest', r'\bvision/stage(\d+)\b'),
  ('image tower: rest', r'\bvision\b|vision_features'),
  ('augmentation', r'RandomErasing|random_erasing|normalize_images'),
)


def make_report(config: ml_collections.ConfigDict, topology: Topology, step: CompiledStep) -> dict[str, object]:
  """Metrics of a chip, for JSON: sizes in GiB, times in seconds."""
  chip, devices = topology.chip, len(topology.devices) / topology.num_chips
  per_chip = lambda size: round(devices * size / _GIB, 3)
  report = {
    'topology': topology.name,
    'chips': topology.num_chips,
    'devices': len(topology.devices),
    'batch_size': config.batch_size,
    'pairs_a_device': step.rows,
    'grad_accum_steps': config.grad_accum_steps,
    'remat': config.remat,
    'mesh': dict(config.mesh),
    'compile_s': round(step.compile_s, 1),
    'compile_cpu_s': round(step.compile_cpu_s, 1),
    'state_gib': {'whole': round(step.state.whole / _GIB, 3), 'of_a_chip': per_chip(step.state.of_a_device)},
    'hbm_gib': {'chip': round(chip.usable_bytes / _GIB, 1), 'together': per_chip(step.wanted_bytes)},
    'fits': step.memory is not None and devices * step.wanted_bytes <= chip.usable_bytes,
  }
  if step.memory is None:
    return report
  report['hbm_gib'] |= {name: per_chip(size) for name, size in step.memory._asdict().items()}
  bounds = {'arithmetic': step.flops / topology.num_chips / chip.peak_flops}
  report['gflop'] = round(step.flops / topology.num_chips / 1e9, 1)
  if step.traffic is not None:
    bounds |= {
      'memory': devices * step.traffic.hbm_bytes / chip.hbm_bandwidth,
      'collectives': (
        devices * sum(step.traffic.sent.values()) / (chip.link_bandwidth / 2)
        + _LATENCY * sum(step.traffic.counts.values())
      ),
    }
    report |= {
      'hbm_traffic_gib': round(devices * step.traffic.hbm_bytes / _GIB, 6),
      'collectives': {
        kind: {'count': step.traffic.counts[kind], 'sent_mib': round(devices * size / 2**20, 2)}
        for kind, size in sorted(step.traffic.sent.items())
      },
      'operations': step.traffic.operations,
      'parts': _parts(step.traffic.by_name, chip, devices),
    }
    if chip.gpu is None:
      report |= {'estimated_cycles': step.traffic.cycles, 'custom_kernels': step.traffic.kernels.count}
  seconds = max(bounds.values())
  report |= {
    'roofline_s': {name: round(value, 6) for name, value in bounds.items()},
    'limited_by': max(bounds, key=bounds.get) + (', as far as is known' if step.traffic is None else ''),
    'step_s': round(seconds, 6),
    'images_per_s': round(config.batch_size / seconds),
    'days': round(config.total_steps * seconds / _DAY, 3),
  }
  if step.traffic is not None and chip.clock_hz is not None:
    seconds = max(seconds, _device_seconds(step.traffic, chip, devices) + bounds['collectives'])
    report['expected'] = {
      'step_s': round(seconds, 6),
      'share_of_peak': round(bounds['arithmetic'] / seconds, 4),
      'images_per_s': round(config.batch_size / seconds),
      'days': round(config.total_steps * seconds / _DAY, 3),
    }
  return report


def _device_seconds(cost: Cost, chip: Chip, devices: float) -> float:
  """Expected time of operations, one after the other; a chip has `devices` devices."""
  return cost.cycles / chip.clock_hz + _kernel_seconds(cost.kernels, chip, devices)


def _kernel_seconds(kernels: Kernels, chip: Chip, devices: float) -> float:
  """Expected time of custom kernels: the matrix unit and the vector unit take turns, memory is read meanwhile."""
  units = devices * kernels.flops / chip.peak_flops + kernels.transcendentals / (_VECTOR * chip.clock_hz)
  return max(units, devices * kernels.bytes / chip.hbm_bandwidth)


def _parts(by_name: Mapping[str, Cost], chip: Chip, devices: float) -> dict[str, dict[str, float]]:
  """Milliseconds by pass (if the clock is known), traffic and operations of each part of the model; largest first."""
  parts: dict[str, dict[str, float]] = {}
  for op_name, cost in by_name.items():
    empty = dict.fromkeys(_TIMES if chip.clock_hz else (), 0.0) | {'hbm_traffic_gib': 0.0, 'operations': 0}
    part = parts.setdefault(part_of(op_name), empty)
    for key in ('ms', pass_of(op_name)) if chip.clock_hz else ():
      part[key] += 1e3 * _device_seconds(cost, chip, devices)
    part['hbm_traffic_gib'] += devices * cost.hbm_bytes / _GIB
    part['operations'] += cost.operations
  rounded = {name: {key: round(value, 3) for key, value in part.items()} for name, part in parts.items()}
  return dict(sorted(rounded.items(), key=lambda item: -next(iter(item[1].values()))))


def part_of(op_name: str) -> str:
  """The part that an operation belongs to, by its path."""
  for name, pattern in _PARTS:
    if match := re.search(pattern, op_name):
      return match.expand(name)
  return 'rest'


def pass_of(op_name: str) -> str:
  """'forward', 'backward', or 'recomputed' for what a backward pass computes again."""
  if 'rematted_computation' in op_name:
    return 'recomputed'
  return 'backward' if 'transpose(' in op_name else 'forward'


def describe(report: Mapping[str, object], config: ml_collections.ConfigDict) -> str:
  """The report as people read it; `config` is the experiment."""
  hbm, lines = report['hbm_gib'], []
  add = lambda name, text: lines.append(f'{name:12} {text}')
  add(
    'topology',
    f'{report["topology"]}, {report["chips"]} chips; batch {report["batch_size"]:,}, '
    f'grad_accum_steps {report["grad_accum_steps"]}, remat {report["remat"]}; '
    f'compiled in {report["compile_s"]} s ({report["compile_cpu_s"]} s of processors)',
  )
  names = [name for name in ('arguments', 'results', 'temporaries', 'code') if name in hbm]
  parts = ', '.join(f'{name} {hbm[name]:.2f}' for name in names)
  add('memory', f'{hbm["together"]:.2f} of {hbm["chip"]} GiB a chip' + (f': {parts}' if parts else ''))
  state = report['state_gib']
  add('state', f'{state["whole"]:.2f} GiB of parameters and optimiser, of which a chip holds {state["of_a_chip"]:.2f}')
  if 'gflop' in report:
    add('arithmetic', f'{report["gflop"]:,} GFLOP a chip and step')
    if 'hbm_traffic_gib' in report:
      add('traffic', f"{report['hbm_traffic_gib']:,.3f} GiB to and from a chip's memory")
      for kind, found in report['collectives'].items():
        add('collective', f'{kind}: {found["count"]} in which a chip sends {found["sent_mib"]:,} MiB')
      if 'estimated_cycles' not in report:
        add('kernels', f'{report["operations"]:,} in a step, one after the other')
      else:
        kernels = report['custom_kernels']
        add(
          'estimate',
          f'{report["estimated_cycles"] / 1e6:,.1f} million cycles of a device, by the compiler'
          + (f', beside {kernels} custom kernels, counted by their cost estimates' if kernels else ''),
        )
    else:
      add('traffic', 'not known, nor what is sent: jaxlib cannot read the program that libtpu made; try a newer jax')
    if expected := report.get('expected'):
      add(
        'expected',
        f'{1e3 * expected["step_s"]:.1f} ms a step, {expected["share_of_peak"]:.1%} of the peak; '
        f'{expected["images_per_s"]:,} images/s; {config.total_steps:,} steps in {expected["days"]:.2f} days',
      )
    bounds = ', '.join(f'{name} {1e3 * value:.1f} ms' for name, value in report['roofline_s'].items())
    add('at best', f'{bounds}; limited by {report["limited_by"]}; {report["images_per_s"]:,} images/s')
  if not report['fits']:
    add('does not fit', advise(config, report))
  return '\n'.join(lines)


def tabulate(reports: Sequence[Mapping[str, object]]) -> str:
  """Several reports as a Markdown table; days and chip-hours are expected ones, of the config's steps."""
  lines = [
    '| topology | chips | pairs a chip | GiB a chip | expected, ms | of the peak | arithmetic, ms | memory, ms '
    '| collectives, ms | images/s | days | chip-hours | compiled in, s |',
    '|:--|' + '--:|' * 12,
  ]
  for report in reports:
    hbm, pairs = report['hbm_gib'], report['batch_size'] / report['chips']
    cells = [report['topology'], report['chips'], f'{pairs:,.4g}', f'{hbm["together"]:.1f} of {hbm["chip"]:.0f}']
    expected, bounds = report.get('expected'), report.get('roofline_s', {})
    if not report['fits']:
      cells.append('does not fit')
    elif expected:
      cells += [f'**{1e3 * expected["step_s"]:.1f}**', f'{expected["share_of_peak"]:.0%}']
    cells += ['?'] * (6 - len(cells))
    cells += [
      f'{1e3 * bounds[name]:.1f}' if name in bounds else '?' for name in ('arithmetic', 'memory', 'collectives')
    ]
    if expected:
      hours = 24 * expected['days'] * report['chips']
      cells += [f'{expected["images_per_s"]:,}', f'{expected["days"]:.2f}', f'{hours:,.0f}']
    cells += ['?'] * (12 - len(cells))
    lines.append(f'| {" | ".join(map(str, cells))} | {report["compile_s"]:.0f} |')
  return '\n'.join(lines)


def tabulate_parts(report: Mapping[str, object]) -> str:
  """Expected time, traffic and operations by part of the model, as a Markdown table; `share` is of the first column."""
  parts = report['parts']
  columns = list(next(iter(parts.values())))
  total = sum(part[columns[0]] for part in parts.values())
  titles = {'hbm_traffic_gib': 'GiB', 'operations': 'operations' if 'estimated_cycles' in report else 'kernels'}
  formats = {'hbm_traffic_gib': '.3f', 'operations': ','}
  titled = [titles.get(column, column) for column in columns]
  lines = [
    f'| {report["topology"]} | {titled[0]} | share | {" | ".join(titled[1:])} |',
    '|:--|' + '--:|' * (len(columns) + 1),
  ]
  for name, part in parts.items():
    first, *rest = (format(part[column], formats.get(column, '.1f')) for column in columns)
    share = part[columns[0]] / total if total else 0.0
    lines.append(f'| {name} | {first} | {share:.1%} | {" | ".join(rest)} |')
  return '\n'.join(lines)


def advise(config: ml_collections.ConfigDict, report: dict[str, object]) -> str:
  """What to change so that a step fits: first what costs least."""
  if config.remat == 'none':
    return 'set --config.remat=dots: less than a tenth more arithmetic (docs/train.md)'
  rows = report['pairs_a_device']
  if config.grad_accum_steps < rows:
    steps = min(step for step in range(config.grad_accum_steps + 1, rows + 1) if rows % step == 0)
    return f'set --config.grad_accum_steps={steps}: the same gradients, the towers in {steps} parts' + (
      '' if config.grad_accum_steps > 1 else ', for one more forward pass'
    )
  if config.remat == 'dots':
    return "set --config.remat=blocks: the towers' forward pass once more"
  if config.mesh.fsdp == 1:
    return (
      f'set --config.mesh.fsdp={report["devices"] // config.mesh.model}: parameters and optimiser '
      f'({report["state_gib"]["of_a_chip"]:.2f} GiB of a chip) are divided over the devices'
    )
  return 'take more chips, or chips with more memory'
