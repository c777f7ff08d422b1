"""A server on loopback that speaks the Hugging Face Hub's API, as far as downloads and one upload need it."""

import base64
from collections.abc import Iterator
import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

COMMIT = 'c0ffee' + '0' * 34
TOKEN = 'hf_secret'


class Hub(http.server.ThreadingHTTPServer):
  """Serves folders of models; what is uploaded comes into `uploaded`, by name and path."""

  def __init__(self, models: dict[str, pathlib.Path]):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.models = models
    self.gated: set[str] = set()
    self.cuts = 0  # downloads that are still to break off in the middle
    self.down = False
    self.uploaded: dict[str, dict[str, bytes]] = {}
    self.blobs: dict[str, bytes] = {}

  @property
  def address(self) -> str:
    return f'http://127.0.0.1:{self.server_port}'

  @contextlib.contextmanager
  def running(self) -> Iterator['Hub']:
    threading.Thread(target=self.serve_forever, daemon=True).start()
    yield self
    self.shutdown()
    self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def log_message(self, *_: object) -> None:
    pass

  def answer(self, code: int, body: object = b'', head: dict[str, str] | None = None) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    self.send_response(code)
    for name, value in {'Content-Length': str(len(data)), **(head or {})}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(data)

  def do_GET(self) -> None:
    path = urllib.parse.urlsplit(self.path).path
    if path == '/api/whoami-v2':
      return self.answer(200, {'name': 'me'}) if self.headers['Authorization'] else self.answer(401)
    found = re.match(r'/(?:api/models/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)', path)
    if self.server.down or not found:
      return self.answer(503 if self.server.down else 404)
    name, action, revision, file = found.groups()
    if name in self.server.gated and self.headers['Authorization'] != f'Bearer {TOKEN}':
      return self.answer(401, head={'X-Error-Code': 'GatedRepo'})
    if name not in self.server.models:
      return self.answer(401, head={'X-Error-Code': 'RepoNotFound'})
    if revision not in ('main', 'v1', COMMIT):
      return self.answer(404, head={'X-Error-Code': 'RevisionNotFound'})
    folder = self.server.models[name]
    if action == 'revision':
      return self.answer(200, {'id': name, 'sha': COMMIT, 'siblings': []})
    if action == 'tree':
      files = [path for path in sorted(folder.rglob('*')) if path.is_file()]
      return self.answer(200, [self.entry(path, folder) for path in files])
    self.send_file((folder / file).read_bytes())

  do_HEAD = do_GET

  def entry(self, path: pathlib.Path, folder: pathlib.Path) -> dict[str, object]:
    data = path.read_bytes()
    return {'type': 'file', 'path': str(path.relative_to(folder)), 'size': len(data), 'oid': _digest(data)}

  def send_file(self, data: bytes) -> None:
    start = int((re.match(r'bytes=(\d+)', self.headers['Range'] or '') or [0, 0])[1])
    head = {'ETag': f'"{_digest(data)}"', 'X-Repo-Commit': COMMIT, 'Accept-Ranges': 'bytes'}
    if start:
      head['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
    if self.command == 'GET' and self.server.cuts and len(data) > 10_000:
      self.server.cuts -= 1
      self.send_response(200)
      for name, value in (head | {'Content-Length': str(len(data))}).items():
        self.send_header(name, value)
      self.end_headers()
      self.wfile.write(data[: len(data) // 2])
      self.close_connection = True
      return
    self.answer(206 if start else 200, data[start:], head)

  def do_POST(self) -> None:
    data, server = self.rfile.read(int(self.headers['Content-Length'] or 0)), self.server
    if self.headers['Authorization'] != f'Bearer {TOKEN}':
      return self.answer(401)
    if self.path == '/api/validate-yaml':
      return self.answer(200, {'errors': [], 'warnings': []})
    if self.path == '/api/repos/create':
      asked = json.loads(data)
      name = f'{asked.get("organization", "me")}/{asked["name"]}'
      if name.startswith('others/'):
        return self.answer(403, {'error': 'You may not'})
      server.uploaded.setdefault(name, {})
      return self.answer(200, {'url': f'{server.address}/{name}'})
    name = re.search(r'([^/]+/[^/.]+)(?:\.git/info|/preupload|/commit)', self.path)[1]
    if '/preupload/' in self.path:
      modes = [
        {'path': file['path'], 'uploadMode': 'lfs' if file['path'].endswith('.safetensors') else 'regular'}
        for file in json.loads(data)['files']
      ]
      return self.answer(200, {'files': [mode | {'shouldIgnore': False} for mode in modes]})
    if self.path.endswith('/objects/batch'):
      objects = [
        {**each, 'actions': {'upload': {'href': f'{server.address}/blobs/{each["oid"]}'}}}
        for each in json.loads(data)['objects']
      ]
      return self.answer(200, {'transfer': 'basic', 'objects': objects})
    for line in map(json.loads, data.splitlines()):  # the commit
      if line['key'] == 'file':
        server.uploaded[name][line['value']['path']] = base64.b64decode(line['value']['content'])
      if line['key'] == 'lfsFile':
        server.uploaded[name][line['value']['path']] = server.blobs[line['value']['oid']]
    self.answer(200, {'commitOid': COMMIT, 'commitUrl': f'{server.address}/{name}/commit/{COMMIT}', 'hookOutput': ''})

  def do_PUT(self) -> None:
    data = self.rfile.read(int(self.headers['Content-Length']))
    self.server.blobs[hashlib.sha256(data).hexdigest()] = data
    self.answer(200)


def _digest(data: bytes) -> str:
  return hashlib.sha1(data).hexdigest()
