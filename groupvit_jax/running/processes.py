"""Multi-process start-up and shutdown.

Initialises jax.distributed, checks that all processes run the same code and configuration, and ends a process whose
peers are gone.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import faulthandler
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
import traceback

from etils import epath
from flax import traverse_util
import jax
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import orbax.checkpoint as ocp

from groupvit_jax import cli
from groupvit_jax.errors import UserError
from groupvit_jax.running.cluster import check_nobody_else, Cluster, sees_its_own_gpus

# What a collective or a barrier reports when one of its processes is gone.
_PEER_LOST = re.compile('gloo|nccl|connection|socket|unavailable|deadline|heartbeat|coordination|barrier', re.I)
_RESUME = 'start all processes again with the same command: it resumes from the last checkpoint'
_DAY_MS = 24 * 60 * 60 * 1000  # a lost process ends a barrier long before

_barrier_ids = itertools.count()


def run(cluster: Cluster, metadata: Mapping[str, str], main: Callable[[], int], *, saves: bool) -> int:
  """Joins the run's other processes, if there are any, and returns the exit code of `main`.

  With several processes an error ends this one at once, because an orderly exit would wait for the others.

  Args:
    cluster: the processes of the run.
    metadata: what must be equal in all processes, by name. Of a JSON object the error names the entries that differ.
    main: the command.
    saves: whether `main` saves at SIGTERM and asks `Interrupts` after every step. Then JAX handles the signal;
      otherwise SIGTERM ends the process.

  Raises:
    UserError: `cluster` has a mistake, or there is but this process and `main` raises it.
  """
  cluster.check()
  jax.config.update('jax_enable_preemption_service', saves)
  with _startup_deadline(cluster):
    _initialize_distributed(cluster)
    if jax.distributed.is_initialized():
      _exit_on_error(lambda: _check_same_run(metadata))
  return main() if jax.process_count() == 1 else _exit_on_error(main)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
  """Runs its body in process 0 and then in the others, which find what it has written."""
  if jax.process_index() > 0:
    barrier('first process')
  yield
  if jax.process_index() == 0:
    barrier('first process')


def barrier(name: str) -> None:
  """Waits for all processes, for as long as they need; a collective gives up, on CPUs after 30 s."""
  if jax.process_count() > 1:
    ocp.multihost.get_barrier_sync_fn()(key=f'{name}-{next(_barrier_ids)}', timeout_ms=_DAY_MS)


def all_gather_objects(value: object) -> list:
  """Returns the values (JSON and nan) of all processes, in their order; every process must call it."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(data), np.int32))
  padded = np.zeros(lengths.max(), np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths)]


def describe_single_process() -> str:
  """Returns the table of a process that is alone; several print theirs at start-up."""
  return _table([_describe_process({})])


def enable_compilation_cache(folder: epath.PathLike) -> None:
  """Keeps programs that take a second to compile in a folder, for restarts.

  The first program creates the folder. JAX_COMPILATION_CACHE_DIR takes precedence.
  """
  if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return
  jax.config.update('jax_compilation_cache_dir', str(epath.Path(folder)))
  compilation_cache.reset_cache()  # JAX reads the folder once, and may have done so before


def _initialize_distributed(cluster: Cluster) -> None:
  """Starts `jax.distributed`, unless this process is alone."""
  if cluster.alone:
    return
  given = (cluster.coordinator, cluster.num_processes, cluster.process_id)
  print_aborting_stack_only()
  try:
    jax.distributed.initialize(
      *given,
      # At its own deadline JAX aborts. Ours comes first and explains.
      initialization_timeout=cluster.startup_timeout + 60,
      heartbeat_timeout_seconds=cluster.peer_timeout,
      shutdown_timeout_seconds=cluster.peer_timeout,
      cluster_detection_method='deactivate' if None not in given else None,
    )
  except ValueError as error:
    if given != (None, None, None):
      raise UserError(
        'no launcher says the rest (SLURM, Open MPI, Kubernetes and TPU pods would), so give all of --coordinator, '
        '--num_processes and --process_id'
      ) from error
    check_nobody_else(os.environ)  # neither flags nor a launcher: one machine
    return
  except RuntimeError as error:
    raise UserError(f'several processes cannot start: {error}; for one alone use --num_processes=1') from error
  if sees_its_own_gpus(os.environ):
    for platform in ('cuda', 'rocm'):
      jax.config.update(f'jax_{platform}_visible_devices', 'all')


def print_aborting_stack_only() -> None:
  """Lets an aborted process print the Python stack of the aborting thread only.

  The runtime aborts a process whose peer is gone, from a thread of its own. absl's handler would print the stacks of
  all threads while they change. That may fault, and launchers do not take SIGSEGV for a lost process.
  """
  faulthandler.enable(all_threads=False)


@contextlib.contextmanager
def _startup_deadline(cluster: Cluster) -> Iterator[None]:
  """Ends the process with one line when its body takes longer than the start-up timeout."""

  def end():
    cli.fail(f'{_explain_timeout(cluster)} (--startup_timeout={cluster.startup_timeout})')
    _exit_now(cli.EXIT_PEER_LOST)

  timer = threading.Timer(cluster.startup_timeout, end)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _explain_timeout(cluster: Cluster) -> str:
  count, address = cluster.num_processes or 'the', cluster.coordinator
  missing = f'not all of {count} processes came; look for the one that is missing, or ended: its output says why'
  if address is None or cluster.process_id == 0:
    return missing
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), timeout=2).close()
  except socket.gaierror:
    return f'no host is called {host}; correct --coordinator={address}'
  except OSError as error:
    return (
      f'nobody answers at --coordinator={address} ({error.strerror or error}); it must name the host of process '
      '0 as this one sees it, and a port that no firewall closes'
    )
  return missing


def _check_same_run(metadata: Mapping[str, str]) -> None:
  """Raises UserError where processes differ; process 0 prints the table of all."""
  counts = [sum(device.process_index == i for device in jax.devices()) for i in range(jax.process_count())]
  if len(set(counts)) > 1:
    raise UserError(f'processes have different numbers of devices: {counts}; give each the same')
  barrier('devices')
  everyone = all_gather_objects(_describe_process(metadata))
  for i, other in enumerate(everyone):
    if differences := _differences(everyone[0]['metadata'], other['metadata']):
      raise UserError(
        f'process 0 ({everyone[0]["host"]}) and process {i} ({other["host"]}) would not run the same: '
        f'{"; ".join(differences)}; start all with the same code and flags'
      )
  if jax.process_index() == 0:
    print(_table(everyone), file=sys.stderr, flush=True)


def _describe_process(metadata: Mapping[str, str]) -> dict[str, object]:
  devices = jax.local_devices()
  versions = {'jax': jax.__version__, 'jaxlib': importlib.metadata.version('jaxlib'), 'code': _code_digest()}
  return {
    'host': socket.gethostname(),
    'devices': len(devices),
    'kind': devices[0].device_kind,
    'metadata': versions | dict(metadata),
  }


def _code_digest() -> str:
  """Returns a hash of this package's source files."""
  digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
  for path in sorted(root.rglob('*.py')):
    digest.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
  return digest.hexdigest()[:12]


def _differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
  """Returns a phrase for each entry in which two processes' metadata differ."""
  here, there = (
    traverse_util.flatten_dict(
      {name: json.loads(value) if value.startswith('{') else value for name, value in metadata.items()}, sep='.'
    )
    for metadata in (first, other)
  )
  return [
    f'{key} is {here.get(key)} in one and {there.get(key)} in the other'
    for key in sorted(here.keys() | there.keys())
    if here.get(key) != there.get(key)
  ]


def _table(everyone: list[dict[str, object]]) -> str:
  hosts = {member['host'] for member in everyone}
  devices = sum(member['devices'] for member in everyone)
  if len(everyone) == 1:
    return f'1 process with {devices} x {everyone[0]["kind"]}'
  lines = [f'{len(everyone)} processes on {len(hosts)} host(s), {devices} devices', 'process  devices  host']
  lines += [f'{i:7}  {member["devices"]} x {member["kind"]}  {member["host"]}' for i, member in enumerate(everyone)]
  return '\n'.join(lines)


def _exit_on_error(main: Callable[[], object]) -> object:
  """Returns the result of `main`; an error ends this process without waiting for the others."""
  try:
    return main()
  except BaseException as error:
    if lost := _lost_peer(error):
      cli.fail(f'another process of the run is gone ({lost[:200]}); {_RESUME}')
      _exit_now(cli.EXIT_PEER_LOST)
    if cli.is_mistake(error):
      _exit_now(cli.fail(error))
    traceback.print_exc()
  _exit_now(1)


def _lost_peer(error: BaseException | None) -> str | None:
  """Returns the message of the collective or barrier that missed a process, where that led to `error`."""
  while error is not None:
    if isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)):
      return str(error).splitlines()[0]
    error = error.__cause__ or error.__context__
  return None


def _exit_now(code: int) -> None:
  """Ends the process without the orderly exit."""
  time.sleep(1)  # the coordinator ends last, so that the others can print their line
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
