"""Writes reports of training, encoding and windows into the tables of docs/performance.md, between marks.

python -m benchmarks tables docs/speed_train.json docs/speed_inference.json docs/speed_windows.json
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import pathlib

from benchmarks.processes import ROOT

PAGE = ROOT / 'docs' / 'performance.md'
WORKS = {'train': 'training', 'encode': 'encoding', 'windows': 'windows'}


def main() -> None:
  """Rewrites the page."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('reports', nargs='+', type=pathlib.Path)
  reports = [json.loads(path.read_text(encoding='utf-8')) for path in parser.parse_args().reports]
  page = PAGE.read_text(encoding='utf-8')
  for name, table in (('speed', speed_table(reports)), ('growth', growth_table(reports))):
    begin, end = f'<!-- {name}: benchmarks/tables.py -->\n', f'\n<!-- end of {name} -->'
    before, rest = page.split(begin)
    page = before + begin + table + end + rest.split(end)[1]
  PAGE.write_text(page, encoding='utf-8')


def _row(*cells: str) -> str:
  return f'| {" | ".join(cells)} |'


def _rate(rate: float) -> str:
  return f'{rate:,.{2 if rate < 100 else 0}f}'


def speed_table(reports: Sequence[Mapping]) -> str:
  """Markdown: a column for each work, a row for each side; reports are of one machine."""
  works = [f'{WORKS[report["work"]]}, {report["size"]} px, batch {report["batch"]}' for report in reports]
  lines = [_row('images/s (ours to theirs)', *works), _row(':--', *['--:'] * len(works))]
  lines.append(_row('this project', *(f'**{_rate(report["pictures_per_s"]["ours"])}**' for report in reports)))
  for mode in dict.fromkeys(mode for report in reports for mode in [*report['ratio_to'], *report['failed']]):
    lines.append(_row(f'transformers, {mode}', *(_against(report, mode) for report in reports)))
  lines.append(_row("this project's share of a large matmul's FLOPs", *map(_share, reports)))
  lines.append(_row('peak memory (peers), GiB', *map(_memory, reports)))
  rounds = ', '.join(dict.fromkeys(f'{report["rounds"]} rounds of {report["steps"]} steps' for report in reports))
  return '\n'.join([*lines, '', f'Medians of {rounds} in turns.'])


def _against(report: Mapping, mode: str) -> str:
  if mode in report['failed']:
    return 'did not run'
  found = mode in report['ratio_to']
  return f'{_rate(report["pictures_per_s"][mode])} ({report["ratio_to"][mode]:.2f}x)' if found else ''


def _share(report: Mapping) -> str:
  published = report['utilisation_of_published'] or {}
  return f'{report["utilisation"]["ours"]:.0%}' + (f' ({published["ours"]:.0%} of the published)' if published else '')


def _memory(report: Mapping) -> str:
  peers = [mb / 1024 for side, mb in report['peak_mb'].items() if side != 'ours']
  return f'{report["peak_mb"]["ours"] / 1024:.1f}' + (f' ({min(peers):.1f} to {max(peers):.1f})' if peers else '')


def growth_table(reports: Sequence[Mapping]) -> str:
  """Markdown: ours at other batches and sizes, one row each."""
  lines = [_row('', 'batch', 'pixels', 'images/s', 'GFLOP/s', 'GiB'), _row(':--', *['--:'] * 5)]
  for report in reports:
    for point in report.get('growth', []):
      rate, flops = point['pictures_per_s'], point['model_gflop'] / point['batch']
      sizes = WORKS[report['work']], str(point['batch']), str(point['size'])
      lines.append(_row(*sizes, _rate(rate), f'{rate * flops:,.0f}', f'{point["peak_mb"] / 1024:.1f}'))
  return '\n'.join(lines)
