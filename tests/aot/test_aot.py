"""What a step needs of a pod: reading compiled programs, metrics and advice."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from groupvit_jax import cli
from groupvit_jax.aot import chips, program, report, step
from groupvit_jax.errors import UserError
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[2]

# Of a chip of v5e:2x2, by libtpu 0.0.52: cycles, operations that take some or move something, and bytes moved. A change
# that is meant to cost more, or saves, records new ones: the failing test prints them.
RECORDED = {'estimated_cycles': 1_111_815, 'operations': 1446, 'hbm_traffic_gib': 0.000877}
# Of a GPU of h100:4, by jaxlib 0.12: kernels of a step and bytes moved.
RECORDED_OF_A_GPU = {'operations': 827, 'hbm_traffic_gib': 0.006155}
# Where the Makefile puts XLA's compiler for GPUs: in the environment itself JAX would look for a GPU at each start.
CUDA = pathlib.Path(sys.prefix) / 'cuda'
TOLERANCE = 0.1

# A loop of five turns with a ring step and a fusion that takes one row of a stack; a sum over all four devices; one of
# which each pair keeps its parts; and values gathered behind two fusions, which both name it.
PROGRAM = """HloModule step, is_scheduled=true, num_partitions=4

%take_row (p0: f32[5,256], p1: s32[]) -> f32[1,256] {
  %p0 = f32[5,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %row = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,256}
}

%body (state: (s32[], f32[5,256])) -> (s32[], f32[5,256]) {
  %state = (s32[], f32[5,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = f32[5,256]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,256]{1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%take_row, config={"estimated_cycles":"9"}
  %away = (f32[1,256]{1,0:S(1)}, f32[1,256]{1,0:S(1)}, u32[]{:S(2)}) collective-permute-start(%row), channel_id=1
  %here = f32[1,256]{1,0:S(1)} collective-permute-done(%away)
  ROOT %next = (s32[], f32[5,256]{1,0}) tuple(%i, %stack)
}

%condition (state: (s32[], f32[5,256])) -> pred[] {
  %state = (s32[], f32[5,256]{1,0}) parameter(0)
  %turns = s32[] constant(5)
  %i = s32[] get-tuple-element(%state), index=0
  %capacity = s32[] constant(1000)
  ROOT %more = pred[] compare(%i, %turns), direction=LT
}

%all-reduce-scatter (whole: f32[512]) -> f32[256] {
  %whole = f32[512]{0} parameter(0)
  %summed = f32[512]{0} all-reduce(%whole), channel_id=3, replica_groups=[2,2]<=[4], to_apply=%add
  %place = u32[] partition-id()
  ROOT %part = f32[256]{0} dynamic-slice(%summed, %place), dynamic_slice_sizes={256}
}

%behind_one (p: f32[64]) -> f32[128] {
  %p = f32[64]{0:S(1)} parameter(0)
  ROOT %all.1 = f32[128]{0:S(1)} all-gather(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
}

%behind_other (p: f32[64]) -> f32[128] {
  %p = f32[64]{0:S(1)} parameter(0)
  ROOT %all.2 = f32[128]{0:S(1)} all-gather(%p), channel_id=4, replica_groups=mesh['a'=2,'b'=2] {'b'}, dimensions={0}
}

ENTRY %main (a: f32[5,256], b: bf16[1024]) -> bf16[1024] {
  %a = f32[5,256]{1,0} parameter(0)
  %b = bf16[1024]{0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[5,256]{1,0}) tuple(%zero, %a)
  %c = f32[512]{0:S(1)} bitcast(%zero)
  %half = f32[256]{0:S(1)} fusion(%c), kind=kCustom, calls=%all-reduce-scatter
  %one = f32[128]{0:S(1)} fusion(%half), kind=kLoop, calls=%behind_one, backend_config={"estimated_cycles":"70"}
  %other = f32[128]{0:S(1)} fusion(%one), kind=kLoop, calls=%behind_other
  %started = (f32[64]{0:S(1)}, f32[256]{0:S(1)}) all-gather-start(%other), channel_id=5, replica_groups={{0,1,2,3}}
  %loop = (s32[], f32[5,256]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %sum = bf16[1024]{0} all-reduce(%b), channel_id=2, to_apply=%add
}
"""


def test_traffic_counts_loops_and_only_what_is_taken():
  traffic = program.read_traffic(PROGRAM)
  assert traffic.cycles == 5 * 9 + 70
  assert traffic.counts == {'collective-permute': 5, 'all-reduce': 1, 'reduce-scatter': 1, 'all-gather': 2}
  # Of four devices each sends 3/4 of a sum twice; of two, half of what is scattered or gathered once.
  assert traffic.sent == {
    'collective-permute': 5 * 1024,
    'all-reduce': 1.5 * 2048,
    'reduce-scatter': 2048 / 2,
    'all-gather': 512 / 2 + 0.75 * 1024,
  }
  # Each turn reads a row and its index into memory beside the processor; the sum is read and written.
  assert traffic.hbm_bytes == 5 * (1024 + 4) + 2 * 2048


# As libtpu writes them: a quarter of one parameter and the whole of another are fetched beside the processor, values
# are gathered in two steps, and a custom kernel runs.
ASYNC = """HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (a: f32[32,256], b: f32[256]) -> f32[32,256] {
  %a = f32[32,256]{1,0:T(8,128)} parameter(0)
  %b = f32[256]{0:T(256)} parameter(1)
  %slice-start.1 = ((f32[32,256]{1,0:T(8,128)}), f32[8,256]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a)
  %copy-start.1 = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%b), backend_config={"x":[]}
  %slice-done.1 = f32[8,256]{1,0:T(8,128)S(1)} slice-done(%slice-start.1)
  %copy-done.1 = f32[256]{0:T(256)S(1)} copy-done(%copy-start.1)
  %whole = f32[8,256]{1,0:T(8,128)S(1)} custom-call(%slice-done.1), custom_call_target="ConcatBitcast"
  %sum = f32[8,256]{1,0:T(8,128)S(1)} fusion(%whole, %copy-done.1), kind=kLoop, calls=%x, metadata={op_name="text/mlp"}
  %gather-start = (f32[8,256]{1,0:S(1)}, f32[32,256]{1,0}) all-gather-start(%sum), replica_groups=[1,4]<=[4]
  %gather-done = f32[32,256]{1,0} all-gather-done(%gather-start)
  ROOT %kernel = f32[32,256]{1,0} custom-call(%gather-done), custom_call_target="tpu_custom_call", backend_config=\
{"custom_call_config":{"body":"","cost_estimate":{"flops":"900","transcendentals":"70","bytes_accessed":"65536"}}}
}
""".replace('\\\n', '')


def test_asynchronous_operations_count_once_with_what_they_move():
  traffic = program.read_traffic(ASYNC)
  # The slice (8 KiB) and the copy (1 KiB) are read; gathered values (32 KiB) are written; the kernel states 64 KiB.
  assert traffic.hbm_bytes == (8 + 1 + 32 + 64) * 1024
  assert traffic.sent == {'all-gather': 0.75 * 32 * 1024} and traffic.counts == {'all-gather': 1}
  assert traffic.kernels == program.Kernels(1, 900, 70, 65536)
  # What the compiler adds belongs to where its result is used, or where its operands come from.
  assert {name: cost.hbm_bytes for name, cost in traffic.by_name.items()} == {'text/mlp': 105 * 1024}


def test_real_programs_read_inputs_and_write_outputs_once():
  """Prefetches, a loop, a sum over chips and a kernel: fused so that nothing else needs the main memory."""
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('needs libtpu')
  command = [sys.executable, '-m', 'tests.aot.small_programs']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout)
  mib = 2**20
  assert found['loop']['hbm_bytes'] == pytest.approx((0.5 + 6 + 0.5) * mib, rel=0.05) and found['loop']['cycles'] > 0
  assert found['two']['hbm_bytes'] == pytest.approx(3 * 31.25 * mib, rel=0.05)
  assert found['summed']['counts'] == {'all-reduce': 1}
  assert found['summed']['sent'] == {'all-reduce': 1.5 * 2 * mib}
  # Attention and its gradients, of which two devices divide the samples and two the heads. Beside the kernels the bias
  # is added to query, key and value, and nothing is copied.
  for name in ('v5e', 'v5p', 'v6e'):
    assert found[name]['kernels'][0] == 2 and not found[name]['counts'], found[name]
    assert found[name]['hbm_bytes'] < 1.5 * found[name]['kernels'][3], found[name]
  assert found['kernel']['kernels'] == [1, 1e9, 1e6, 2 * mib] and found['kernel']['hbm_bytes'] >= 2 * mib


@pytest.mark.parametrize(
  'groups, size',
  [
    ('replica_groups={{0,2,4},{1,3,5}}', 3),
    ('replica_groups=[4,2]<=[8]', 2),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', 4),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", 4),
    ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}", 8),
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}", 4),
    ('replica_groups={}', 8),
    ('channel_id=1', 8),
  ],
)
def test_how_many_devices_a_collective_joins(groups, size):
  assert program._group_size(f'channel_id=1, {groups}, dimensions={{0}}', 8) == size


def test_a_loop_whose_turns_the_compiler_names():
  named = PROGRAM.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
  assert program.read_traffic(named).counts['collective-permute'] == 7


@pytest.mark.parametrize('name', ['v5e', 'v3:2x2', 'v5e:4', '16x16', 'v5e:axb', 'h100:2x8', 'h100:9'])
def test_no_such_topology(name):
  with pytest.raises(ValueError, match='as in v5e:16x16|1 to 8 GPUs'):
    chips.find_topology(name)


def topology(count: int) -> chips.Topology:
  return chips.Topology('v5e:8x8', chips.CHIPS['v5e'], count, [None] * count)


def compiled(gib: float) -> step.CompiledStep:
  """A step of 2 s by arithmetic and 3 s by its cycles, beside a kernel of 1.5 s by both its units."""
  kernels = program.Kernels(1, 197e12 / 2, 1024 * 1.5e9, 819e9 / 4)
  cost = program.Cost(819e9 / 2, int(4.5e9), 7, kernels)
  traffic = program.Traffic(
    **vars(cost), sent={'all-reduce': 100e9}, counts={'all-reduce': 300}, by_name={'vision/stage0_block1/attn': cost}
  )
  size = int(gib * 2**30)
  return step.CompiledStep(
    step.Memory(size, 0, 0, 0), size, traffic, 64 * 197e12 * 2, 1.0, 2.0, 2, step.State(2**30, 2**30)
  )


def test_metrics():
  config = tiny_config()
  config.batch_size, config.total_steps = 4096, 24 * 60 * 60
  found = report.make_report(config, topology(64), compiled(8))
  assert found['roofline_s'] == {'arithmetic': 2.0, 'memory': 0.5, 'collectives': 0.5 + 300e-6}
  assert (found['limited_by'], found['images_per_s'], found['days'], found['fits']) == ('arithmetic', 2048, 2.0, True)
  expected = {'step_s': 5.0003, 'share_of_peak': 0.4, 'images_per_s': 819, 'days': 5.0}
  assert found['expected'] == expected
  assert found['parts']['stage 0: attention'] == pytest.approx(
    dict(ms=4500, forward=4500, recomputed=0, backward=0, hbm_traffic_gib=819 / 2 / 1.073741824, operations=7), rel=1e-4
  )
  text = report.describe(found, config)
  assert '8.00 of 16.0 GiB' in text and 'does not fit' not in text and '5000.3 ms a step, 40.0% of the peak' in text
  assert 'beside 1 custom kernels, counted by their cost estimates' in text
  json.dumps(found)
  assert report.tabulate([found]).splitlines()[-1] == (
    '| v5e:8x8 | 64 | 64 | 8.0 of 16 | **5000.3** | 40% | 2000.0 | 500.0 | 500.3 | 819 | 5.00 | 7,680 | 1 |'
  )
  assert (
    report.tabulate_parts(found).splitlines()[-1].startswith('| stage 0: attention | 4500.0 | 100.0% | 4500.0 | 0.0')
  )


@pytest.mark.parametrize(
  'op_name, part, phase',
  [
    ('jit(train_step)/jvp(M.vision_features)/vision/patch_embed/dot', 'patch embedding', 'forward'),
    (
      'transpose(jvp(M.vision_features))/vision/stage0/checkpoint/rematted_computation/stage0_block3/attn/exp',
      'stage 0: attention',
      'recomputed',
    ),
    ('transpose(jvp(M.vision_features))/vision/stage1/stage1_grouping/assign/dot', 'stage 1: grouping', 'backward'),
    ('jit(train_step)/jvp(jvp(M.text_features))/text/block7/mlp/fc1/dot', 'text tower: MLPs', 'forward'),
    ('jit(train_step)/transpose(jvp(multi_label_loss))/dot', 'losses', 'backward'),
    ('jit(train_step)/optimizer/mul', 'optimizer', 'forward'),
    ('', 'rest', 'forward'),
  ],
)
def test_parts_of_the_paper(op_name, part, phase):
  assert (report.part_of(op_name), report.pass_of(op_name)) == (part, phase)


def test_a_program_that_jaxlib_cannot_read_leaves_the_rest_known():
  """As of v6e, with jaxlib 0.10.2: the compiled program names operations that it does not know."""
  config = tiny_config()
  config.batch_size, config.total_steps = 4096, 24 * 60 * 60
  found = report.make_report(config, topology(64), compiled(8)._replace(traffic=None))
  text = report.describe(found, config)
  assert '8.00 of 16.0 GiB' in text and 'jaxlib cannot read the program' in text and 'expected' not in found
  assert 'arithmetic 2000.0 ms; limited by arithmetic, as far as is known' in text
  assert '| ? | ? | 2000.0 | ? | ? | ? | ? | ? | 1 |' in report.tabulate([found])


def test_advice_takes_what_costs_least_first():
  config = tiny_config()
  config.batch_size = 64 * 2
  advised = []
  for change in ({}, {'remat': 'dots'}, {'grad_accum_steps': 2}, {'remat': 'blocks'}):
    config.update(change)
    found = report.make_report(config, topology(64), compiled(17))
    assert '1.00 GiB of parameters and optimiser, of which a chip holds 1.00' in report.describe(found, config)
    assert not found['fits']
    advised.append(report.describe(found, config).splitlines()[-1])
  for text, key in zip(advised, ('remat=dots', 'grad_accum_steps=2', 'remat=blocks', 'mesh.fsdp=64'), strict=True):
    assert 'does not fit' in text and key in text


def test_pairs_of_a_device_are_those_of_the_mesh():
  """With heads over two devices, or two devices to a chip, advice on micro-batches is not by chips."""
  config = tiny_config()
  config.batch_size, config.remat, config.mesh.model = 64 * 2, 'dots', 2
  found = report.make_report(config, topology(64)._replace(devices=[None] * 128), compiled(17)._replace(rows=4))
  assert (found['pairs_a_device'], found['devices']) == (4, 128)
  config.grad_accum_steps = 2
  assert 'grad_accum_steps=4' in report.advise(config, found)
  config.grad_accum_steps, config.remat = 4, 'blocks'
  assert 'mesh.fsdp=64' in report.advise(config, found)


def compile_for(topologies: str, folder: pathlib.Path, *flags: str) -> tuple[int, list[dict], str]:
  """Exit code, reports and output of the command."""
  if not CUDA.exists() if topologies.startswith('h100') else importlib.util.find_spec('libtpu') is None:
    pytest.skip('needs the compiler for TPUs, or for GPUs, as make test-new has it')
  command = [
    sys.executable,
    '-m',
    'groupvit_jax.aot',
    '--config=tests/tiny_run.py',
    f'--topology={topologies}',
    f'--json={folder / "out.json"}',
    *flags,
  ]
  environment = os.environ | {'PYTHONPATH': str(CUDA)}
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
  assert (folder / 'out.json').exists(), done.stderr
  return done.returncode, json.loads((folder / 'out.json').read_text()), done.stdout


def test_compiles_for_a_tpu(tmp_path):
  code, (found,), text = compile_for('v5e:2x2', tmp_path, '--by_scope')
  assert code == 0 and found['chips'] == 4 and found['fits'], text
  assert found['expected']['step_s'] >= found['step_s'] and '| stage 0: attention |' in text
  assert found['parts']['rest']['ms'] < 0.4 * sum(part['ms'] for part in found['parts'].values())
  assert found['collectives']['all-reduce']['count'] > 0 and found['compile_cpu_s'] > 0
  operations = sum(part['operations'] for part in found['parts'].values())
  cost = {'operations': operations} | {name: found[name] for name in RECORDED if name != 'operations'}
  assert cost == pytest.approx(RECORDED, rel=TOLERANCE), json.dumps(cost)
  assert found['custom_kernels'] == 2 * 4, 'attention of two stages, of grouping and of texts, forward and backward'


def test_compiles_for_a_gpu(tmp_path):
  """In float32: cuDNN, which other dtypes take, is 1 GiB."""
  code, (found,), text = compile_for('h100:4', tmp_path, '--by_scope')
  assert code == 0 and found['chips'] == 4 and found['fits'] and 'expected' not in found, text
  assert '| stage 0: attention |' in text and f'{found["operations"]:,} in a step' in text
  assert found['collectives']['all-reduce']['count'] > 0
  assert {name: found[name] for name in RECORDED_OF_A_GPU} == pytest.approx(RECORDED_OF_A_GPU, rel=TOLERANCE), found


def test_gpus_without_their_compiler_are_a_mistake_in_one_line():
  with pytest.raises(UserError, match=r"cannot compile for --topology=h100:8: .*pip install 'jax\[cuda13\]'"):
    chips.find_topology('h100:8')


@pytest.mark.long
def test_compiles_for_all_chips(tmp_path):
  """A host of each kind: the same arithmetic, and gradients as large to add up."""
  code, reports, text = compile_for('v4:2x2x1,v5e:2x2,v5p:2x2x1,v6e:2x2,tpu7x:2x2x1', tmp_path)
  assert code == 0, text
  for found in reports:
    assert found['chips'] == 4 and found['fits'] and found['collectives']['all-reduce']['count'] > 0, found
    assert found['devices'] == (8 if found['topology'].startswith('tpu7x') else 4)
  assert len({found['gflop'] for found in reports}) == 1


@pytest.mark.long
def test_says_what_to_change_where_a_step_does_not_fit(tmp_path):
  size = ('--config.batch_size=65536', '--config.model.vision.image_size=(224, 224)', '--config.model.vision.width=384')
  code, (found,), text = compile_for('v5e:1x1', tmp_path, *size)
  assert code == cli.EXIT_PARTIAL and not found['fits'] and 'set --config.remat=dots' in text, text
