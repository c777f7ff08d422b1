"""The page's table of the evaluator's speed says what the benchmark wrote."""

import argparse

import pytest

transformers = pytest.importorskip('transformers')

from benchmarks import evaluation, evaluation_table, rounds


class Side:
  """What is left of a process that was timed."""

  def __init__(self, facts, peak_mb):
    self.facts, self.peak_mb = facts, peak_mb


def test_a_report_becomes_a_table():
  both = lambda *rates: [rounds.Rate(rate / 2, rate) for rate in rates]
  found = {
    ('ours', 'labels'): both(4.0, 8.0, 4.0),
    ('ours', 'as_eval_py'): both(3.0, 3.0, 3.0),
    ('peer', 'labels'): both(1.0, 1.0, 2.0),
    ('ours', 'multiply'): both(10.0, 10.0, 10.0),
  }
  ours = Side({'jax': '0.10', 'kind': 'cpu', 'product_flop': 1e11}, 512)
  peer = Side({'torch': '2.13', 'transformers': '5.24'}, 1024)
  args = argparse.Namespace(rounds=3, pictures=8, dtype='float32')
  agreement = {'same_label': 0.99999, 'labels': 3, 'largest_label': 0.9}
  report = evaluation._report(args, ours, peer, found, agreement, 0.2)
  assert report['of_each_round']['peer, labels'] == [1.0, 1.0, 2.0] and report['ratio']['by_wall_clock'] == 4
  lines = evaluation_table.table(report).splitlines()
  assert lines[2].startswith('| ours, label maps alone | 4.00 | 10.0 | ')
  assert lines[2].endswith('| 0.5 GiB | 7.5 minutes |')
  assert lines[3] == '| ours, as `eval.py --output` | 3.00 | 7.5 |  | 0.5 GiB | 10.0 minutes |'
  assert lines[4] == '| the reference procedure | 1.00 | 2.5 |  | 1.0 GiB | 30.0 minutes |'
  assert '**4.00 times**' in lines[6] and 'in single rounds 2.00 to 8.00 times' in lines[6]
  assert 'load average before 0.2' in lines[6] and '99.999% of the pixels' in lines[6]
  page = evaluation_table._PAGE.read_text()
  assert '<!-- evaluation: benchmarks/evaluation_table.py -->' in page and '<!-- end of evaluation -->' in page
