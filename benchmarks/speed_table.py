"""Writes the figures of speed benchmarks into the README, between two marks:

  python -m benchmarks.speed_table docs/speed_train.json docs/speed_inference.json
"""

import argparse
import json
import pathlib

from benchmarks.rounds import ROOT

BEGIN, END = '<!-- speed: benchmarks/speed_table.py -->', '<!-- end of speed -->'
CLOCKS = {'per_wall_s': '', 'per_cpu_s': ', by its own clock'}
WORKS = {'train': 'training', 'encode': 'encoding pictures'}


def table(reports: list[dict]) -> str:
  """Markdown: one row for each work and side."""
  lines = ['| | | images/s | ours is faster by | peak memory | of the machine\'s FLOPs | first call |',
           '|:--|:--|--:|--:|--:|--:|--:|']
  for report in reports:
    for side, rate in report['images_per_s'].items():
      facts, ratio = report['facts'][side], report['ratio_to'].get(side)
      name = 'ours' if side == 'ours' else f'transformers, {side}'
      lines.append(
          f'| {WORKS[report["work"]]} | {name} | {rate:.2f} | {f"**{ratio:.2f}x**" if ratio else ""} | '
          f'{report["peak_mb"][side] / 1024:.1f} GiB | {report["utilisation"][side]:.0%} | '
          f'{facts.get("compile_s", facts.get("first_s")):.0f} s |')
  first = reports[0]
  peer = next(facts for side, facts in first['facts'].items() if side != 'ours')
  lines += ['', f'GroupViT-S/16, batch {first["batch"]}, {first["size"]} px, {first["dtype"]}, four texts an image; '
            f'medians of {first["rounds"]} rounds in turns; {first["cores"]} core(s) of an '
            f'{first["processor"]}{CLOCKS[first["clock"]]}; '
            f'Python {first["python"]}, JAX {first["facts"]["ours"]["jax"]}, PyTorch {peer["torch"]}, '
            f'transformers {peer["transformers"]}; load average before: '
            + ', '.join(f'{report["load_average"]:.1f}' for report in reports) + '.']
  return '\n'.join(lines)


def insert(page: str, text: str) -> str:
  """The page with the text between its marks.

  Raises:
    ValueError: a mark is missing.
  """
  if BEGIN not in page or END not in page:
    raise ValueError(f'the page lacks the marks {BEGIN!r} and {END!r}; put them where the table belongs')
  before, rest = page.split(BEGIN, 1)
  return f'{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}'


def main() -> None:
  """Rewrites README.md."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('reports', nargs='+', type=pathlib.Path)
  reports = [json.loads(path.read_text(encoding='utf-8')) for path in parser.parse_args().reports]
  readme = ROOT / 'README.md'
  readme.write_text(insert(readme.read_text(encoding='utf-8'), table(reports)), encoding='utf-8')


if __name__ == '__main__':
  main()
