"""Runs one benchmark: python -m benchmarks NAME [options]; NAME --help lists its options."""

import ast
import importlib
import pathlib
import sys

_MODULES = (
  'evaluation predictor step loss_memory caption_lengths input_pipeline remote reliability tables browser'.split()
)
# Name on the command line -> module here.
NAMES = dict.fromkeys(('training', 'encoding', 'windows'), 'speed') | dict(zip(_MODULES, _MODULES))


def summary(module: str) -> str:
  """First line of a module's docstring, without importing the module."""
  source = pathlib.Path(__file__).with_name(f'{module}.py').read_text(encoding='utf-8')
  return ast.get_docstring(ast.parse(source)).splitlines()[0]


def main() -> int | None:
  """Runs the benchmark that the first argument names, or lists all."""
  name = sys.argv[1] if len(sys.argv) > 1 else ''
  if name not in NAMES:
    print('python -m benchmarks NAME [options]\n', *(f'  {name:16} {summary(NAMES[name])}' for name in NAMES), sep='\n')
    return 0 if name in ('', '--help') else 2
  sys.argv = [f'python -m benchmarks {name}', *sys.argv[2:]]
  module = importlib.import_module(f'benchmarks.{NAMES[name]}')
  return module.main(name) if NAMES[name] == 'speed' else module.main()


if __name__ == '__main__':
  sys.exit(main())
