"""From a compiled step to what a person wants to know: does it fit, what limits it, how long will it take."""

from collections.abc import Mapping, Sequence

import ml_collections

from groupvit_jax.aot.chips import Topology
from groupvit_jax.aot.step import CompiledStep

_GIB = 2**30
_LATENCY = 1e-6  # seconds that a chip's message to its neighbour takes at least, however short: a round figure
_DAY = 24 * 60 * 60


def make_report(config: ml_collections.ConfigDict, topology: Topology, step: CompiledStep) -> dict[str, object]:
  """Figures of a chip, for JSON.

  Args:
    config: the experiment.
    topology: what the step was compiled for.
    step: the step.

  Returns:
    Sizes in GiB, times in seconds.
  """
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
    'scan_layers': config.scan_layers,
    'mesh': dict(config.mesh),
    'compile_s': round(step.compile_s, 1),
    'compile_cpu_s': round(step.compile_cpu_s, 1),
    'state_gib': {'whole': round(step.state.whole / _GIB, 3), 'of_a_chip': per_chip(step.state.of_a_device)},
    'hbm_gib': {'chip': round(chip.hbm_bytes / _GIB, 1), 'together': per_chip(step.wanted_bytes)},
    'fits': step.memory is not None and devices * step.wanted_bytes <= chip.hbm_bytes,
  }
  if step.memory is None:
    return report
  report['hbm_gib'] |= {name: per_chip(size) for name, size in step.memory._asdict().items()}
  times = {'arithmetic': step.flops / topology.num_chips / chip.peak_flops}
  report['gflop'] = round(step.flops / topology.num_chips / 1e9, 1)
  if step.traffic is not None:
    times |= {
      'memory': devices * step.traffic.hbm_bytes / chip.hbm_bandwidth,
      'collectives': (
        devices * sum(step.traffic.sent.values()) / (chip.link_bandwidth / 2)
        + _LATENCY * sum(step.traffic.counts.values())
      ),
    }
    report |= {
      'hbm_traffic_gib': per_chip(step.traffic.hbm_bytes),
      'collectives': {
        kind: {'count': step.traffic.counts[kind], 'sent_mib': round(devices * size / 2**20, 2)}
        for kind, size in sorted(step.traffic.sent.items())
      },
      'estimated_cycles': step.traffic.cycles,
    }
  seconds = max(times.values())
  return report | {
    'roofline_s': {name: round(value, 6) for name, value in times.items()},
    'limited_by': max(times, key=times.get) + (', as far as is known' if step.traffic is None else ''),
    'step_s': round(seconds, 6),
    'images_per_s': round(config.batch_size / seconds),
    'days': round(config.total_steps * seconds / _DAY, 3),
  }


def describe(report: dict[str, object], config: ml_collections.ConfigDict) -> str:
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
      add('traffic', f"{report['hbm_traffic_gib']:,} GiB to and from a chip's memory")
      for kind, found in report['collectives'].items():
        add('collective', f'{kind}: {found["count"]} in which a chip sends {found["sent_mib"]:,} MiB')
      add('estimate', f'{report["estimated_cycles"] / 1e6:,.1f} million cycles of a device, by the compiler')
    else:
      add('traffic', 'not known, nor what is sent: jaxlib cannot read the program that libtpu made; try a newer jax')
    add(
      'at best',
      ', '.join(f'{name} {1e3 * value:.1f} ms' for name, value in report['roofline_s'].items())
      + f'; limited by {report["limited_by"]}',
    )
    add('so at most', f'{report["images_per_s"]:,} images/s; {config.total_steps:,} steps in {report["days"]:.2f} days')
  if not report['fits']:
    add('does not fit', advise(config, report))
  return '\n'.join(lines)


def tabulate(reports: Sequence[Mapping[str, object]]) -> str:
  """Several reports as a Markdown table; chip-hours are those of the config's steps."""
  lines = [
    '| topology | chips | pairs a chip | GiB a chip | arithmetic, ms | memory, ms | collectives, ms '
    '| limited by | images/s | days | chip-hours | compiled in, s |',
    '|:--|' + '--:|' * 6 + ':--|' + '--:|' * 4,
  ]
  for report in reports:
    hbm, pairs = report['hbm_gib'], report['batch_size'] / report['chips']
    start = f'| {report["topology"]} | {report["chips"]} | {pairs:,.4g} | {hbm["together"]:.1f} of {hbm["chip"]:.0f} | '
    if 'roofline_s' in report:
      names, known = ('arithmetic', 'memory', 'collectives'), report['roofline_s']
      times = ' | '.join(f'{1e3 * known[name]:.1f}' if name in known else '?' for name in names)
      hours = 24 * report['days'] * report['chips']
      start += f'{times} | {report["limited_by"]} | {report["images_per_s"]:,} | {report["days"]:.2f} | {hours:,.0f} | '
    else:
      start += ' | | | does not fit | | | | '
    lines.append(f'{start}{report["compile_s"]:.0f} |')
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
