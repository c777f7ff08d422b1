"""Writes the figures of speed benchmarks into README.md, and how they grow into docs/performance.md, between marks:

python -m benchmarks.speed_table docs/speed_train.json docs/speed_inference.json docs/speed_windows.json
"""

import argparse
import json
import pathlib

from benchmarks.rounds import ROOT

CLOCKS = {'per_wall_s': '', 'per_cpu_s': ', by its own clock'}
WORKS = {'train': 'training', 'encode': 'encoding pictures', 'windows': 'segmentation windows'}


def table(reports: list[dict]) -> str:
  """Markdown: for each machine one row for each work and side; then under what circumstances each was measured."""
  machines = dict.fromkeys(machine(report) for report in reports)
  return '\n\n'.join(_machine_table([report for report in reports if machine(report) == name]) for name in machines)


def machine(report: dict) -> str:
  """What a report is of."""
  if report['device'] != 'cpu':
    return f'{report["device"]}, {report["dtype"]}'
  return f'{report["cores"]} core(s) of an {report["processor"]}{CLOCKS[report["clock"]]}, {report["dtype"]}'


def _machine_table(reports: list[dict]) -> str:
  lines = [
    f"| {machine(reports[0])} | | pictures/s | ours to theirs | peak memory | of the machine's FLOPs | "
    'first step after |',
    '|:--|:--|--:|--:|--:|--:|--:|',
  ]
  for report in reports:
    work = f'{WORKS[report["work"]]}, {report["size"]} px, batch {report["batch"]}'
    for side, rate in report['pictures_per_s'].items():
      name, ratio = 'ours' if side == 'ours' else f'transformers, {side}', report['ratio_to'].get(side)
      lines.append(
        f'| {work} | {name} | {rate:,.{_digits(rate)}f} | {f"**{ratio:.2f}x**" if ratio else ""} | '
        f'{report["peak_mb"][side] / 1024:.1f} GiB | {_share(report, side)} | '
        f'{report["facts"][side]["first_s"]:.0f} s |'
      )
    lines += [f'| {work} | transformers, {mode} | did not run | | | | |' for mode in report['failed']]
  return '\n'.join([*lines, '', *dict.fromkeys(_footnote(report) for report in reports)])


def _digits(rate: float) -> int:
  return 2 if rate < 100 else 0


def _share(report: dict, side: str) -> str:
  """Utilisation: of what a large product reaches, and of what is published."""
  share = f'{report["utilisation"][side]:.0%}'
  return f'{share} ({report["utilisation_of_published"][side]:.0%})' if report['published_gflop_per_s'] else share


def _footnote(report: dict) -> str:
  peers = [facts for side, facts in report['facts'].items() if side != 'ours']
  versions = [f'Python {report["python"]}', f'JAX {report["facts"]["ours"]["jax"]}']
  versions += [f'PyTorch {peers[0]["torch"]}', f'transformers {peers[0]["transformers"]}'] if peers else []
  turns = ' in turns' if report['device'] == 'cpu' and peers else ''
  peak = f'{report["machine_gflop_per_s"] / 1e3:,.{_digits(report["machine_gflop_per_s"] / 1e3)}f} TFLOP/s in a product'
  if report['published_gflop_per_s']:
    peak += f' (published: {report["published_gflop_per_s"] / 1e3:,.0f})'
  return (
    f'{WORKS[report["work"]].capitalize()}: GroupViT-S/16, medians of {report["rounds"]} rounds of '
    f'{report["steps"]} steps{turns}; {peak}; {", ".join(versions)}; load average before '
    f'{report["load_average"]:.1f}.  '
  )


def growth_table(reports: list[dict]) -> str:
  """Markdown: ours at other batches and sizes, one row each."""
  lines = [
    '| | batch | pixels | pictures/s | GFLOP a picture | GFLOP/s | peak memory | temporaries | compiled in |',
    '|:--|--:|--:|--:|--:|--:|--:|--:|--:|',
  ]
  for report in reports:
    for point in report.get('growth', []):
      rate, flops = point['pictures_per_s'], point['model_gflop'] / point['batch']
      temporaries = f'{point["temporaries_mb"] / 1024:.2f} GiB' if 'temporaries_mb' in point else ''
      lines.append(
        f'| {WORKS[report["work"]]} | {point["batch"]} | {point["size"]} | {rate:,.{_digits(rate)}f} | {flops:.1f} | '
        f'{rate * flops:,.0f} | {point["peak_mb"] / 1024:.1f} GiB | {temporaries} | {point["compile_s"]:.0f} s |'
      )
  return '\n'.join(lines)


def insert(page: str, name: str, text: str, script: str = 'speed_table') -> str:
  """The page with the text between its marks of that name, which say what script writes it.

  Raises:
    ValueError: a mark is missing.
  """
  begin, end = f'<!-- {name}: benchmarks/{script}.py -->', f'<!-- end of {name} -->'
  if begin not in page or end not in page:
    raise ValueError(f'the page lacks the marks {begin!r} and {end!r}; put them where the table belongs')
  before, rest = page.split(begin, 1)
  return f'{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}'


def main() -> None:
  """Rewrites both pages."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('reports', nargs='+', type=pathlib.Path)
  reports = [json.loads(path.read_text(encoding='utf-8')) for path in parser.parse_args().reports]
  for page, name, text in (
    ('README.md', 'speed', table(reports)),
    ('docs/performance.md', 'growth', growth_table(reports)),
  ):
    path = ROOT / page
    path.write_text(insert(path.read_text(encoding='utf-8'), name, text), encoding='utf-8')


if __name__ == '__main__':
  main()
