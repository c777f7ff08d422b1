"""Writes reports into the tables of docs/, between marks.

python -m benchmarks tables docs/speed_train.json docs/speed_inference.json docs/speed_windows.json
python -m benchmarks tables docs/speed_evaluation.json
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import pathlib

from benchmarks.processes import ROOT

WORKS = {'train': 'training', 'encode': 'encoding', 'windows': 'windows'}
EVALUATION_SIDES = {
  'ours': 'this project, label maps alone',
  'ours_as_eval_py': 'this project, as `eval.py --output`',
  'peer': 'the reference procedure',
}


def main() -> None:
  """Rewrites the pages that the reports belong to."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('reports', nargs='+', type=pathlib.Path)
  reports = [json.loads(path.read_text(encoding='utf-8')) for path in parser.parse_args().reports]
  speed = [report for report in reports if 'work' in report]
  if speed:
    insert('docs/performance.md', 'speed', speed_table(speed))
    insert('docs/performance.md', 'growth', growth_table(speed))
  for report in reports:
    if 'same_label' in report:
      insert('docs/evaluation.md', 'evaluation', evaluation_table(report))


def insert(page: str, name: str, text: str) -> None:
  """Puts the text between the page's marks of that name.

  Raises:
    ValueError: a mark is missing.
  """
  path, begin, end = ROOT / page, f'<!-- {name}: benchmarks/tables.py -->', f'<!-- end of {name} -->'
  before, found, rest = path.read_text(encoding='utf-8').partition(begin)
  if not found or end not in rest:
    raise ValueError(f'{page} lacks the marks {begin!r} and {end!r}; put them where the table belongs')
  path.write_text(f'{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}', encoding='utf-8')


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


def evaluation_table(report: Mapping) -> str:
  """Markdown: a row for each side, and how the label maps compare."""
  minutes = report['minutes_of_voc_val']
  lines = [_row('', 'images/s', 'windows/s', 'peak memory', 'VOC val'), _row(':--', *['--:'] * 4)]
  for side, name in EVALUATION_SIDES.items():
    rate, memory = report['pictures_per_s'][side], report['peak_mb']['peer' if side == 'peer' else 'ours'] / 1024
    windows = f'{rate * report["windows_a_picture"]:.1f}'
    lines.append(_row(name, f'{rate:.2f}', windows, f'{memory:.1f} GiB', f'{minutes[side]:.1f} minutes'))
  machine, rounds = report['machine'], report['of_each_round']
  ratios = [ours / peer for ours, peer in zip(rounds['ours, labels'], rounds['peer, labels'])]
  text = (
    f'Label maps: **{report["ratio"]:.2f} times** the rate ({min(ratios):.2f} to {max(ratios):.2f} in '
    f'single rounds), {report["share_of_matmul"]:.0%} of the FLOPs of a large matmul, and the same label on '
    f'{report["same_label"]:.3%} of the pixels of four images. Medians of {report["rounds"]} rounds of '
    f'{report["pictures_a_round"]} images, float32, on {machine["cores"]} x {machine["processor"]}; Python '
    f'{machine["python"]}, JAX {report["ours"]["jax"]}, PyTorch {report["peer"]["torch"]}, transformers '
    f'{report["peer"]["transformers"]}.'
  )
  return '\n'.join([*lines, '', text])
