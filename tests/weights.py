"""Random variables in which no bias is zero and no norm neutral, made without compiling anything."""

import jax
import jax.numpy as jnp
import numpy as np

from groupvit_jax.interop.state_dicts import abstract_variables
from groupvit_jax.model.image_text import ImageTextModel


def random_variables(model: ImageTextModel, seed: int = 0) -> dict:
  """{'params': ..., 'batch_stats': ...} of float32 arrays."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    if name == 'var':
      return jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
    spread = 1.5 / np.sqrt(np.prod(leaf.shape[:-1])) if name == 'kernel' else 0.3
    return jnp.asarray((name == 'scale') + spread * rng.standard_normal(leaf.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, abstract_variables(model))
