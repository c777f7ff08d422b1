"""TPU chips and GPUs, their published peaks and clocks, and the topologies that a step can be compiled for."""

from collections.abc import Mapping
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from groupvit_jax.errors import UserError


class Gpu(NamedTuple):
  """What XLA's compiler asks about an NVIDIA GPU.

  By NVIDIA's CUDA programming guide, appendix "Compute Capabilities"; number of processors, clock, memory and cache by
  XLA's own descriptions (github.com/openxla/xla, xla/backends/gpu/target_config/specs).
  """

  name: str
  compute_capability: int  # its first figure; the second is 0
  processors: int
  float32_units: int  # of a processor
  shared_memory: int  # bytes of a processor; one block may have all but 1 KiB of it
  l2_bytes: int
  clock_ghz: float


class Chip(NamedTuple):
  """A TPU chip or a GPU.

  TPUs are as on Google Cloud's pages on TPU versions (docs.cloud.google.com/tpu/docs), GPUs as on NVIDIA's data sheets,
  without sparsity.

  Clocks: v4's is published (Jouppi et al. 2023, arXiv 2304.01433). v5e's and v5p's follow from the published peak and
  the multipliers that JAX's table of TPUs has (cores x 4 matrix units x 128 x 128): peak / (2 x multipliers), 1.50 and
  1.75 GHz. For newer chips that quotient is no plausible clock, and none is published. XLA's compiler for GPUs gives no
  cycles that a clock could turn into time.
  """

  peak_flops: float  # a second, bfloat16
  hbm_bytes: float
  hbm_bandwidth: float  # bytes a second
  link_bandwidth: float  # bytes a second over all of a chip's links, in both directions together
  clock_hz: float | None = None
  chip_config: str | None = None  # makes both cores of a chip one device for the compiler
  gpu: Gpu | None = None  # None: a TPU

  @property
  def usable_bytes(self) -> float:
    """Of the memory, what JAX uses where XLA_PYTHON_CLIENT_MEM_FRACTION says nothing else."""
    return 0.75 * self.hbm_bytes if self.gpu else self.hbm_bytes


CHIPS: Mapping[str, Chip] = {
  'v4': Chip(275e12, 32 * 2**30, 1228e9, 600e9, 1.05e9, 'megacore'),
  'v5e': Chip(197e12, 16 * 2**30, 819e9, 400e9, 1.5e9),
  'v5p': Chip(459e12, 95 * 2**30, 2765e9, 1200e9, 1.75e9),
  'v6e': Chip(918e12, 32 * 2**30, 1638e9, 800e9),
  'tpu7x': Chip(2307e12, 192 * 2**30, 7380e9, 1200e9),
  'a100': Chip(
    312e12, 85.10e9, 2039e9, 600e9, gpu=Gpu('NVIDIA A100-SXM4-80GB', 8, 108, 64, 164 * 2**10, 40 * 2**20, 1.41)
  ),
  'h100': Chip(
    989e12, 84.94e9, 3352e9, 900e9, gpu=Gpu('NVIDIA H100 80GB HBM3', 9, 132, 128, 228 * 2**10, 50 * 2**20, 1.98)
  ),
  'h200': Chip(989e12, 151.4e9, 4800e9, 900e9, gpu=Gpu('NVIDIA H200', 9, 132, 128, 228 * 2**10, 50 * 2**20, 1.98)),
}
_MOST_GPUS = 8  # that NVLink joins in one host


class Topology(NamedTuple):
  """A slice of a pod, or the GPUs of a host."""

  name: str
  chip: Chip
  num_chips: int
  devices: list  # of JAX, for compiling only; a chip has one or two


def find_topology(name: str) -> Topology:
  """The devices of a topology such as 'v5e:16x16' or 'h100:8'.

  Raises:
    UserError: there is no such topology, or its compiler is missing.
  """
  version, _, shape = name.partition(':')
  chip = CHIPS.get(version)
  if chip is None or not re.fullmatch(r'\d+' if chip.gpu else r'\d+(x\d+)+', shape):
    raise UserError(
      f'--topology={name} is none; write a chip ({", ".join(CHIPS)}) and a shape, as in v5e:16x16 or v5p:4x4x4, '
      f'or GPUs of one host, as in h100:{_MOST_GPUS}'
    )
  # Nothing runs: neither a metadata server nor a driver is asked about this machine, and several processes may compile.
  for variable, value in dict(
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE='v5litepod-1',
    JAX_SKIP_CUDA_CONSTRAINTS_CHECK='1',
  ).items():
    os.environ.setdefault(variable, value)
  num_chips = math.prod(map(int, shape.split('x')))
  if chip.gpu and not 1 <= num_chips <= _MOST_GPUS:
    raise UserError(f'--topology={name} is none; a host has 1 to {_MOST_GPUS} GPUs')
  try:
    devices = _gpus(chip, num_chips) if chip.gpu else _tpus(name, chip)
  except (RuntimeError, ImportError, OSError) as error:
    compiler = 'jax[cuda13]' if chip.gpu else 'libtpu'
    raise UserError(
      f'cannot compile for --topology={name}: {str(error).splitlines()[0]}; the compiler comes with '
      f"pip install '{compiler}'"
    ) from error
  return Topology(name, chip, num_chips, list(devices))


def _tpus(name: str, chip: Chip) -> list[jax.Device]:
  options = {} if chip.chip_config is None else {'chip_config_name': chip.chip_config}
  return topologies.get_topology_desc(name, platform='tpu', **options).devices


def _gpus(chip: Chip, count: int) -> list[jax.Device]:
  gpu = chip.gpu
  # As in XLA's GpuTargetConfigProto; limits of threads, blocks and registers are those of every GPU listed above.
  target = f"""
    platform_name: "CUDA" device_description_str: "{gpu.name}"
    dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 9 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {gpu.compute_capability} }}
      core_count: {gpu.processors} fpus_per_core: {gpu.float32_units} clock_rate_ghz: {gpu.clock_ghz}
      shared_memory_per_core: {gpu.shared_memory} shared_memory_per_block_optin: {gpu.shared_memory - 2**10}
      shared_memory_per_block: {48 * 2**10} l2_cache_size: {gpu.l2_bytes}
      device_memory_size: {int(chip.hbm_bytes)} memory_bandwidth: {int(chip.hbm_bandwidth)}
      threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
      block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1}
      registers_per_core_limit: {2**16} registers_per_block_limit: {2**16}
    }}"""
  return topologies.get_topology_desc('', platform='cuda', target_config=target, topology=f'1x1x{count}').devices
