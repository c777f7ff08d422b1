"""Patterns of paths that would fill memory, or take hours."""

import time
import tracemalloc

import pytest

from groupvit_jax.errors import UserError
from groupvit_jax.storage import expand_braces, find_shards


def test_a_pattern_is_counted_before_it_is_expanded():
  tracemalloc.start()
  try:
    with pytest.raises(UserError, match='stands for 1,000,000,000,000,000,000 paths'):
      expand_braces('{000000..999999}{0..999999}{0..999999}')
    assert tracemalloc.get_traced_memory()[1] < 2**20
  finally:
    tracemalloc.stop()


def test_a_path_among_many_that_is_named_twice_is_found_at_once():
  began = time.monotonic()
  with pytest.raises(UserError, match='name /nowhere/99999.tar twice'):
    find_shards(['/nowhere/{0..99999}.tar', '/nowhere/99999.tar'], 'data.sets.a')
  assert time.monotonic() - began < 5
