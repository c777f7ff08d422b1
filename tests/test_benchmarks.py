"""The benchmarks run: one on tiny sizes, and the FLOPs that all rates are compared with."""

import json
import subprocess
import sys

import pytest

from benchmarks import our_side
from benchmarks.processes import ROOT


def test_the_step_of_a_config_as_json():
  command = [sys.executable, '-m', 'benchmarks', 'step', '--config=tests/tiny_run.py', '--steps=1']
  found = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
  assert found['batch_size'] == 8 and found['gflop_per_step'] > 0
  assert found['images_per_s'] == pytest.approx(8 * found['steps_per_s'], rel=0.01)
  assert found['compile_s'] > 0 and found['images_per_s_with_input'] > 0


def test_flops_are_those_in_the_committed_reports():
  """Of GroupViT-S/16 at batch 8, texts as long as CC12M's: counted by hand when the reports were made."""
  for work, name in (('training', 'train'), ('encoding', 'inference'), ('windows', 'windows')):
    report = json.loads((ROOT / 'docs' / f'speed_{name}.json').read_text())
    assert our_side.model_flops(work, 8, report['size']) / 1e9 == pytest.approx(report['model_gflop'], rel=1e-6)
