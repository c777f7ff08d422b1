"""A web server over a folder that answers byte ranges, late on purpose: python -m benchmarks.range_server FOLDER"""

import argparse
import asyncio
from collections.abc import Iterator
import contextlib
import os
import threading

from aiohttp import web


class RangeServer:
  """Serves files of a folder on loopback.

  Attributes:
    delay: seconds added to every answer.
    requests: answers so far.
    most_at_once: requests there were in flight at the same time, at most.
    failures: answers that will be 503 instead, counted down.
    ranges: whether byte ranges are answered; otherwise the whole file is sent.
  """

  def __init__(self, folder: str, delay: float = 0.0):
    self.delay, self.requests, self.most_at_once, self.failures, self.ranges = delay, 0, 0, 0, True
    self._folder, self._at_once = folder, 0

  @contextlib.contextmanager
  def running(self) -> Iterator[str]:
    """Serves from a thread while the context lasts; gives the folder's address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = asyncio.run_coroutine_threadsafe(self._start(), loop).result()
    try:
      yield f'http://127.0.0.1:{runner.addresses[0][1]}'
    finally:
      asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result()
      loop.call_soon_threadsafe(loop.stop)
      thread.join()

  async def _start(self) -> web.AppRunner:
    app = web.Application()
    app.router.add_get('/{name:.+}', self._answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, '127.0.0.1', 0).start()
    return runner

  async def _answer(self, request: web.Request) -> web.StreamResponse:
    self.requests += 1
    self._at_once += 1
    self.most_at_once = max(self.most_at_once, self._at_once)
    try:
      await asyncio.sleep(self.delay)
      if self.failures:
        self.failures -= 1
        return web.Response(status=503)
      return self._read(f'{self._folder}/{request.match_info["name"]}', request.http_range)
    except FileNotFoundError:
      return web.Response(status=404)
    finally:
      self._at_once -= 1

  def _read(self, path: str, part: slice) -> web.StreamResponse:
    with open(path, 'rb') as file:
      if not self.ranges:
        return web.Response(body=file.read())
      if part.start is None or part.stop is None:
        return web.FileResponse(path)
      data = os.pread(file.fileno(), part.stop - part.start, part.start)  # at half of what FileResponse costs
      extent = f'bytes {part.start}-{part.start + len(data) - 1}/{os.fstat(file.fileno()).st_size}'
      return web.Response(status=206, body=data, headers={'Content-Range': extent})


def main() -> None:
  """Serves until it is killed; the address is the first line it prints."""
  parser = argparse.ArgumentParser()
  parser.add_argument('folder')
  parser.add_argument('--delay', type=float, default=0.0, help='seconds added to every answer')
  args = parser.parse_args()
  with RangeServer(args.folder, args.delay).running() as address:
    print(address, flush=True)
    threading.Event().wait()


if __name__ == '__main__':
  main()
