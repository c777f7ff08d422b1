"""Several processes become one run: they meet, agree on what they run, and end together."""

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
import jax
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import orbax.checkpoint as ocp

from groupvit_jax import cli
from groupvit_jax.errors import UserError
from groupvit_jax.running.cluster import check_nobody_else, Cluster, sees_its_own_gpus

# What a collective or a barrier says when one of its processes is gone.
_PEER_LOST = re.compile('gloo|nccl|connection|socket|unavailable|deadline|heartbeat|coordination|barrier', re.I)
_GOES_ON = 'start all processes again with the same command: it goes on from the last checkpoint'
_DAY_MS = 24 * 60 * 60 * 1000  # a process that is gone ends a meeting long before

_barrier_ids = itertools.count()


def run(cluster: Cluster, metadata: Mapping[str, str], main: Callable[[], int], *, saves: bool) -> int:
  """Joins the run's other processes, if there are any, and calls `main`.

  Args:
    cluster: what was said about them.
    metadata: what must be the same in all, by name; of JSON the entries that differ are named.
    main: the command.
    saves: whether `main` saves at SIGTERM, for which it must ask after every step, as `Interrupts` does: then JAX takes
      the signal. Otherwise it ends the process.

  Returns:
    The exit code. With several processes an error does not come back: the process ends, because at an orderly exit it
    would wait for the others.

  Raises:
    ValueError: `cluster` has a mistake, or this process alone met one.
  """
  cluster.check()
  jax.config.update('jax_enable_preemption_service', saves)
  with _deadline(cluster):
    _initialize_distributed(cluster)
    if jax.distributed.is_initialized():
      _exit_on_error(lambda: _check_same_run(metadata))
  return main() if jax.process_count() == 1 else _exit_on_error(main)


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
  """What is inside happens in process 0, and after it in the others: they find what it has written."""
  if jax.process_index() > 0:
    barrier('first process')
  yield
  if jax.process_index() == 0:
    barrier('first process')


def barrier(where: str) -> None:
  """Waits until all processes have come, however long it takes; a collective gives up, on CPUs after 30 s."""
  if jax.process_count() > 1:
    ocp.multihost.get_barrier_sync_fn()(key=f'{where}-{next(_barrier_ids)}', timeout_ms=_DAY_MS)


def true_in_all_processes(value: bool) -> bool:
  """Whether `value` is true in every process; all of them must ask."""
  return bool(np.all(multihost_utils.process_allgather(np.array(value))))


def all_gather_objects(value: object) -> list:
  """Every process's value, in the order of the processes; all of them must ask, and all get the same.

  Args:
    value: what JSON can hold, nan included.
  """
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(data), np.int32))
  padded = np.zeros(lengths.max(), np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [json.loads(bytes(row[:length])) for row, length in zip(rows, lengths)]


def describe_single_process() -> str:
  """The table of a process that is alone; several print theirs when they meet."""
  return _table([_describe_process({})])


def enable_compilation_cache(folder: epath.PathLike) -> None:
  """Keeps programs that take a second to compile in a folder, so that a restart need not compile them again.

  JAX finds a program by what it computes, the versions of JAX and its compiler, and the kind and number of devices. The
  first program creates the folder. JAX_COMPILATION_CACHE_DIR takes precedence.
  """
  if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return
  jax.config.update('jax_compilation_cache_dir', str(epath.Path(folder)))
  compilation_cache.reset_cache()  # JAX asks once, and may have done so before


def _initialize_distributed(cluster: Cluster) -> None:
  """Starts `jax.distributed`, unless this process is alone."""
  if cluster.alone:
    return
  told = (cluster.coordinator, cluster.num_processes, cluster.process_id)
  print_aborting_stack_only()
  try:
    jax.distributed.initialize(
      *told,
      # JAX itself ends in an abort. It comes second.
      initialization_timeout=cluster.startup_timeout + 60,
      heartbeat_timeout_seconds=cluster.peer_timeout,
      shutdown_timeout_seconds=cluster.peer_timeout,
      cluster_detection_method='deactivate' if None not in told else None,
    )
  except ValueError as error:
    if told != (None, None, None):
      raise UserError(
        'no launcher says the rest (SLURM, Open MPI, Kubernetes and TPU pods would), so give all of --coordinator, '
        '--num_processes and --process_id'
      ) from error
    check_nobody_else(os.environ)  # neither told nor found: a laptop
    return
  except RuntimeError as error:
    raise UserError(f'several processes cannot start: {error}; for one alone use --num_processes=1') from error
  if sees_its_own_gpus(os.environ):
    for platform in ('cuda', 'rocm'):
      jax.config.update(f'jax_{platform}_visible_devices', 'all')


def print_aborting_stack_only() -> None:
  """Lets a process that is aborted print the Python stack of the thread that aborts, and of no other.

  The runtime aborts a process whose peer is gone, from a thread of its own. absl's handler prints every thread's stack
  then, while they change: it may fault, and SIGSEGV is not what a launcher takes for a lost process.
  """
  faulthandler.enable(all_threads=False)


@contextlib.contextmanager
def _deadline(cluster: Cluster) -> Iterator[None]:
  """Ends the process with one line when what is inside takes longer than the start-up may."""

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
  """What can be found out about a start-up that did not end."""
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
  """Compares what the processes are about to run, and prints the table of them."""
  counts = [sum(device.process_index == i for device in jax.devices()) for i in range(jax.process_count())]
  if len(set(counts)) > 1:
    raise UserError(f'processes have different numbers of devices: {counts}; give each the same')
  barrier('devices')
  everyone = all_gather_objects(_describe_process(metadata))
  for i, other in enumerate(everyone):
    differences = _differences(everyone[0]['metadata'], other['metadata'])
    if differences:
      raise UserError(
        f'process 0 ({everyone[0]["host"]}) and process {i} ({other["host"]}) would not run the same: '
        + '; '.join(differences)
        + '; start all with the same code and flags'
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
  """A name for the contents of this package's source files."""
  digest, root = hashlib.sha256(), pathlib.Path(__file__).parents[1]
  for path in sorted(root.rglob('*.py')):
    digest.update(f'{path.relative_to(root)}\n'.encode() + path.read_bytes())
  return digest.hexdigest()[:12]


def _differences(first: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
  """What differs between two processes' metadata, each in a few words."""
  found = []
  for name in first | other:
    here, there = (_flatten(name, metadata.get(name)) for metadata in (first, other))
    found += [
      f'{key} is {here.get(key)} in one and {there.get(key)} in the other'
      for key in sorted(here.keys() | there.keys())
      if here.get(key) != there.get(key)
    ]
  return found


def _flatten(name: str, value: object) -> dict[str, object]:
  """A fact, or each entry of one that is a JSON object."""
  if value is None:  # the process has no such fact
    return {}
  if isinstance(value, str) and value.startswith('{'):
    value = json.loads(value)
  if not isinstance(value, dict):
    return {name: value}
  return {path: leaf for key, child in value.items() for path, leaf in _flatten(f'{name}.{key}', child).items()}


def _table(everyone: list[dict[str, object]]) -> str:
  hosts = {member['host'] for member in everyone}
  devices = sum(member['devices'] for member in everyone)
  lines = [f'{len(everyone)} process(es) on {len(hosts)} host(s), {devices} device(s)', 'process  devices  host']
  lines += [f'{i:7}  {member["devices"]} x {member["kind"]}  {member["host"]}' for i, member in enumerate(everyone)]
  return '\n'.join(lines)


def _exit_on_error(main: Callable[[], object]) -> object:
  """Calls `main`; whatever it raises ends this process, and does not wait for others that wait for it."""
  try:
    return main()
  except BaseException as error:
    if lost := _lost_peer(error):
      cli.fail(f'another process of the run is gone ({lost[:200]}); {_GOES_ON}')
      _exit_now(cli.EXIT_PEER_LOST)
    if cli.is_mistake(error):
      _exit_now(cli.fail(error))
    traceback.print_exc()
  _exit_now(1)


def _lost_peer(error: BaseException | None) -> str | None:
  """What a collective or a barrier said that misses a process, when that is why `error` was raised."""
  while error is not None:
    if isinstance(error, RuntimeError) and _PEER_LOST.search(str(error)):
      return str(error).splitlines()[0]
    error = error.__cause__ or error.__context__
  return None


def _exit_now(code: int) -> None:
  """Ends the process without the orderly exit."""
  time.sleep(1)  # the coordinator goes last, so that the others can say their line
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
