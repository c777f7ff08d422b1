"""The processes of a run, from flags and the variables of launchers. Does not import JAX."""

from collections.abc import Callable, Mapping
import re
from typing import NamedTuple

from absl import flags

from groupvit_jax.errors import UserError

_GIVE_ALL = 'give all of --coordinator, --num_processes and --process_id'
# Variables of launchers that start several processes, and the cure where JAX finds no coordinator.
_COUNTS = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE')
_LAUNCHERS = {
  'SLURM_NTASKS': 'start them with srun',
  'OMPI_COMM_WORLD_SIZE': f'Open MPI before version 5 says where they meet; with this one {_GIVE_ALL}',
  'PMI_SIZE': _GIVE_ALL,
  'JOB_COMPLETION_INDEX': "pip install 'jax[k8s]' in the image",
  'JAX_COORDINATOR_ADDRESS': 'give --num_processes and --process_id',
}


class Cluster(NamedTuple):
  """The processes of a run; JAX asks the launcher for what is None."""

  coordinator: str | None  # HOST:PORT, of process 0
  num_processes: int | None
  process_id: int | None
  startup_timeout: int  # seconds
  peer_timeout: int  # seconds

  @property
  def alone(self) -> bool:
    """Whether the flags say that there is one process."""
    return self.num_processes == 1

  def check(self) -> None:
    """Raises UserError when the parts do not fit together."""
    host, _, port = (self.coordinator or '').rpartition(':')
    if self.coordinator is not None and not (host and port.isdigit()):
      raise UserError(f'--coordinator={self.coordinator} is not HOST:PORT, as in --coordinator=10.0.0.1:8476')
    count, index = self.num_processes, self.process_id
    if None not in (count, index) and index >= count:
      raise UserError(f'--process_id={index} is not one of 0 to {count} - 1')


def define_flags() -> Callable[[], Cluster]:
  """Defines the flags of a cluster and returns a function that reads them once they are parsed."""
  holders = (
    flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0; launchers that JAX knows need none.'),
    flags.DEFINE_integer('num_processes', None, 'How many processes run this command; 1 looks for no others.', 1),
    flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0.', 0),
    flags.DEFINE_integer('startup_timeout', 300, 'Seconds within which all processes must have joined.', 1),
    flags.DEFINE_integer('peer_timeout', 100, 'Seconds of silence after which a process counts as gone.', 1),
  )
  return lambda: Cluster(*(holder.value for holder in holders))


def sees_its_own_gpus(environment: Mapping[str, str]) -> bool:
  """Whether all GPUs that a process sees are its own: it is alone on its node, or is bound to one GPU.

  By default JAX takes the GPU with the process's number on its node: it expects a process per GPU, each of which sees
  all. A process per node would leave GPUs idle, and a process bound to its GPU has no GPU of that number.
  """
  visible = environment.get('CUDA_VISIBLE_DEVICES', environment.get('ROCR_VISIBLE_DEVICES', ''))
  if visible and ',' not in visible:
    return True
  if 'OMPI_COMM_WORLD_LOCAL_SIZE' in environment:
    return environment['OMPI_COMM_WORLD_LOCAL_SIZE'] == '1'
  # '1(x4)' is one on each of four nodes, '2,1' two and one.
  return bool(re.fullmatch(r'1(\(x\d+\))?', environment.get('SLURM_STEP_TASKS_PER_NODE', '')))


def check_nobody_else(environment: Mapping[str, str]) -> None:
  """Raises UserError when a launcher started several processes and JAX found no coordinator.

  Each would train the whole run, in the same workdir.
  """
  for name, remedy in _LAUNCHERS.items():
    value = environment.get(name, '')
    if value and not (name in _COUNTS and value == '1'):
      raise UserError(
        f'{name}={value} speaks of several processes, and this one finds no others: {remedy}; '
        'or, if it is alone, --num_processes=1'
      )
