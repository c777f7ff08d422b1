"""The map of the code: writes docs/design.md's table of modules and docs/rooms.svg from the sources.

python docs/rooms.py           # writes both
python docs/rooms.py --check   # exits with 1 where they are out of date
"""

import ast
from collections.abc import Iterator
import functools
import html
import pathlib
import re
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.test_rooms import FLOORS, imported_rooms, PACKAGE, room_of  # noqa: E402

PAGE, PICTURE = ROOT / 'docs' / 'design.md', ROOT / 'docs' / 'rooms.svg'
MARKS = '<!-- modules: docs/rooms.py -->', '<!-- end of modules -->'
LABELS, CELL = 700, 27  # of the picture, px: the width of names and descriptions, a cell of the matrix


def first_line(path: pathlib.Path) -> str:
  """What the module's docstring begins with."""
  return (ast.get_docstring(ast.parse(path.read_text())) or '').split('\n')[0]


def modules() -> Iterator[pathlib.Path]:
  """All modules, floor by floor, the rooms' own first."""
  for room in (room for floor in FLOORS for room in floor):
    one = PACKAGE / f'{room}.py'
    yield from [one] if one.exists() else sorted((PACKAGE / room).rglob('*.py'), key=lambda path: path.with_suffix(''))


def describe(room: str) -> str:
  one = PACKAGE / f'{room}.py'
  return first_line(one if one.exists() else PACKAGE / room / '__init__.py')


@functools.cache
def table() -> str:
  """A Markdown table of the modules' first lines, under each room's."""
  rows = ['| module | |', '|:--|:--|']
  for path in modules():
    name = str(path.relative_to(PACKAGE))
    if path.name == '__init__.py':
      rows.append(f'| **{name.removesuffix("__init__.py")}** | **{first_line(path)}** |')
    else:
      rows.append(f'| `{name}` | {first_line(path)} |')
  return '\n'.join(row.replace('****', '') for row in rows)


@functools.cache
def imports() -> dict[str, set[str]]:
  """The rooms that each room imports."""
  found: dict[str, set[str]] = {room: set() for floor in FLOORS for room in floor}
  for path in modules():
    found[room_of(path)] |= imported_rooms(path) & found.keys() - {room_of(path)}
  return found


def picture() -> str:
  """An SVG with a row and a column for each room, and a dot where the row's room imports the column's."""
  rooms = [room for floor in FLOORS for room in floor]
  left, top, width = LABELS, 110, LABELS + CELL * len(rooms) + 60
  height = top + CELL * len(rooms) + 40
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
    f'<rect width="{width}" height="{height}" fill="#fff"/>',
  ]
  floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
  for row, room in enumerate(rooms):
    x, y = left + CELL * row, top + CELL * row
    shade = '#eef3f8' if floor_of[room] % 2 else '#dde7f1'
    parts += [
      f'<rect x="10" y="{y}" width="{width - 70}" height="{CELL}" fill="{shade}"/>',
      f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#9ab"/>',
      f'<text x="20" y="{y + 18}" font-weight="bold">{room}</text>',
      f'<text x="120" y="{y + 18}" font-size="12" fill="#345">{html.escape(shorten(describe(room)))}</text>',
      f'<text transform="translate({x + CELL / 2 + 4} {top - 8}) rotate(-60)">{room}</text>',
    ]
  for row, imported in enumerate(imports().values()):
    for column in sorted(map(rooms.index, imported)):
      x, y = left + CELL * (column + 0.5), top + CELL * (row + 0.5)
      parts.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="6" fill="#246"/>')
  parts.append(
    f'<text x="20" y="{height - 14}" fill="#345">A dot: the room of the row imports the room of the column. All dots '
    'lie right of the diagonal: imports point down.</text>'
  )
  return '\n'.join([*parts, '</svg>\n'])


def shorten(text: str) -> str:
  return textwrap.shorten(text, LABELS // 7 - 5, placeholder=' …')


def page(text: str) -> str:
  """The page with a fresh table."""
  return re.sub(f'(?<={MARKS[0]}\n).*?(?={MARKS[1]})', lambda _: table() + '\n', text, flags=re.DOTALL)


if __name__ == '__main__':
  fresh = {PAGE: page(PAGE.read_text()), PICTURE: picture()}
  if sys.argv[1:] == ['--check']:
    stale = [path.name for path, text in fresh.items() if not path.exists() or path.read_text() != text]
    sys.exit(f'out of date: {", ".join(stale)}; run python docs/rooms.py' if stale else 0)
  for path, text in fresh.items():
    path.write_text(text)
