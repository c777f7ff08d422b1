"""Compiles a config's training step for absent TPUs or GPUs and reports memory, expected time and bounds of each chip.

  python -m groupvit_jax.aot --config=configs/groupvit_vits16_gcc_yfcc.py --topology=v5e:16x16,h100:8

Needs the compiler (libtpu or 'jax[cuda13]', by pip) and neither data nor a chip. Exits with 3 when a step does not fit.
"""

import json
import os
import pathlib

from absl import flags
from ml_collections import config_flags

from groupvit_jax import cli

CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment; --config.x.y=value overrides an entry.')
TOPOLOGY = flags.DEFINE_list(
  'topology', None, 'Chips and their shape, as in v5e:16x16 or h100:8; several after commas.'
)
JSON = flags.DEFINE_string('json', None, 'Also write the reports to this file, as they come.')
TABLE = flags.DEFINE_bool('table', False, 'Also print one Markdown table of all topologies.')
BY_SCOPE = flags.DEFINE_bool('by_scope', False, 'Also print expected time and traffic by part of the model.')
flags.mark_flags_as_required(['config', 'topology'])


def main() -> int:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing runs on the devices that there are
  from groupvit_jax.aot import chips, report, step

  found = []
  for topology in [chips.find_topology(name) for name in TOPOLOGY.value]:
    found.append(report.make_report(CONFIG.value, topology, step.compile_step(CONFIG.value, topology)))
    print(report.describe(found[-1], CONFIG.value) + '\n', flush=True)
    if BY_SCOPE.value and 'parts' in found[-1]:
      print(report.tabulate_parts(found[-1]) + '\n', flush=True)
    if JSON.value is not None:  # each may take minutes: no report is lost when the next one fails
      pathlib.Path(JSON.value).write_text(json.dumps(found, indent=2) + '\n')
  if TABLE.value:
    print(report.tabulate(found))
  return 0 if all(entry['fits'] for entry in found) else cli.EXIT_PARTIAL


if __name__ == '__main__':
  cli.run(main)
