"""Attention by measurement: what is chosen, what is said of it, and that a run keeps it."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from groupvit_jax.running import attention_choice, sharding
from groupvit_jax.running.attention_choice import AttentionChoice, choose_attention, choose_fastest, time_attention
from groupvit_jax.train import workdir
from tests.tiny import tiny_model


def test_the_faster_one_is_chosen():
  assert choose_fastest({'xla': 2e-3, 'cudnn': 1e-3}.get, 'steps') == (
    'cudnn',
    'steps take 1.00 ms with cuDNN, 2.00 ms with XLA',
    True,
  )
  assert choose_fastest({'xla': 1e-3, 'cudnn': 2e-3}.get, '').implementation == 'xla'
  assert choose_fastest({'xla': 1e-3, 'cudnn': 0.99e-3}.get, '').implementation == 'xla'  # no more than noise


def test_what_does_not_run_is_left_alone():
  """cuDNN on a CPU is refused by JAX itself; where XLA's has no room, cuDNN's may."""
  mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
  place = NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None, 'model'))
  choice = choose_fastest(lambda name: time_attention(name, (4, 8, 2, 8), jnp.bfloat16, place, train=True), '')
  assert choice.implementation == 'xla' and choice.reason.startswith('cuDNN does not run: ')

  def no_room(name):
    if name == 'xla':
      raise RuntimeError('out of\n memory')
    return 1e-3

  assert choose_fastest(no_room, '') == ('cudnn', "XLA's does not run: out of memory", True)


def test_all_processes_come_to_one_choice(monkeypatch):
  """Another one is slower, or has no cuDNN."""
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  others = lambda *times: monkeypatch.setattr(
    attention_choice.multihost_utils, 'process_allgather', lambda own: jnp.stack([own, jnp.array(times)])
  )
  others(1e-3, 3e-3)
  assert choose_fastest({'xla': 2e-3, 'cudnn': 1e-3}.get, '').implementation == 'xla'
  others(1e-3, jnp.inf)
  assert choose_fastest({'xla': 2e-3, 'cudnn': 1e-3}.get, '').reason == 'cuDNN does not run: not in another process'


def test_every_stage_is_measured():
  assert attention_choice.stage_shapes(tiny_model().vision, 8) == [
    (1, (8, 20, 2, 4)),
    (1, (8, 6, 2, 4)),
    (1, (8, 2, 2, 4)),
  ]
  mesh = sharding.make_mesh()
  assert choose_attention(tiny_model().vision, 8, mesh, train=True) == (
    'xla',
    'cuDNN is for NVIDIA GPUs, this is a cpu',
    False,
  )


def test_one_cpu_device_encodes_in_parts():
  """Several would have to hand each other theirs."""
  one, tower = sharding.make_mesh(devices=jax.devices()[:1]), tiny_model().vision
  assert attention_choice.with_fastest_attention(tiny_model(), one).vision.attention == 'xla_in_parts'
  assert choose_attention(tower, 8, one, train=True).implementation == 'xla'
  assert choose_attention(tower, 8, sharding.make_mesh(), train=False).implementation == 'xla'


def test_a_run_keeps_what_was_measured(tmp_path):
  """A second start elsewhere measures again; what is known without measuring leaves nothing behind."""
  prepare = lambda place, *choice: workdir.prepare_attention(tmp_path, place, lambda: AttentionChoice(*choice))
  assert prepare('a CPU', 'xla', 'a CPU') == ('xla', 'a CPU', False) and not list(tmp_path.iterdir())
  assert prepare('8 GPUs', 'cudnn', 'faster', True).reason == 'faster'
  assert prepare('8 GPUs', 'xla', 'faster today', True) == ('cudnn', 'faster (when the run first trained here)', True)
  assert prepare('1 GPU', 'xla', 'faster here', True).implementation == 'xla'
  assert prepare('8 GPUs', 'xla', '', True).implementation == 'cudnn'
