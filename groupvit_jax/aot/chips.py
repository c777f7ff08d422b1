"""TPU chips, their published peaks and clocks, and the topologies that a step can be compiled for."""

from collections.abc import Mapping
import math
import os
import re
from typing import NamedTuple

from jax.experimental import topologies

from groupvit_jax.errors import UserError


class Chip(NamedTuple):
  """A chip, by Google Cloud's pages on TPU versions (docs.cloud.google.com/tpu/docs).

  Clocks: v4's is published (Jouppi et al. 2023, arXiv 2304.01433). v5e's and v5p's follow from the published peak and
  the multipliers that JAX's table of TPUs has (cores x 4 matrix units x 128 x 128): peak / (2 x multipliers), 1.50 and
  1.75 GHz. For newer chips that quotient is no plausible clock, and none is published.
  """

  peak_flops: float  # a second, bfloat16
  hbm_bytes: float
  hbm_bandwidth: float  # bytes a second
  link_bandwidth: float  # bytes a second over all of a chip's links, in both directions together
  clock_hz: float | None = None
  chip_config: str | None = None  # makes both cores of a chip one device for the compiler


CHIPS: Mapping[str, Chip] = {
  'v4': Chip(275e12, 32 * 2**30, 1228e9, 600e9, 1.05e9, 'megacore'),
  'v5e': Chip(197e12, 16 * 2**30, 819e9, 400e9, 1.5e9),
  'v5p': Chip(459e12, 95 * 2**30, 2765e9, 1200e9, 1.75e9),
  'v6e': Chip(918e12, 32 * 2**30, 1638e9, 800e9),
  'tpu7x': Chip(2307e12, 192 * 2**30, 7380e9, 1200e9),
}


class Topology(NamedTuple):
  """A slice of a pod."""

  name: str
  chip: Chip
  num_chips: int
  devices: list  # of JAX, for compiling only; a chip has one or two


def find_topology(name: str) -> Topology:
  """The devices of a topology such as 'v5e:16x16'.

  Raises:
    UserError: there is no such topology, or libtpu is missing.
  """
  version, _, shape = name.partition(':')
  if version not in CHIPS or not re.fullmatch(r'\d+(x\d+)+', shape):
    raise UserError(
      f'--topology={name} is none; write a chip ({", ".join(CHIPS)}) and a shape, as in v5e:16x16 or v5p:4x4x4'
    )
  # Nothing runs: no metadata server is asked about this machine, and several processes may compile at a time.
  for variable, value in dict(
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE='v5litepod-1',
  ).items():
    os.environ.setdefault(variable, value)
  chip = CHIPS[version]
  options = {} if chip.chip_config is None else {'chip_config_name': chip.chip_config}
  try:
    devices = topologies.get_topology_desc(name, platform='tpu', **options).devices
  except (RuntimeError, ImportError, OSError) as error:
    raise UserError(
      f'cannot compile for --topology={name}: {str(error).splitlines()[0]}; the compiler comes with '
      "pip install 'libtpu'"
    ) from error
  return Topology(name, chip, math.prod(map(int, shape.split('x'))), list(devices))
