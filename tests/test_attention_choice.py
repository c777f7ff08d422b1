"""Attention by measurement: what is chosen, and what is said of it."""

import jax
import jax.numpy as jnp
import pytest

from groupvit_jax.attention_choice import choose_attention, fastest, seconds
from tests.tiny import tiny_model

ON_GPU = jax.default_backend() == 'gpu'


def test_the_faster_one_is_chosen():
  assert fastest({'xla': 2e-3, 'cudnn': 1e-3}.get) == (
      'cudnn', 'forward and backward take 1.00 ms with cuDNN, 2.00 ms with XLA')
  assert fastest({'xla': 1e-3, 'cudnn': 2e-3}.get).implementation == 'xla'
  assert fastest({'xla': 1e-3, 'cudnn': 0.99e-3}.get).implementation == 'xla'  # no more than noise


@pytest.mark.skipif(ON_GPU, reason='cuDNN may run there')
def test_what_does_not_run_is_left_alone():
  """cuDNN on a CPU is refused by JAX itself."""
  choice = fastest(lambda implementation: seconds(implementation, (1, 8, 2, 8), jnp.bfloat16))
  assert choice.implementation == 'xla' and choice.reason.startswith('cuDNN does not run: ')
  assert choose_attention(tiny_model().vision, 1) == ('xla', 'cuDNN is for NVIDIA GPUs, this is a cpu')


@pytest.mark.skipif(not ON_GPU, reason='cuDNN is for NVIDIA GPUs')
def test_a_gpu_is_measured():
  assert 'forward and backward take' in choose_attention(tiny_model(dtype=jnp.bfloat16).vision, 2).reason
