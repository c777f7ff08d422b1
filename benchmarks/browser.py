"""Time of the static page in headless Chromium: the first result, and images per second after it.

  python -m groupvit_jax.commands.export --workdir=runs/quickstart --format=web --output=site
  python -m benchmarks browser --site=site

The first result is that of the first example, from an empty cache on. Then the page's modules encode and segment noise.
"""

import argparse
import functools
import http.server
import pathlib
import shutil
import statistics
import threading
import time

from playwright import sync_api

from benchmarks import processes

_SEGMENT = """async ([side, images, names]) => {
  const {Segmenter} = await import('./segmenter.js');
  self.segmenter ??= await Segmenter.load();
  const seconds = {encode: 0, segment: 0};
  for (let i = 0; i < images; i++) {
    const data = Uint8Array.from({length: 4 * side * side}, () => 256 * Math.random());
    const start = performance.now(), encoded = await self.segmenter.encode({data, width: side, height: side});
    const middle = performance.now();
    await self.segmenter.segment(encoded, names, 0);
    seconds.encode += (middle - start) / 1000;
    seconds.segment += (performance.now() - middle) / 1000;
  }
  return [seconds.encode, seconds.segment];
}"""
_NAMES = 'dog', 'banana', 'grass', 'sky'
_SIDE = 64  # of the images


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--site', required=True, help='folder of an export --format=web')
  parser.add_argument('--images', type=int, default=20, help='of each round')
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--output', type=pathlib.Path, help='JSON file.')
  args = parser.parse_args()
  if not (pathlib.Path(args.site) / 'index.html').exists():
    parser.error(f'--site={args.site} holds no page; export one there with --format=web')
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=args.site)
  handler.func.log_message = lambda *_: None
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  machine = processes.machine()
  with sync_api.sync_playwright() as play:
    path = shutil.which('chromium') or shutil.which('google-chrome') or play.chromium.executable_path
    browser = play.chromium.launch(executable_path=path, args=['--no-sandbox', '--disable-gpu'])
    page = browser.new_page()
    started = time.perf_counter()
    page.goto(f'http://127.0.0.1:{server.server_port}/')
    page.get_by_text('encoded and segmented in').wait_for()
    first = time.perf_counter() - started
    page.evaluate(_SEGMENT, [_SIDE, 3, _NAMES])
    rounds = [page.evaluate(_SEGMENT, [_SIDE, args.images, _NAMES]) for _ in range(args.rounds)]
    facts = {
      'browser': browser.version,
      'threads': page.evaluate('crossOriginIsolated ? navigator.hardwareConcurrency : 1'),
    }
    browser.close()
  server.shutdown()
  rates = [args.images / sum(seconds) for seconds in rounds]
  parts = {
    f'{name}_ms': 1000 * statistics.median(each) / args.images
    for name, each in zip(('encode', 'segment'), zip(*rounds))
  }
  found = {'first_s': first, 'images_per_s': statistics.median(rates), 'of_each_round': rates}
  processes.write(found | parts | facts | {'side': _SIDE} | machine, args.output)
