"""Writes reports into the tables of docs/, between marks.

python -m benchmarks tables docs/speed_train.json docs/speed_inference.json docs/speed_windows.json
python -m benchmarks tables docs/speed_evaluation.json
"""

import argparse
from collections.abc import Mapping, Sequence
import json
import pathlib

from benchmarks.processes import ROOT

WORKS = {'train': 'training', 'encode': 'encoding pictures', 'windows': 'segmentation windows'}
EVALUATION_SIDES = {
  'ours': 'ours, label maps alone',
  'ours_as_eval_py': 'ours, as `eval.py --output`',
  'peer': 'the reference procedure',
}


def main() -> None:
  """Rewrites the pages that the reports belong to."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('reports', nargs='+', type=pathlib.Path)
  reports = [json.loads(path.read_text(encoding='utf-8')) for path in parser.parse_args().reports]
  speed = [report for report in reports if 'work' in report]
  evaluations = [report for report in reports if 'label_maps' in report]
  if speed:
    insert('docs/performance.md', 'speed', speed_table(speed))
    insert('docs/performance.md', 'growth', growth_table(speed))
  if evaluations:
    insert('docs/evaluation.md', 'evaluation', '\n\n'.join(map(evaluation_table, evaluations)))


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


def speed_table(reports: Sequence[Mapping]) -> str:
  """Markdown: for each machine one row for each work and side; then under what circumstances each was measured."""
  machines: dict[str, list[Mapping]] = {}
  for report in reports:
    on_cpu = report['device'] == 'cpu'
    machine = f'{report["cores"]} core(s) of an {report["processor"]}' if on_cpu else report['device']
    machines.setdefault(f'{machine}, {report["dtype"]}', []).append(report)
  return '\n\n'.join(_machine_table(machine, its) for machine, its in machines.items())


def _machine_table(machine: str, reports: Sequence[Mapping]) -> str:
  lines = [
    f"| {machine} | | pictures/s | ours to theirs | peak memory | of the machine's FLOPs | first step after |",
    '|:--|:--|--:|--:|--:|--:|--:|',
  ]
  for report in reports:
    work = f'{WORKS[report["work"]]}, {report["size"]} px, batch {report["batch"]}'
    for side, rate in report['pictures_per_s'].items():
      name, ratio = 'ours' if side == 'ours' else f'transformers, {side}', report['ratio_to'].get(side)
      share = f'{report["utilisation"][side]:.0%}'  # of what a large matmul reaches, and of what is published
      share += f' ({report["utilisation_of_published"][side]:.0%})' if report['published_gflop_per_s'] else ''
      lines.append(
        f'| {work} | {name} | {_rate(rate)} | {f"**{ratio:.2f}x**" if ratio else ""} | '
        f'{report["peak_mb"][side] / 1024:.1f} GiB | {share} | {report["facts"][side]["first_s"]:.0f} s |'
      )
    lines += [f'| {work} | transformers, {mode} | did not run | | | | |' for mode in report['failed']]
  return '\n'.join([*lines, '', *dict.fromkeys(_footnote(report) for report in reports)])


def _rate(rate: float) -> str:
  return f'{rate:,.{2 if rate < 100 else 0}f}'


def _footnote(report: Mapping) -> str:
  peers = [facts for side, facts in report['facts'].items() if side != 'ours']
  versions = [f'Python {report["python"]}', f'JAX {report["facts"]["ours"]["jax"]}']
  versions += [f'PyTorch {peers[0]["torch"]}', f'transformers {peers[0]["transformers"]}'] if peers else []
  turns = ' in turns' if report['device'] == 'cpu' and peers else ''
  peak = f'{_rate(report["machine_gflop_per_s"] / 1e3)} TFLOP/s in a product'
  if report['published_gflop_per_s']:
    peak += f' (published: {report["published_gflop_per_s"] / 1e3:,.0f})'
  return (
    f'{WORKS[report["work"]].capitalize()}: GroupViT-S/16, medians of {report["rounds"]} rounds of '
    f'{report["steps"]} steps{turns}; {peak}; {", ".join(versions)}; load average before '
    f'{report["load_average"]:.1f}.  '
  )


def growth_table(reports: Sequence[Mapping]) -> str:
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
        f'| {WORKS[report["work"]]} | {point["batch"]} | {point["size"]} | {_rate(rate)} | {flops:.1f} | '
        f'{rate * flops:,.0f} | {point["peak_mb"] / 1024:.1f} GiB | {temporaries} | {point["compile_s"]:.0f} s |'
      )
  return '\n'.join(lines)


def evaluation_table(report: Mapping) -> str:
  """Markdown: a row for each side, and the comparison in words."""
  kind, machine, maps = report['ours']['kind'], report['machine'], report['label_maps']
  where = f'{machine["cores"]} cores of an {machine["processor"]}' if kind == 'cpu' else f'one {kind}'
  minutes = next(value for key, value in report.items() if key.startswith('minutes_of_voc_val'))
  lines = [
    f'| {where}, {report["dtype"]} | pictures/s | windows/s | of the peak | peak memory | whole of VOC val |',
    '|:--|--:|--:|--:|--:|--:|',
  ]
  for side, name in EVALUATION_SIDES.items():
    rate = report['pictures_per_s'][side]
    share = f'{report["share_of_peak"]:.0%}' if side == 'ours' else ''
    memory = report['peak_mb']['peer' if side == 'peer' else 'ours'] / 1024
    lines.append(
      f'| {name} | {rate:.2f} | {rate * report["windows_a_picture"]:.1f} | {share} | {memory:.1f} GiB | '
      f'{minutes[side]:.1f} minutes |'
    )
  rounds, published = report['of_each_round'], report['share_of_published_peak']
  ratios = [ours / peer for ours, peer in zip(rounds['ours, labels'], rounds['peer, labels'])]
  text = (
    f'**{report["ratio"]["by_wall_clock"]:.2f} times** as many pictures a second as the reference procedure '
    f'(aim: 4), in single rounds {min(ratios):.2f} to {max(ratios):.2f} times; '
    f"{report['ratio']['by_cpu_clock']:.2f} times by the processes' own clocks. Medians of "
    f'{report["rounds"]} rounds of {report["pictures_a_round"]} pictures in turns; load average before '
    f'{machine["load"]:g}; Python {machine["python"]}, JAX {report["ours"]["jax"]}, '
    f'PyTorch {report["peer"]["torch"]}, transformers {report["peer"]["transformers"]}. '
    f'{maps["same_label"]:.3%} of the pixels of four pictures get the same label, of {maps["labels"]} that occur. '
    f'The peak, {report["peak_gflop_per_s"] / 1e3:.3g} TFLOP/s, is what a product of large matrices reaches'
    + (f' ({published:.0%} of the published one)' if published else '')
    + '.'
  )
  return '\n'.join([*lines, '', text])
