"""Both towers as StableHLO: weights inside, any batch and picture size, for CPU, CUDA and TPU, run by jax alone."""

from collections.abc import Callable, Mapping
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from groupvit_jax.interop import state_dicts
from groupvit_jax.model.pixels import normalize_images

PLATFORMS = ('cpu', 'cuda', 'tpu')


def export_image_tower(spec: state_dicts.ModelSpec, variables: Mapping, dtype: np.dtype) -> jax.export.Exported:
  """The image side: uint8 pictures [b, H, W, 3], H and W any multiples of the patch size -> a dict.

  Its keys: `image_embeds` [b, E] and `segment_embeds` [b, S, E], projected and not normalised, and `assignments`, a
  list with the soft assignment [b, S, N] of each grouping stage.

  Args:
    spec: the model.
    variables: {'params': ..., 'batch_stats': ...}.
    dtype: of the weights and of the computation.
  """
  apply = _bind(spec, variables, dtype)

  def encode(images: jax.Array) -> dict[str, Any]:
    return apply(normalize_images(images), method='encode_segments')._asdict()

  patch = spec.config.vision.patch_size
  return _export(encode, f'b, {patch}*h, {patch}*w, 3', jnp.uint8)


def export_text_tower(spec: state_dicts.ModelSpec, variables: Mapping, dtype: np.dtype) -> jax.export.Exported:
  """The text side: ids int32 [b, L] of the full context length -> embeddings [b, E], projected and not normalised."""
  apply = _bind(spec, variables, dtype)
  return _export(functools.partial(apply, method='encode_text'), f'b, {spec.config.text.context_length}', jnp.int32)


def measure_latency(exported: jax.export.Exported, shape: tuple[int, ...], repeats: int = 5) -> float:
  """Median seconds of a call with an array of that shape on the default device, compiled before."""
  run, x = jax.jit(exported.call), jnp.zeros(shape, exported.in_avals[0].dtype)
  jax.block_until_ready(run(x))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(x))
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds))


def _bind(spec: state_dicts.ModelSpec, variables: Mapping, dtype: np.dtype) -> Callable[..., Any]:
  """`model.apply` over weights that become constants, stored in `dtype`; modules compute in it but for norms."""
  config = spec.config.copy_and_resolve_references()
  config.dtype = dtype.name
  model = spec._replace(config=config).build()
  stored = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), variables)

  def apply(*args: jax.Array, **kwargs: Any) -> Any:
    return model.apply(jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(jnp.float32), stored), *args, **kwargs)

  return apply


def _export(function: Callable[[jax.Array], Any], shape: str, dtype: jnp.dtype) -> jax.export.Exported:
  """The function of one array, in whose shape letters are sizes that are free."""
  sizes = jax.export.symbolic_shape(shape)
  return jax.export.export(jax.jit(function), platforms=PLATFORMS)(jax.ShapeDtypeStruct(sizes, dtype))
