"""A command where something is as it seldom is: python -m tests.staged SITUATION,... train.py --flag=value ..."""

import hashlib
import json
import os
import pathlib
import resource
import runpy
import signal
import socket
import sys
import time
import types

from jax._src.clusters import cloud_tpu_cluster, cluster, k8s_cluster

from tests import folder_bucket

PHASES = {
  'warm-up': ('groupvit_jax.train.run', 'jit_step'),
  'evaluation': ('groupvit_jax.eval.evaluator', 'Evaluator.evaluate'),
  'save': ('groupvit_jax.train.checkpoint', 'Checkpoints.save'),
}


def signal_in(phase: str, number: str) -> None:
  """This process sends itself a signal when it first comes to a phase, and has noticed it before it goes on."""
  module, name = PHASES[phase]
  owner = __import__(module, fromlist=['_'])
  *outer, name = name.split('.')
  for part in outer:
    owner = getattr(owner, part)
  original = getattr(owner, name)

  def signalled(*args, **kwargs):
    setattr(owner, name, original)
    result = original(*args, **kwargs)
    os.kill(os.getpid(), int(number))
    time.sleep(3)  # JAX looks every second
    return result

  setattr(owner, name, signalled)


def note_rows(folder: str) -> None:
  """Writes down the digests of the rows that this process takes, a line of JSON for each step, in a file of its own."""
  from groupvit_jax.train import loop

  read = loop.read_batches

  def noted(run, first_batch):
    for step, batch in enumerate(read(run, first_batch), start=first_batch + 1):
      rows = [
        hashlib.sha256(b''.join(part.tobytes() for part in row)).hexdigest()[:12]
        for row in zip(batch['image'], batch['tokens'])
      ]
      with (pathlib.Path(folder) / f'{os.getpid()}.rows').open('a') as file:
        file.write(json.dumps([step, rows]) + '\n')
      yield batch

  loop.read_batches = noted


def full_disk() -> None:
  """No file that this process writes can have more than a kilobyte."""
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def gke() -> None:
  """A pod of an indexed job, as the cluster's API describes it."""
  job = types.SimpleNamespace(
    metadata=types.SimpleNamespace(name='groupvit', labels={}), spec=types.SimpleNamespace(parallelism=2)
  )
  owner = types.SimpleNamespace(controller=True, kind='Job')
  pod = types.SimpleNamespace(
    metadata=types.SimpleNamespace(name='groupvit-0-abc', labels={'job-name': 'groupvit'}, owner_references=[owner]),
    spec=types.SimpleNamespace(subdomain='groupvit'),
  )
  api = types.SimpleNamespace(
    list_namespaced_pod=lambda namespace, field_selector: types.SimpleNamespace(items=[pod]),
    read_namespaced_job=lambda name, namespace: job,
  )
  client = types.SimpleNamespace(
    CoreV1Api=lambda: api, BatchV1Api=lambda: api, exceptions=types.SimpleNamespace(ApiException=OSError)
  )
  sys.modules['kubernetes'] = types.SimpleNamespace(
    config=types.SimpleNamespace(load_incluster_config=lambda: None), client=client
  )
  os.environ |= {'KUBERNETES_SERVICE_HOST': '10.0.0.1', 'HOSTNAME': 'groupvit-0'}
  socket.gethostbyname = lambda host: '127.0.0.1'
  k8s_cluster.K8sCluster._namespace = staticmethod(lambda: 'default')
  address = k8s_cluster.K8sCluster.get_coordinator_address  # which the runtime resolves beyond Python
  k8s_cluster.K8sCluster.get_coordinator_address = staticmethod(
    lambda **options: address(**options).replace('groupvit-0.groupvit', 'localhost')
  )


def tpu(worker: str) -> None:
  """A host of a TPU pod slice, as its metadata describe it."""
  os.environ.pop('TPU_SKIP_MDS_QUERY', None)
  serve_metadata(
    {'agent-worker-number': worker, 'worker-network-endpoints': 'x:0:127.0.0.1,y:1:127.0.0.2', 'tpu-env': ''}
  )


def serve_metadata(metadata: dict[str, str]) -> None:
  cloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = True
  cloud_tpu_cluster.get_metadata = lambda key: (metadata[key], 200)


SITUATIONS = {
  'signal': signal_in,
  'full-disk': full_disk,
  'gke': gke,
  'tpu': tpu,
  'bucket': folder_bucket.install,
  'rows': note_rows,
}


if __name__ == '__main__':
  for situation in sys.argv[1].split(','):
    name, *arguments = situation.split(':')
    SITUATIONS[name](*arguments)
  sys.argv = sys.argv[2:]
  sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
  runpy.run_path(sys.argv[0], run_name='__main__')
