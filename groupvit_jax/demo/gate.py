"""The gate before Gradio: refuses requests of other sites, unused routes, and values that the page cannot send."""

from collections.abc import Sequence
import contextlib
import ipaddress
import json
import pathlib
import re
import socket
from typing import Any

import gradio as gr
from gradio import processing_utils
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SESSION, _HASH = '[a-z0-9]{1,32}', '[0-9a-f]{64}'  # a browser's name for itself, Gradio's for a file's contents
_CALL = r'/gradio_api/(?:queue/join|run/predict)'
_UPLOAD = r'/gradio_api/upload'
_LOOPBACK = ('localhost', '127.0.0.1', '::1')
_MAX_CALL = 2**16  # bytes of a call: longer than the longest class names
_LONGEST_NAME = 100  # letters of a file's name that are shown
_MAX_UPLOADS = 100  # files of the largest size that are kept at a time; Gradio deletes old ones every hour


class Refused(Exception):
  """A request is refused, with a status below 500 and a line that says why."""

  def __init__(self, status: int, line: str):
    super().__init__(line)
    self.status = status


class Gate:
  """An ASGI middleware that lets through what the page itself sends."""

  def __init__(self, app: ASGIApp, *, host: str, uploads: pathlib.Path, max_upload: int, page: gr.Blocks):
    """Guards Gradio's app at an address (see `check_origin`), with a folder of visitors' files of so many bytes."""
    self._app, self._host, self._uploads, self._max_upload, self._page = app, host, uploads, max_upload, page
    gets = (
      r'(?:/|/config|/theme\.css|/favicon\.ico|/manifest\.json|/(?:static|assets|svelte)(?:/[\w+-][\w.+-]*)+)\?[\w=&.-]*',
      rf'/gradio_api/(?:heartbeat/{_SESSION}|file={_file_pattern(uploads)}|startup-events)\?',
      rf'/gradio_api/queue/data\?session_hash={_SESSION}',
    )
    self._routes = dict(GET=gets, HEAD=gets, POST=(rf'{_CALL}\?', rf'{_UPLOAD}\?.*'))  # path and query

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a request, or hands it on."""
    if scope['type'] == 'lifespan':
      return await self._app(scope, receive, send)
    try:
      self._check_address(scope)
      app = {'GET': self._app, 'HEAD': self._app}.get(scope['method']) or (
        self._call if re.fullmatch(_CALL, scope['path']) else self._upload
      )
      await app(scope, receive, send)
    except Refused as error:
      await PlainTextResponse(str(error), error.status)(scope, receive, send)
    except ClientDisconnect:
      pass

  def _check_address(self, scope: Scope) -> None:
    """Raises Refused for a request that is not for this server, or not for a route of the page."""
    if scope['type'] != 'http':
      raise Refused(403, 'the page needs no websocket')
    headers = Headers(scope=scope)
    check_origin(self._host, headers.getlist('host'), headers.getlist('origin'))
    asked = f'{scope["path"]}?{scope["query_string"].decode("latin1")}'
    if not any(re.fullmatch(route, asked) for route in self._routes.get(scope['method'], ())):
      raise Refused(404, 'the page has no such address')

  async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Hands on a call of an event, after a check of its values."""
    request = Request(scope, receive)
    _check_length(request, _MAX_CALL)
    body = check_call(await request.body(), self._page, self._uploads)
    fixed = {b'content-type': b'application/json', b'content-length': b'%d' % len(body)}
    headers = [pair for pair in scope['headers'] if pair[0] not in fixed]
    messages = iter([{'type': 'http.request', 'body': body, 'more_body': False}])

    async def replay() -> Message:
      return next(messages, None) or await receive()

    await self._app(scope | {'headers': [*headers, *fixed.items()]}, replay, send)

  async def _upload(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Keeps a visitor's file, in place of Gradio: under no name that a client sends, and never a part of one."""
    request = Request(scope, receive)
    _check_length(request, self._max_upload + _MAX_CALL)
    if _bytes_in(self._uploads) > _MAX_UPLOADS * self._max_upload:
      raise Refused(429, 'there are too many files of visitors; try again in an hour')
    try:
      async with request.form(max_files=1, max_fields=0) as form:
        file = form.get('files')
        data = await file.read() if isinstance(file, UploadFile) else b''
    except HTTPException as error:
      raise Refused(400, error.detail) from error
    if not data:
      raise Refused(400, 'an upload is one file that is not empty')
    if len(data) > self._max_upload:
      raise Refused(413, f'a file here has at most {self._max_upload} bytes, the maximum allowed size')
    path = processing_utils.save_bytes_to_cache(data, 'image.png', str(self._uploads))
    self._page.upload_file_set.add(path)  # of those that Gradio deletes when they are old
    await JSONResponse([path])(scope, receive, send)


def check_origin(host: str, hosts: Sequence[str], origins: Sequence[str]) -> None:
  """Checks that a request is meant for this server, and comes from its own page or from no page.

  Another site's page can send requests here, and can have its own name resolve to this machine. The first shows in
  Origin, the second in Host.

  `host`, at which the server listens, may stand for all: then any address and this machine's names are let in. Raises
  Refused with 403.
  """
  match = re.fullmatch(r'(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d{1,5})?', hosts[0].lower()) if len(hosts) == 1 else None
  name = match and (match[1] or match[2])
  known = name in (*_LOOPBACK, host.lower())
  if name and not known and host in ('0.0.0.0', '::'):
    known = _is_address(name) or name in (socket.gethostname().lower(), socket.getfqdn().lower())
  if not known:
    raise Refused(403, f'this page is served at {host}, not under the name in the address; see --host')
  if any(origin.partition('://')[2].lower() != hosts[0].lower() for origin in origins):
    raise Refused(403, 'this page takes no requests from other pages')


def check_call(body: bytes, page: gr.Blocks, uploads: pathlib.Path) -> bytes:
  """Checks a call of an event of the page, which may name files in `uploads`; raises Refused with 422.

  Returns:
    JSON that holds what was checked and nothing else.
  """
  try:
    call = json.loads(body)
    values, index, session = call['data'], call['fn_index'], call['session_hash']
    inputs = page.fns[index].inputs if type(index) is int and page.fns[index].fn else None
    if inputs is None or not re.fullmatch(_SESSION, session):
      raise ValueError
    data = [_check_value(component, value, uploads) for component, value in zip(inputs, values, strict=True)]
  except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
    raise Refused(422, 'the page has no such event, or it takes other values') from error
  return json.dumps(dict(data=data, fn_index=index, session_hash=session)).encode()


def _check_value(component: gr.blocks.Block, value: Any, uploads: pathlib.Path) -> Any:
  """A value that a component may have. Raises ValueError or TypeError."""
  match component:
    case gr.State():  # the server's own
      return None
    case gr.Textbox() if type(value) is str and len(value) <= component.max_length:
      value.encode()  # half a surrogate pair is no text
      return value
    case gr.Slider() if type(value) in (int, float) and component.minimum <= value <= component.maximum:
      return value
    case gr.Dataset() if type(value) is int and 0 <= value < len(component.samples):
      return value
    case gr.Image() if value is None:
      return None
    case gr.Image():
      if re.fullmatch(_file_pattern(uploads), value['path']) and pathlib.Path(value['path']).is_file():
        return dict(path=value['path'], orig_name=_printable(value['orig_name']), meta={'_type': 'gradio.FileData'})
  raise ValueError


def _printable(text: str) -> str:
  """What of a text can be shown in a line."""
  return ''.join(filter(str.isprintable, text))[-_LONGEST_NAME:]


def _file_pattern(uploads: pathlib.Path) -> str:
  """A regular expression of the paths of visitors' files."""
  return rf'{re.escape(str(uploads))}/{_HASH}/[^/\0?]+'


def _check_length(request: Request, most: int) -> None:
  length = request.headers.get('content-length', '')
  if not length.isdecimal():
    raise Refused(411, 'a request here has a length')
  if int(length) > most:
    raise Refused(413, f'a request here has at most {most} bytes')


def _bytes_in(folder: pathlib.Path) -> int:
  total = 0
  for path in folder.rglob('*'):
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
      total += path.stat().st_size
  return total


def _is_address(name: str) -> bool:
  try:
    return bool(ipaddress.ip_address(name))
  except ValueError:
    return False
