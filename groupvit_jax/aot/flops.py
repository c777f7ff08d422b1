"""FLOPs of a traced program, loops included; the compiler counts the body of a loop once."""

import math

import jax
import jax.extend.core


def matmul_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
  """Floating-point operations of matmuls and convolutions, loops counted as often as they run."""
  total = 0
  for eqn in jaxpr.eqns:
    shapes = [var.aval.shape for var in eqn.invars]
    out = math.prod(eqn.outvars[0].aval.shape) if eqn.outvars else 0
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      total += 2 * out * math.prod(shapes[0][axis] for axis in contracted)
    elif eqn.primitive.name == 'conv_general_dilated':
      kernel_out = shapes[1][eqn.params['dimension_numbers'].rhs_spec[0]]
      total += 2 * out * math.prod(shapes[1]) // kernel_out
    inner = [
      getattr(x, 'jaxpr', x)
      for x in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr'))
    ]
    counts = [matmul_flops(x) for x in inner if hasattr(x, 'eqns')]
    # Of a conditional's branches one is run: they differ by platform here, and compute the same.
    total += max(counts, default=0) if eqn.primitive.name == 'cond' else _times(eqn) * sum(counts)
  return total


def _times(eqn: jax.extend.core.JaxprEqn) -> int:
  """How often an operation runs what it contains, all devices together."""
  if eqn.primitive.name == 'shard_map':
    return eqn.params['mesh'].size
  return eqn.params['length'] if eqn.primitive.name == 'scan' else 1
