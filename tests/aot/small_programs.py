"""Prints, as JSON, the traffic of small programs that the TPU compiler made, by name.

A process of its own: JAX's profiler ends one that has loaded libtpu without a TPU.
"""

import dataclasses
import json

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from groupvit_jax.aot import chips, program
from groupvit_jax.model.tpu_attention import TpuAttention
from groupvit_jax.running import sharding


def compile_small(function, *shapes: tuple[int, ...], topology: str = 'v5e:1x1') -> dict[str, object]:
  """Traffic of a function of float32 arrays, divided over the chips by their first axes."""
  mesh = jax.sharding.Mesh(chips.find_topology(topology).devices, ('data',))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows) for shape in shapes]
  traffic = program.read_traffic(jax.jit(function).lower(*args).compile().as_text())
  return {name: getattr(traffic, name) for name in ('hbm_bytes', 'cycles', 'counts', 'sent', 'kernels')}


def attention(topology: str, dtype: jnp.dtype, masked: bool) -> dict[str, object]:
  """Traffic of the kernel, forward and backward, of 20 tokens and 4 heads."""
  mesh = sharding.make_mesh(model=2, devices=chips.find_topology(topology).devices)
  how, spread = TpuAttention(mesh).padded(20), PartitionSpec('data', None, 'model')
  array = lambda *shape, spec=spread, dtype=dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=NamedSharding(mesh, spec)
  )
  texts = array(4, 24, spec=PartitionSpec('data'), dtype=jnp.int32) if masked else None

  def both(qkv, grad, texts):
    out, pull = jax.vjp(lambda qkv: how.attend([qkv], [jnp.zeros(768, dtype)], 4, texts), qkv)
    return out, pull(grad)

  compiled = jax.jit(both).lower(array(4, 24, 768), array(4, 24, 256), texts).compile()
  traffic = program.read_traffic(compiled.as_text())
  return {name: getattr(traffic, name) for name in ('hbm_bytes', 'counts', 'kernels')}


def main() -> None:
  jax.config.update('jax_enable_compilation_cache', False)  # programs of absent chips cannot be read back
  cost = pl.CostEstimate(flops=10**9, transcendentals=10**6, bytes_accessed=2 * 2**20)
  double = lambda x, out: out.__setitem__(..., 2 * x[...])
  kernel = pl.pallas_call(double, jax.ShapeDtypeStruct((512, 512), jnp.float32), cost_estimate=cost)
  scan = lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), ()), x, w)[0]
  found = {
    'loop': compile_small(scan, (256, 512), (6, 512, 512)),
    'two': compile_small(lambda x, y: (jnp.sin(x) * 2, jnp.sum(x * y, 0)), (32000, 256), (32000, 256)),
    'summed': compile_small(lambda x: x.sum(0), (4, 1024, 512), topology='v5e:2x2'),
    'kernel': compile_small(kernel, (512, 512)),
    'v5e': attention('v5e:2x2', jnp.bfloat16, masked=True),
    'v5p': attention('v5p:2x2x1', jnp.float32, masked=False),
    'v6e': attention('v6e:2x2', jnp.bfloat16, masked=False),
  }
  print(json.dumps(found, default=dataclasses.astuple))


if __name__ == '__main__':
  main()
