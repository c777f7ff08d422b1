"""Lists and runs the commands: `python -m groupvit_jax NAME`, or groupvit-NAME once the package is installed."""

import ast
import functools
import importlib.util
import pathlib
import runpy
import sys

from groupvit_jax import cli

# Each is a module that can also be run with `python -m`.
COMMANDS = {
  'train': 'groupvit_jax.commands.train',
  'eval': 'groupvit_jax.commands.eval',
  'animate': 'groupvit_jax.commands.animate',
  'import': 'groupvit_jax.commands.import_weights',
  'export': 'groupvit_jax.commands.export',
  'demo': 'groupvit_jax.demo.__main__',
  'prepare': 'groupvit_jax.prepare.__main__',
  'audit': 'groupvit_jax.data.audit',
  'aot': 'groupvit_jax.aot.__main__',
}


def run(name: str) -> None:
  """Runs a command with the arguments in sys.argv, as its module; ends the process."""
  runpy.run_module(COMMANDS[name], run_name='__main__', alter_sys=True)


def describe(name: str) -> str:
  """The first line of a command's module, which is not imported."""
  source = pathlib.Path(importlib.util.find_spec(COMMANDS[name]).origin).read_text(encoding='utf-8')
  return ast.get_docstring(ast.parse(source)).splitlines()[0]


def main() -> None:
  """Runs the command that the first argument names, or lists all."""
  name = sys.argv[1] if len(sys.argv) > 1 else '--help'
  if name in COMMANDS:
    del sys.argv[1]
    run(name)
  listed = '\n'.join(f'  {name:8} {describe(name)}' for name in COMMANDS)
  if name not in ('--help', '-h', 'help'):
    sys.exit(cli.fail(f'there is no command {name!r}; there are {", ".join(COMMANDS)}'))
  print(f'Usage: python -m groupvit_jax COMMAND [--help]\n\n{listed}')


# Entry points of the installed commands.
train, eval_, animate, import_, export, demo, prepare, audit, aot = (functools.partial(run, name) for name in COMMANDS)

if __name__ == '__main__':
  main()
