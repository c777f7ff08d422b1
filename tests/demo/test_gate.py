"""The page's server on loopback: other sites, other routes, and requests that no page sends."""

import concurrent.futures
import contextlib
import http.client
import json
import pathlib
import random
import socket
from typing import NamedTuple
import urllib.parse

import jax
import pytest

from groupvit_jax.demo import gate
from groupvit_jax.demo.examples import Example
from groupvit_jax.demo.page import build_page
from groupvit_jax.demo.server import launch
from groupvit_jax.demo.viewer import Viewer
from groupvit_jax.predictor import Predictor
from groupvit_jax.running import sharding
from tests.demo import test_demo
from tests.fuzz.mutations import mutate
from tests.photos import encode, photo
from tests.tiny import Letters, tiny_model
from tests.weights import random_variables

SESSION = 'abcdefghijk'
pytestmark = pytest.mark.filterwarnings('default::DeprecationWarning')  # Gradio's own, in this process


class Server(NamedTuple):
  """A page that is served."""

  address: str  # host:port
  uploads: pathlib.Path
  events: dict[str, int]  # name of a handler -> its number

  def ask(self, method: str, path: str, body: bytes = b'', **headers: str) -> tuple[int, bytes]:
    """Status of an answer and the first bytes of it; streams are left early."""
    connection = http.client.HTTPConnection(self.address, timeout=60)
    try:
      connection.request(method, path, body, headers)
      answer = connection.getresponse()
      streams = (answer.getheader('content-type') or '').startswith('text/event-stream')
      return answer.status, b'' if streams else answer.read()
    finally:
      connection.close()

  def call(self, event: str, *data: object, route: str = 'queue/join', **changes: object) -> int:
    """Status of a call."""
    body = dict(data=data, fn_index=self.events[event], session_hash=SESSION, trigger_id=5) | changes
    return self.ask('POST', f'/gradio_api/{route}', json.dumps(body).encode())[0]

  def upload(self, data: bytes, name: str = 'a.png') -> tuple[int, bytes]:
    """Uploads a file, as browsers do."""
    return self.ask('POST', '/gradio_api/upload', form(data, name), **FORM)

  def result(self, path: str | None, words: str, session: str = SESSION) -> list[object]:
    """What the page shows after a click on its button."""
    picture = path and {'path': path, 'orig_name': 'a.png', 'meta': {'_type': 'gradio.FileData'}}
    assert self.call('segment', picture, words, 0, 0.5, 1, None, session_hash=session) == 200
    connection = http.client.HTTPConnection(self.address, timeout=60)
    with contextlib.closing(connection):
      connection.request('GET', f'/gradio_api/queue/data?session_hash={session}')
      for line in connection.getresponse():
        if b'process_completed' in line:
          message = json.loads(line.removeprefix(b'data: '))
          assert message['success'], message
          return message['output']['data']


FORM = {'content-type': 'multipart/form-data; boundary=b'}


def form(data: bytes, name: str) -> bytes:
  head = f'--b\r\ncontent-disposition: form-data; name="files"; filename="{name}"\r\ncontent-type: image/png\r\n\r\n'
  return head.encode() + data + b'\r\n--b--\r\n'


@pytest.fixture(scope='module')
def server(tmp_path_factory) -> Server:
  """The page of a tiny model; uploads of a megabyte."""
  uploads, example = tmp_path_factory.mktemp('visitors'), tmp_path_factory.mktemp('examples') / 'a.png'
  example.write_bytes(encode(photo(20, 20), 'PNG'))
  model, mesh = tiny_model(), sharding.make_mesh(devices=jax.devices()[:1])
  viewer = Viewer(Predictor(model, random_variables(model), Letters(), mesh), num_stages=2, max_pixels=10_000)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('GRADIO_TEMP_DIR', str(uploads))
    page = build_page(viewer, [Example(str(example), 'dog')], 'about')
    address = launch(page, uploads, host='127.0.0.1', port=0, max_upload_mb=1)
    events = {fn.name: index for index, fn in page.fns.items() if fn.fn}
    yield Server(urllib.parse.urlsplit(address).netloc, uploads, events)
    page.close()


def test_other_sites_are_refused(server):
  port = server.address.rpartition(':')[2]
  for host in (f'localhost:{port}', '127.0.0.1', f'[::1]:{port}'):
    assert server.ask('GET', '/', host=host)[0] == 200
    assert server.ask('GET', '/', host=host, origin=f'http://{host}')[0] == 200
  for host in (f'rebound.example:{port}', '192.168.1.9', '', 'localhost.example', 'localhost/', '[::1'):
    status, text = server.ask('GET', '/', host=host)
    assert status == 403 and b'see --host' in text, host
  for origin in ('http://evil.example', 'null', f'http://127.0.0.1:{int(port) + 1}', 'http://127.0.0.1'):
    assert server.ask('POST', '/gradio_api/upload', form(b'x', 'a'), **FORM, origin=origin)[0] == 403, origin


def test_a_host_that_stands_for_all():
  """0.0.0.0 is asked for by addresses and this machine's names; a name that is led here is another's."""
  for host in ('10.1.2.3:80', '[fe80::1]', socket.gethostname(), 'localhost'):
    gate.check_origin('0.0.0.0', [host], [f'http://{host}'])
  gate.check_origin('demo.example', ['Demo.Example'], ['https://demo.example'])
  for host in ('rebound.example', 'demo.example', '999.1.1.1'):
    with pytest.raises(gate.Refused):
      gate.check_origin('0.0.0.0', [host], [])
  with pytest.raises(gate.Refused):
    gate.check_origin('127.0.0.1', ['localhost', 'localhost'], [])


def test_requests_that_no_page_sends(server):
  """Routes, sessions, events and values that Gradio takes and the page does not send; sizes beyond the limits."""
  assert server.ask('GET', '/')[0] == server.ask('GET', '/config')[0] == 200
  for path in (
    '/docs',
    '/gradio_api/info',
    '/monitoring',
    '/gradio_api/vibe-code',
    '/gradio_api/deep_link?session_hash=a',
  ):
    assert server.ask('GET', path)[0] == 404, path
  for path in ('/etc/passwd', f'{server.uploads}/../x', f'{server.uploads}/{"0" * 64}/..', 'http://127.0.0.1/'):
    assert server.ask('GET', f'/gradio_api/file={path}')[0] in (403, 404), path
    picture = {'path': path, 'url': path, 'orig_name': 'a', 'meta': {'_type': 'gradio.FileData'}}
    assert server.call('segment', picture, 'dog', 0, 0.5, 1, None) == 422
  for method, path in (('GET', 'heartbeat/...'), ('GET', 'queue/data?session_hash=...'), ('POST', 'component_server')):
    assert server.ask(method, f'/gradio_api/{path}')[0] == 404
  good = ('segment', None, 'dog', 0, 0.5, 1, None)
  for changes in ({'session_hash': '...'}, {'session_hash': 5}, {'fn_index': 10**9}, {'fn_index': True}, {'data': {}}):
    for route in ('queue/join', 'run/predict'):
      assert server.call(*good, route=route, **changes) == 422, changes
  words, cuts = (5, None, 'x' * 5001, '\ud800'), (float('nan'), 2, -1, True, '0', None)
  for data in (*(('words', value) for value in words), *(('cut', value) for value in cuts)):
    values = dict(words='dog', cut=0) | dict([data])
    assert server.call('segment', None, values['words'], values['cut'], 0.5, 1, None) == 422, data
  assert server.call('draw', 0.5) == server.call('draw', 0.5, None, None) == 422
  assert server.ask('POST', '/gradio_api/queue/join', b'[' * 2**15)[0] == 422
  assert server.ask('POST', '/gradio_api/queue/join', b' ' * 2**17)[0] == 413
  assert server.upload(bytes(2**20 + 1))[0] == 413
  for body in (
    b'',
    form(b'', 'a'),
    form(b'x', 'a').replace(b'files', b'other'),
    form(b'x', 'a').removesuffix(b'--b--\r\n') + form(b'x', 'a'),
    form(b'x', 'a')[:-9],
  ):
    assert server.ask('POST', '/gradio_api/upload', body, **FORM)[0] == 400, body
  assert server.ask('POST', '/gradio_api/upload', form(b'x', 'a'))[0] == 400


# What dragging a file from elsewhere onto the page does.
DROP = """data => {
  const files = new DataTransfer();
  files.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], 'dropped.png', {type: 'image/png'}));
  return files;
}"""


def test_a_dropped_image_and_its_stages_in_a_browser(server):
  with test_demo.opened(f'http://{server.address}/') as page:
    page.locator('#words textarea').fill('dog, cat, grass')
    files = page.evaluate_handle(DROP, test_demo.encoded(photo(60, 90)))
    page.locator('#picture button:has(input[type=file])').dispatch_event('drop', {'dataTransfer': files})
    test_demo.changed(page, '')
    final = page.locator('#groups img').get_attribute('src')
    page.locator('#stage input[type=number]').fill('1')
    page.wait_for_function("old => document.querySelector('#groups img').src !== old", arg=final)
    with page.expect_download() as download:
      page.locator('#report').click()
    report = json.loads(download.value.path().read_text())
    assert report['picture'] == 'dropped.png' and {row['name'] for row in report['classes']} == {'dog', 'cat', 'grass'}


def test_a_random_request_breaks_nothing(server):
  """Mutations of all that a page sends: no answer of 500 and above, none that hangs; then the page works."""
  status, answer = server.upload(encode(photo(30, 40), 'PNG'))
  assert status == 200
  picture = {'path': json.loads(answer)[0], 'orig_name': 'a.png', 'meta': {'_type': 'gradio.FileData'}}
  call = lambda **changes: json.dumps(dict(fn_index=server.events['segment'], session_hash='zz') | changes).encode()
  requests = [
    (b'GET', b'/', b'', b''),
    (b'GET', b'/theme.css?v=1', b'', b''),
    (b'GET', b'/static/js/iframeResizer.contentWindow.min.js', b'', b''),
    (b'GET', b'/gradio_api/heartbeat/abc', b'', b''),
    (b'GET', b'/gradio_api/queue/data?session_hash=zz', b'', b''),
    (b'GET', f'/gradio_api/file={picture["path"]}'.encode(), b'', b''),
    (b'POST', b'/gradio_api/upload?upload_id=abc', b'multipart/form-data; boundary=b', form(b'x', 'a.png')),
    (b'POST', b'/gradio_api/queue/join', b'application/json', call(data=[picture, 'dog', 0, 0.5, 1, None])),
    (b'POST', b'/gradio_api/run/predict', b'application/json', call(data=[0], fn_index=0)),
  ]
  rng = random.Random(0)

  def ask(number: int) -> tuple[bytes, int]:
    draw = random.Random(number)
    parts = list(draw.choice(requests))
    for _ in range(draw.choice((1, 1, 2))):
      at = draw.randrange(4)
      parts[at] = mutate(parts[at], draw)
    method, path, kind, body = parts
    raw = b'%s %s HTTP/1.1\r\nhost: %s\r\ncontent-type: %s\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s' % (
      method, path, server.address.encode(), kind, len(body), body,
    )  # fmt: skip
    host, port = server.address.split(':')
    with socket.create_connection((host, int(port)), timeout=20) as connection:
      connection.sendall(raw)
      return raw, int(connection.recv(12)[9:12])

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(ask, [rng.randrange(2**32) for _ in range(150)]))
  assert {raw: status for raw, status in answers if status >= 500} == {}
  assert {200, 400, 404, 422} <= {status for _, status in answers}
  message, *_, mask, report = server.result(picture['path'], 'dog, cat')
  assert message == '' and all(pathlib.Path(file['value']['path']).is_file() for file in (mask, report))
  assert {len(path.name) for path in server.uploads.iterdir()} == {64}  # no part of a file is left
