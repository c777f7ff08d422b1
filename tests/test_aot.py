"""What a step needs of a pod: reading compiled programs, figures, advice, and blocks that are compiled once."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from groupvit_jax import train_step
from groupvit_jax.aot import chips, program, report, step
from groupvit_jax.models.layers import sample_keys
from groupvit_jax.models.text_rows import one_a_row
from groupvit_jax.models.vision import StageSpec
from tests.test_sharding import random_batch
from tests.tiny import tiny_config, tiny_model
from tests.weights import random_variables

ROOT = pathlib.Path(__file__).parents[1]

# A loop of five turns with a ring step and a fusion that takes one row of a stack, then a sum over all chips.
PROGRAM = """HloModule step, is_scheduled=true

%take_row (p0: f32[5,256], p1: s32[]) -> f32[1,256] {
  %p0 = f32[5,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %row = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,256}
}

%body (state: (s32[], f32[5,256])) -> (s32[], f32[5,256]) {
  %state = (s32[], f32[5,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = f32[5,256]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,256]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%take_row
  %away = (f32[1,256]{1,0:S(1)}, f32[1,256]{1,0:S(1)}, u32[]{:S(2)}) collective-permute-start(%row), channel_id=1
  %here = f32[1,256]{1,0:S(1)} collective-permute-done(%away)
  ROOT %next = (s32[], f32[5,256]{1,0}) tuple(%i, %stack)
}

%condition (state: (s32[], f32[5,256])) -> pred[] {
  %state = (s32[], f32[5,256]{1,0}) parameter(0)
  %turns = s32[] constant(5)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %more = pred[] compare(%i, %turns), direction=LT
}

ENTRY %main (a: f32[5,256], b: bf16[1024]) -> bf16[1024] {
  %a = f32[5,256]{1,0} parameter(0)
  %b = bf16[1024]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[5,256]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[5,256]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %sum = bf16[1024]{0} all-reduce(%b), channel_id=2, to_apply=%add
}
"""


def test_traffic_counts_loops_and_only_what_is_taken():
  traffic = program.read_traffic(PROGRAM)
  assert traffic.collectives == {'collective-permute': 5 * 1024, 'all-reduce': 2048}
  assert traffic.counts == {'collective-permute': 5, 'all-reduce': 1}
  assert traffic.sent_bytes == 5 * 1024 + 2 * 2048
  # Each turn reads a row and its index into memory beside the processor; the sum is read and written.
  assert traffic.hbm_bytes == 5 * (1024 + 4) + 2 * 2048


@pytest.mark.parametrize('name', ['v5e', 'v3:2x2', 'v5e:4', '16x16', 'v5e:axb'])
def test_no_such_topology(name):
  with pytest.raises(ValueError, match='as in v5e:16x16'):
    chips.find_topology(name)


def topology(count: int) -> chips.Topology:
  return chips.Topology('v5e:8x8', chips.CHIPS['v5e'], count, [None] * count)


def compiled(gib: float) -> step.CompiledStep:
  traffic = program.Traffic(819e9 / 2, {'all-reduce': 50e9}, {'all-reduce': 3})
  size = int(gib * 2**30)
  return step.CompiledStep(step.Memory(size, 0, 0, 0), size, traffic, 64 * 197e12 * 2, 1.0)


def test_figures():
  config = tiny_config()
  config.batch_size, config.total_steps = 4096, 24 * 60 * 60
  found = report.make_report(config, topology(64), compiled(8))
  assert found['roofline_s'] == {'arithmetic': 2.0, 'memory': 0.5, 'collectives': 0.5}
  assert (found['limited_by'], found['images_per_s'], found['days'], found['fits']) == ('arithmetic', 2048, 2.0, True)
  text = report.describe(found, config)
  assert '8.00 of 16.0 GiB' in text and 'does not fit' not in text
  json.dumps(found)
  row = report.tabulate([found]).splitlines()[-1]
  assert row == '| v5e:8x8 | 64 | 64 | 8.0 of 16 | 2000.0 | 500.0 | 500.0 | arithmetic | 2,048 | 2.00 | 3,072 | 1 |'


def test_advice_takes_what_costs_least_first():
  config = tiny_config()
  config.batch_size = 64 * 2
  advised = []
  for change in ({}, {'remat': 'dots'}, {'grad_accum_steps': 2}, {'remat': 'blocks'}):
    config.update(change)
    found = report.make_report(config, topology(64), compiled(17))
    assert not found['fits']
    advised.append(report.describe(found, config).splitlines()[-1])
  for text, key in zip(advised, ('remat=dots', 'grad_accum_steps=2', 'remat=blocks', 'mesh.fsdp=64'), strict=True):
    assert 'does not fit' in text and key in text


def test_a_loop_over_blocks_changes_nothing():
  """Features and gradients, with stochastic depth, of three blocks; parameters keep their places."""
  stages = (StageSpec(3, 4, 4), StageSpec(1, 0, 0))
  plain = tiny_model(stages=stages, drop_path=0.5)
  looped = plain.clone(vision=plain.vision.clone(scan_layers=True), text=plain.text.clone(scan_layers=True, depth=2))
  plain = plain.clone(text=plain.text.clone(depth=2))
  params, batch = random_variables(plain)['params'], random_batch(8)
  assert jax.tree.structure(random_variables(looped)['params']) == jax.tree.structure(params)
  keys = sample_keys(jax.random.key(0), 8)

  def outcome(model):
    def loss(params):
      images = train_step.normalize_images(batch['image'])
      vision = model.apply({'params': params}, images, keys=keys, method='vision_features')
      rows = one_a_row(batch['tokens'].reshape(-1, batch['tokens'].shape[-1]), model.text.eos_id)
      text = model.apply({'params': params}, rows, method='text_features')
      return (vision.pooled**2).sum() + (text**2).sum(), (vision, text)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

  with jax.default_matmul_precision('highest'):
    one, other = outcome(plain), outcome(looped)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(a).max()))


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')
def test_compiles_for_a_tpu(tmp_path):
  flags = ['--config=tests/tiny_run.py', '--topology=v5e:2x2,v4:2x2x1', f'--json={tmp_path / "out.json"}']
  done = subprocess.run([sys.executable, '-m', 'groupvit_jax.aot', *flags], cwd=ROOT, env=os.environ,
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  for found in json.loads((tmp_path / 'out.json').read_text()):
    assert found['chips'] == 4 and found['fits'] and found['collectives']['all-reduce']['count'] > 0
