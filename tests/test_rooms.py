"""The rooms of the package: which folder may import which."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'groupvit_jax'

# Top floor first. A room imports from the floors below it, and from itself.
FLOORS = (
  ('__main__',),
  ('aot', 'commands', 'demo', 'prepare'),
  ('predictor',),
  ('prediction',),
  ('train',),
  ('eval', 'interop'),
  ('data',),
  ('running',),
  ('model',),
  ('storage',),
  ('cli', 'config_entries', 'tensorboard'),
  ('errors',),
)


def room_of(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imported_rooms(path: pathlib.Path) -> set[str]:
  """Rooms that a file imports from, at its top or inside of a function."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split('.')[0] == PACKAGE.name:
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names if alias.name.startswith(f'{PACKAGE.name}.')]
    else:
      continue
    found |= {name.split('.')[1] for name in names}
  return found


def test_imports_point_downwards():
  floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
  files = [path for path in PACKAGE.rglob('*.py') if path != PACKAGE / '__init__.py']
  rooms = {room_of(path) for path in files}
  assert rooms == set(floor), f'FLOORS differs from the tree in {rooms ^ set(floor)}'
  upward = [
    f'{path.relative_to(ROOT)} imports {room}'
    for path in files
    for room in sorted(imported_rooms(path) - {room_of(path)})
    if floor[room] <= floor[room_of(path)]
  ]
  assert not upward, '\n'.join(upward)
