"""Writes the evaluator's speed into docs/evaluation.md, between marks, from what `benchmarks.evaluation` found:

python -m benchmarks.evaluation_table docs/speed_evaluation.json
"""

import argparse
import json
import pathlib

from benchmarks import speed_table
from benchmarks.rounds import ROOT

_PAGE = ROOT / 'docs' / 'evaluation.md'
_SIDES = {
  'ours': 'ours, label maps alone',
  'ours_as_eval_py': 'ours, as `eval.py --output`',
  'peer': 'the reference procedure',
}


def table(report: dict) -> str:
  """Markdown: a row for each side, and what they come to."""
  val = next(value for key, value in report.items() if key.startswith('minutes_of_voc_val'))
  lines = [
    f'| {_machine(report)} | pictures/s | windows/s | of the peak | peak memory | whole of VOC val |',
    '|:--|--:|--:|--:|--:|--:|',
  ]
  for side, name in _SIDES.items():
    rate = report['pictures_per_s'][side]
    share = f'{report["share_of_peak"]:.0%}' if side == 'ours' else ''
    memory = report['peak_mb']['peer' if side == 'peer' else 'ours'] / 1024
    lines.append(
      f'| {name} | {rate:.2f} | {rate * report["windows_a_picture"]:.1f} | {share} | {memory:.1f} GiB | '
      f'{val[side]:.1f} minutes |'
    )
  return '\n'.join([*lines, '', _text(report)])


def _machine(report: dict) -> str:
  kind, machine = report['ours']['kind'], report['machine']
  where = f'{machine["cores"]} cores of an {machine["processor"]}' if kind == 'cpu' else f'one {kind}'
  return f'{where}, {report["dtype"]}'


def _text(report: dict) -> str:
  rounds, maps, machine = report['of_each_round'], report['label_maps'], report['machine']
  ratios = [ours / peer for ours, peer in zip(rounds['ours, labels'], rounds['peer, labels'])]
  published = report['share_of_published_peak']
  versions = (
    f'Python {machine["python"]}, JAX {report["ours"]["jax"]}, PyTorch {report["peer"]["torch"]}, '
    f'transformers {report["peer"]["transformers"]}'
  )
  return (
    f'**{report["ratio"]["by_wall_clock"]:.2f} times** as many pictures a second as the reference procedure '
    f'(aim: 4), in single rounds {min(ratios):.2f} to {max(ratios):.2f} times; '
    f"{report['ratio']['by_cpu_clock']:.2f} times by the processes' own clocks. Medians of "
    f'{report["rounds"]} rounds of {report["pictures_a_round"]} pictures in turns; load average before '
    f'{machine["load"]:g}; {versions}. '
    f'{maps["same_label"]:.3%} of the pixels of four pictures get the same label, of {maps["labels"]} that occur. '
    f'The peak, {report["peak_gflop_per_s"] / 1e3:.3g} TFLOP/s, is what a product of large matrices reaches'
    + (f' ({published:.0%} of the published one)' if published else '')
    + '.'
  )


def main() -> None:
  """Rewrites the page."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('reports', nargs='+', type=pathlib.Path)
  reports = [json.loads(path.read_text(encoding='utf-8')) for path in parser.parse_args().reports]
  page = speed_table.insert(
    _PAGE.read_text(encoding='utf-8'), 'evaluation', '\n\n'.join(map(table, reports)), 'evaluation_table'
  )
  _PAGE.write_text(page, encoding='utf-8')


if __name__ == '__main__':
  main()
