"""A browser for tests: Debian's, Google's, or the one that `playwright install chromium` brings."""

from collections.abc import Iterator, Sequence
import contextlib
import os
import pathlib
import shutil

from playwright import sync_api
import pytest

_NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
# As root in a container, and without a word to anyone.
_FLAGS = [
  '--no-sandbox',
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
]


NO_GPU = ('--disable-gpu',)
SOFTWARE_WEBGPU = '--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader'


@contextlib.contextmanager
def launched(gpu: Sequence[str] = NO_GPU) -> Iterator[sync_api.Browser]:
  """A headless browser; without one the test is skipped, or fails where REQUIRE_BROWSER=1 says that there is one."""
  with sync_api.sync_playwright() as play:
    path = next(filter(None, map(shutil.which, _NAMES)), play.chromium.executable_path)
    if not pathlib.Path(path).exists():
      give_up = pytest.fail if os.environ.get('REQUIRE_BROWSER') == '1' else pytest.skip
      give_up(f'there is none of {", ".join(_NAMES)}: apt-get install chromium, or playwright install chromium')
    browser = play.chromium.launch(executable_path=path, args=[*_FLAGS, *gpu])
    try:
      yield browser
    finally:
      browser.close()
