"""When two computations of the same arrays agree."""

import jax
import numpy as np

from groupvit_jax.running import sharding

_NOTHING = 1e-5  # of a tree's largest entry: gradients are either above a thousandth, or zero and what rounding leaves


def assert_agree(one, other, share: float, what: object = '') -> None:
  """Every array of a tree agrees to a share of its own largest entry.

  Some gradients are zero, as of biases that a normalisation or a softmax takes out again, and computed as sums that
  cancel. So an array without an entry above 1e-5 of the tree's largest need only stay below that.

  Args:
    one: arrays on the host, as the gradients of a model.
    other: the same, computed in another way.
    share: that an entry may differ by.
    what: for the message.
  """
  nothing = _NOTHING * max(np.abs(leaf).max() for leaf in jax.tree.leaves(one))
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
    scale = np.abs(a).max()
    np.testing.assert_allclose(
      a, b, rtol=0, atol=share * scale if scale > nothing else nothing, err_msg=f'{what} {sharding.path_name(path)}'
    )
