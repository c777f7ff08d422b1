"""A batch in micro-batches, whose gradients are those of the whole batch."""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp


def map_micro_batches(
  function: Callable[[dict[str, jax.Array]], tuple[object, object]], batch: dict[str, jax.Array], num_steps: int
) -> tuple[object, object]:
  """Applies `function`, in which samples do not meet, to a batch in micro-batches.

  Differentiated, each micro-batch is computed a second time when its gradient is due, and only its inputs are kept
  until then: the memory of one micro-batch, for one more forward pass.

  Micro-batch i holds the rows r with r % num_steps == i. So each device computes rows that it has already.

  Args:
    function: batch -> (rows, sums): arrays [b, ...] of the samples in order, and sums over them.
    batch: arrays [B, ...]; num_steps divides B.
    num_steps: micro-batches; with 1 the function is simply called.

  Returns:
    Rows [B, ...] and sums of the whole batch.
  """
  if num_steps == 1:
    return function(batch)
  split = jax.tree.map(lambda x: x.reshape(-1, num_steps, *x.shape[1:]), batch)
  pick = lambda i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), split)
  # The compiler cannot merge the two computations across loops, so it need not be kept from it.
  apply = jax.checkpoint(lambda i: function(pick(i)), prevent_cse=False)
  rows, sums = lax.map(apply, jnp.arange(num_steps))  # [num_steps, B / num_steps, ...] and [num_steps, ...]
  rows = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)
  return rows, jax.tree.map(lambda x: x.sum(axis=0), sums)
