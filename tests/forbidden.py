"""Programs for which TensorFlow and torch are installed, and which must not import them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ('tensorflow', 'torch')


def run_without(code: str, folder: pathlib.Path) -> None:
  """Runs Python code; fails if it, or a process that it starts, imports either, even one that the import fails for.

  Args:
    code: the program, a file's text.
    folder: for its file, and for packages of those names that note in it who imports them.
  """
  found = folder / 'imported'
  for name in NAMES:
    (folder / 'packages' / name).mkdir(parents=True)
    (folder / 'packages' / name / '__init__.py').write_text(
      f'import traceback\nopen({str(found)!r}, "a").write("".join(traceback.format_stack()))\n'
      f'raise ImportError("{name} is not for run time")\n'
    )
  path = os.pathsep.join([str(folder / 'packages'), str(ROOT)])
  (folder / 'program.py').write_text(code)
  done = subprocess.run(
    [sys.executable, str(folder / 'program.py')],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': path},
  )
  assert done.returncode == 0, done.stderr
  assert not found.exists(), found.read_text()
