"""The speed benchmarks: FLOPs by hand are those of the traced model, and the table says what was found."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import caption_lengths, gpu_report, model_flops, our_model, rounds, speed, speed_table, train_step
from groupvit_jax.aot import flops
from groupvit_jax.model.build import build_model
from tests.weights import random_variables


def test_flops_by_hand_are_those_of_the_traced_model():
  """Of GroupViT-S/16 on one picture and four texts: tower by tower, and with projectors."""
  config = our_model.make_config(1, 'float32', 0).model
  model = build_model(config, vocab_size=9, eos_id=1, multi_label=True)
  shapes = jax.eval_shape(lambda: random_variables(model))
  traced = lambda method, *args: flops.matmul_flops(
    jax.make_jaxpr(lambda variables: model.apply(variables, *args, method=method))(shapes).jaxpr
  )
  assert traced('encode_image', jnp.zeros((1, 224, 224, 3))) == model_flops.encode_images(config, 1, 224)
  # At another size, positions are resized: those products are no part of the model.
  assert traced('encode_image', jnp.zeros((1, 448, 448, 3))) == pytest.approx(
    model_flops.encode_images(config, 1, 448), rel=1e-2
  )
  assert traced('encode_segments', jnp.zeros((1, 224, 224, 3))) == model_flops.encode_windows(config, 1, 224)
  text = model_flops.text_tower(config.text, [77] * 4) + 4 * model_flops.projector(256, 4096, 256)
  assert traced('encode_text', jnp.zeros((4, 77), int)) == text
  step = model_flops.train_step(config, [[77] * 4] * 2)
  assert step == 3 * (model_flops.encode_images(config, 2, 224) + 2 * text + 2 * 2 * 8 * 256)


def test_flops_of_a_step_by_hand_are_those_of_the_traced_one():
  """Twice the forward pass for gradients: but pixels need none, and losses compute their logits again."""
  config = our_model.make_config(4, 'float32', text_budget=0)
  config.remat = 'none'
  model = build_model(config.model, vocab_size=our_model.VOCAB, eos_id=1, multi_label=True)
  step, state, batch = our_model.abstract_step(config, model)
  traced = flops.matmul_flops(jax.make_jaxpr(step)(state, batch).jaxpr)
  assert traced == pytest.approx(model_flops.train_step(config.model, [[77] * 4] * 4), rel=0.02)


def test_texts_are_as_long_as_those_of_cc12m():
  lengths = caption_lengths.draw_lengths(20_000, 3, 77)
  assert lengths.shape == (20_000, 4) and lengths.max() == 77 and lengths.min() >= 4
  words = (lengths[:, 0] - 2) / caption_lengths.TOKENS_A_WORD
  assert words.mean() == pytest.approx(20.2, rel=0.05)  # cut at 77 tokens
  tokens = caption_lengths.draw_tokens(50, 3, 77, 1000)
  np.testing.assert_array_equal((tokens == 1).argmax(axis=-1) + 1, caption_lengths.draw_lengths(50, 3, 77))


class FakeSide:
  """Works at a rate of its own, or ends when it is told to."""

  def __init__(self, name: str):
    self.facts = {'first_s': 3.0, 'device': 'cpu', 'product_flop': 1e9, 'jax': 'J', 'torch': 'T', 'transformers': 'F'}
    self.name, self.peak_mb, self.running = name, 2048, True
    self.facts |= {'compile_s': 2.0, 'temporaries_mb': 512} if name == 'ours' else {}

  def run(self, work: str, pictures: int, before: int) -> rounds.Rate:
    assert self.running and pictures % before == 0  # a step of the batch
    if self.name == 'eager, padded to the longest':
      raise SystemExit('out of memory')
    return rounds.Rate(0.0, 100.0 if work == 'multiply' else {'ours': 4.0, 'eager': 2.0}[self.name])

  def ready(self, seconds: float) -> bool:
    return self.name != 'torch.compile'

  def release(self) -> None:
    pass

  def close(self) -> None:
    self.running = False

  kill = close


@pytest.fixture
def report(monkeypatch, tmp_path):
  """What train_step.py writes, of fake sides."""

  def make(*options: str, **facts) -> dict:
    def start(work, args, name):
      side = FakeSide(name)
      side.facts |= facts
      return side

    monkeypatch.setattr(speed, 'start', start)
    monkeypatch.setattr(sys, 'argv', ['train_step', f'--output={tmp_path}/report.json', *options])
    train_step.main()
    return json.loads((tmp_path / 'report.json').read_text())

  return make


def test_reports_hold_every_round_and_what_did_not_run(report):
  found = report('--peer_modes', 'eager', '--rounds=3')
  assert found['of_each_round'] == {'ours': [4.0] * 3, 'eager': [2.0] * 3} and found['ratio_to'] == {'eager': 2.0}
  assert found['cores'] == len(os.sched_getaffinity(0)) and found['machine_gflop_per_s'] == 100
  alone = report('--peer_modes')
  assert alone['ratio_to'] == {} and '| training' in speed_table.table([alone])
  gpu = report(
    '--device=gpu', '--dtype=bfloat16', '--peer_modes', 'eager', 'eager, padded to the longest', device='NVIDIA H200'
  )
  assert gpu['failed'] == {'eager, padded to the longest': 'out of memory'} and gpu['ratio_to'] == {'eager': 2.0}
  assert gpu['utilisation_of_published']['ours'] == pytest.approx(4 * gpu['model_gflop'] / 8 / 989.4e3)


def test_modes_of_the_peer():
  huge = [mode for mode in speed.usual_modes('train', 'cpu') if mode not in speed.usual_modes('train', 'gpu')]
  assert huge == [mode for mode in speed.TRAINING_MODES if 'huge pages' in mode] != []
  assert speed.usual_modes('windows', 'gpu') == ['eager', 'torch.compile']


def test_a_gpu_is_measured_with_what_is_ready(monkeypatch, tmp_path, capsys):
  started = []

  def start(work, args, name, wait):
    started.append((args.batch, name))
    return FakeSide(name)

  monkeypatch.setattr(speed, 'start', start)
  for name in ('XLA_FLAGS', 'XLA_PYTHON_CLIENT_PREALLOCATE'):
    monkeypatch.setenv(name, '')  # what is set meanwhile does not stay
  monkeypatch.setattr(sys, 'argv', ['gpu_report', str(tmp_path), '--plans', 'train_256', 'train_1024'])
  gpu_report.main()
  assert started == [(256, 'eager'), (256, 'ours'), (256, 'torch.compile'), (1024, 'ours')]  # eager ends before
  small, large = (json.loads((tmp_path / f'train_{batch}.json').read_text()) for batch in (256, 1024))
  assert small['ratio_to'] == {'eager': 2.0} and small['failed'] == {'torch.compile': 'not ready in time'}
  assert large['pictures_per_s'] == {'ours': 4.0} and large['steps'] == 5


def test_the_tables_hold_what_was_measured(report):
  of_cpu = report('--peer_modes', 'eager', '--growth')
  of_gpu = report('--device=gpu', '--dtype=bfloat16', '--peer_modes', 'eager', device='NVIDIA H200', torch='T2')
  table = speed_table.table([of_cpu, of_gpu])
  row = '| training, 224 px, batch 8 | transformers, eager | 2.00 | **2.00x** | 2.0 GiB |'
  assert table.count(row) == 2 and '| NVIDIA H200, bfloat16 | |' in table
  assert table.count('PyTorch T,') == 1 and table.count('PyTorch T2,') == 1
  growth = speed_table.growth_table([of_cpu, of_gpu]).splitlines()
  assert [line.split(' | ')[1:4] for line in growth[2:]] == [
    [str(batch), str(size), '4.00'] for batch, size in ((4, 224), (8, 224), (16, 224), (8, 160), (8, 320))
  ]
  page = speed_table.insert('a\n<!-- x: benchmarks/speed_table.py -->\nold\n<!-- end of x -->\nb', 'x', table)
  assert row in page and 'old' not in page and page.startswith('a\n') and page.endswith('\nb')
  with pytest.raises(ValueError, match='lacks the marks'):
    speed_table.insert('a', 'x', 'b')


def test_the_step_of_a_config_as_json():
  command = [sys.executable, '-m', 'benchmarks.config_step', '--config=tests/tiny_run.py', '--steps=1']
  found = json.loads(subprocess.run(command, cwd=rounds.ROOT, check=True, capture_output=True, text=True).stdout)
  assert found['batch_size'] == 8 and found['gflop_per_step'] > 0
  assert found['images_per_s'] == pytest.approx(8 * found['steps_per_s'], rel=0.01)
  assert found['compile_s'] > 0 and found['images_per_s_with_input'] > 0
