"""Both towers as StableHLO bundles: weights inside, any batch and image size, on CPU, CUDA and TPU."""

from collections.abc import Callable, Mapping
import functools
import json
import math
import time
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.interop import state_dicts
from groupvit_jax.model.image_text import SegmentOutput

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
  """Exports a function of one array; letters in its shape are free sizes."""
  sizes = jax.export.symbolic_shape(shape)
  return jax.export.export(jax.jit(function), platforms=PLATFORMS)(jax.ShapeDtypeStruct(sizes, dtype))


class Sizes(NamedTuple):
  """Sizes of a vision or a text tower that evaluation asks for."""

  image_size: tuple[int, int]
  patch_size: int
  context_length: int


class ExportedTowers:
  """Both towers of a bundle behind the two methods of `ImageTextModel` that evaluation calls."""

  def __init__(self, image: jax.export.Exported, text: jax.export.Exported, sizes: Sizes, pad_id: int):
    self._image, self._text, self._pad_id = image, text, pad_id
    self.vision = self.text = sizes

  def apply(self, variables: Any, inputs: jax.Array, *, method: str) -> Any:
    """`ImageTextModel.apply` for 'encode_pixels' and 'encode_text'; the weights are in the towers.

    Args:
      variables: ignored.
      inputs: uint8 images [B, H, W, 3], or tokens [B, L].
      method: which of the two.
    """
    if method == 'encode_text':
      padding = self.text.context_length - inputs.shape[1]  # nothing after the end of a text matters
      return self._text.call(jnp.pad(inputs, ((0, 0), (0, padding)), constant_values=self._pad_id))
    if method != 'encode_pixels':
      raise UserError(f'an exported bundle has no {method!r}')
    height, width = (size - size % self.vision.patch_size for size in inputs.shape[1:3])
    out = self._image.call(inputs[:, :height, :width])
    return SegmentOutput(out['image_embeds'], out['segment_embeds'], tuple(out['assignments']))


def read_bundle(folder: epath.PathLike) -> tuple[ExportedTowers, dict[str, Any], Tokenizer]:
  """Reads a folder that `export --format=stablehlo` wrote.

  Returns:
    The towers, the variables that are not in them (the temperature), and the tokenizer.

  Raises:
    UserError: a file is missing or damaged.
  """
  folder = epath.Path(folder)
  try:
    metadata = json.loads((folder / 'bundle.json').read_text())
    image, text = (
      jax.export.deserialize(bytearray((folder / name).read_bytes())) for name in ('image.stablehlo', 'text.stablehlo')
    )
    sizes = Sizes(tuple(metadata['image_size']), metadata['patch_size'], metadata['context_length'])
    variables = {'params': {'logit_scale': math.log(metadata['logit_scale'])}}
    towers = ExportedTowers(image, text, sizes, metadata['pad_id'])
  except Exception as error:  # which one depends on what is missing or damaged
    raise UserError(f'{folder} is no whole bundle ({type(error).__name__}: {error}); export it again') from error
  return towers, variables, build_tokenizer(folder / 'tokenizer')
