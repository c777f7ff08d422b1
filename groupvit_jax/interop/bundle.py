"""Reads what `export --format=stablehlo` wrote, in the shape of a model: `Predictor` runs it like any other."""

import json
import math
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp

from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.model.image_text import SegmentOutput
from groupvit_jax.model.pixels import IMAGE_MEAN, IMAGE_STD


class Sizes(NamedTuple):
  """What evaluation asks of a vision or a text tower."""

  image_size: tuple[int, int]
  patch_size: int
  context_length: int


class ExportedTowers:
  """Both towers of a bundle behind the two methods of `ImageTextModel` that evaluation calls."""

  def __init__(self, image: jax.export.Exported, text: jax.export.Exported, sizes: Sizes, pad_id: int):
    """Takes the towers; `read_bundle` reads them."""
    self._image, self._text, self._pad_id = image, text, pad_id
    self.vision = self.text = sizes

  def apply(self, variables: Any, inputs: jax.Array, *, method: str) -> Any:
    """`ImageTextModel.apply` for 'encode_segments' and 'encode_text'; the weights are in the towers.

    Args:
      variables: not looked at.
      inputs: normalised images [B, H, W, 3], or tokens [B, L].
      method: which of the two.

    Raises:
      ValueError: there is no such method.
    """
    if method == 'encode_text':
      padding = self.text.context_length - inputs.shape[1]  # nothing after the end of a text matters
      return self._text.call(jnp.pad(inputs, ((0, 0), (0, padding)), constant_values=self._pad_id))
    if method != 'encode_segments':
      raise UserError(f'an exported bundle has no {method!r}')
    # The tower takes pixels, and gets back the very ones that were normalised, but for those beyond the last patch.
    height, width = (size - size % self.vision.patch_size for size in inputs.shape[1:3])
    pixels = jnp.rint((inputs[:, :height, :width] * IMAGE_STD + IMAGE_MEAN) * 255).astype(jnp.uint8)
    out = self._image.call(pixels)
    return SegmentOutput(out['image_embeds'], out['segment_embeds'], tuple(out['assignments']))


def read_bundle(folder: epath.PathLike) -> tuple[ExportedTowers, dict[str, Any], Tokenizer]:
  """Reads a bundle.

  Returns:
    The towers, the variables that are not in them (the temperature), and the tokenizer.

  Raises:
    ValueError: a file is missing or damaged.
  """
  folder = epath.Path(folder)
  try:
    facts = json.loads((folder / 'bundle.json').read_text())
    image, text = (
      jax.export.deserialize(bytearray((folder / name).read_bytes())) for name in ('image.stablehlo', 'text.stablehlo')
    )
    sizes = Sizes(tuple(facts['image_size']), facts['patch_size'], facts['context_length'])
    variables = {'params': {'logit_scale': math.log(facts['logit_scale'])}}
    towers = ExportedTowers(image, text, sizes, facts['pad_id'])
  except Exception as error:  # which one depends on what is missing or damaged
    raise UserError(f'{folder} is no whole bundle ({type(error).__name__}: {error}); export it again') from error
  return towers, variables, build_tokenizer(folder / 'tokenizer')
