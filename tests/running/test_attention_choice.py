"""Which attention is chosen for which hardware, and why."""

import jax
import pytest

from groupvit_jax.running import attention_choice, sharding
from groupvit_jax.running.attention_choice import choose_attention, choose_for_gpus
from tests.tiny import tiny_model


@pytest.mark.parametrize('errors, name', [([''], 'cudnn'), (['', 'no\n cuDNN 9'], 'xla')])
def test_cudnn_must_run_in_all_processes(errors, name, monkeypatch):
  """On a CPU, JAX itself refuses it."""
  model = tiny_model()
  assert choose_for_gpus(model).reason.startswith('cuDNN does not run: ')
  monkeypatch.setattr(attention_choice.processes, 'all_gather_objects', lambda _: errors)
  assert choose_for_gpus(model).implementation == name


def test_one_cpu_device_encodes_in_parts():
  """Several would have to hand each other theirs."""
  one, model = sharding.make_mesh(devices=jax.devices()[:1]), tiny_model()
  assert attention_choice.with_fastest_attention(model, one).vision.attention == 'xla_in_parts'
  assert choose_attention(model, one, train=True).implementation == 'xla'
  choice = choose_attention(model, sharding.make_mesh(), train=False)
  assert choice == ('xla', 'cuDNN is for NVIDIA GPUs, this is a cpu')
