"""Both towers as StableHLO bundles: weights inside, any batch and image size, on CPU, CUDA and TPU."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from groupvit_jax.interop import state_dicts

PLATFORMS = ('cpu', 'cuda', 'tpu')


def export_image_tower(spec: state_dicts.ModelSpec, variables: Mapping, dtype: np.dtype) -> jax.export.Exported:
  """The image tower: uint8 images [b, H, W, 3], H and W any multiples of the patch size -> a dict.

  Its keys: `image_embeds` [b, E] and `segment_embeds` [b, S, E], projected and not normalised, and `assignments`, a
  list with the soft assignment [b, S, N] of each grouping stage. Weights and computation have the `dtype`.
  """
  apply = _bind(spec, variables, dtype)
  patch = spec.config.vision.patch_size
  return _export(
    lambda images: apply(images, method='encode_pixels')._asdict(), f'b, {patch}*h, {patch}*w, 3', jnp.uint8
  )


def export_text_tower(spec: state_dicts.ModelSpec, variables: Mapping, dtype: np.dtype) -> jax.export.Exported:
  """The text tower: ids int32 [b, L] of the full context length -> embeddings [b, E], projected, not normalised."""
  apply = _bind(spec, variables, dtype)
  return _export(functools.partial(apply, method='encode_text'), f'b, {spec.config.text.context_length}', jnp.int32)


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
  """Exports a function of one array; letters in its shape are free sizes."""
  sizes = jax.export.symbolic_shape(shape)
  return jax.export.export(jax.jit(function), platforms=PLATFORMS)(jax.ShapeDtypeStruct(sizes, dtype))
