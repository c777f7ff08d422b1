"""Bundles: both towers with their weights inside, as StableHLO or ONNX, behind the methods that evaluation calls."""

from collections.abc import Callable, Mapping
import json
import math
from typing import Any, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.interop import onnx
from groupvit_jax.model.image_text import SegmentOutput

FILE = 'bundle.json'  # sizes, special tokens, temperature, provenance


class Sizes(NamedTuple):
  """Sizes of a vision or a text tower that evaluation asks for."""

  image_size: tuple[int, int]
  patch_size: int
  context_length: int


class ExportedTowers:
  """Both towers of a bundle behind the two methods of `ImageTextModel` that evaluation calls."""

  def __init__(
    self,
    image: Callable[[jax.Array], SegmentOutput],
    text: Callable[[jax.Array], jax.Array],
    sizes: Sizes,
    pad_id: int,
    window: int | None = None,
  ):
    self._image, self._text, self._pad_id, self._window = image, text, pad_id, window
    self.vision = self.text = sizes

  def apply(self, variables: Any, inputs: jax.Array, *, method: str) -> Any:
    """`ImageTextModel.apply` of 'encode_pixels' to uint8 [B, H, W, 3], or of 'encode_text' to tokens [B, L].

    The weights are in the towers: `variables` are ignored.
    """
    if method == 'encode_text':
      padding = self.text.context_length - inputs.shape[1]  # nothing after the end of a text matters
      return self._text(jnp.pad(inputs, ((0, 0), (0, padding)), constant_values=self._pad_id))
    if method != 'encode_pixels':
      raise UserError(f'an exported bundle has no {method!r}')
    height, width = (size - size % self.vision.patch_size for size in inputs.shape[1:3])
    self.check_window(height, width)
    return self._image(inputs[:, :height, :width])

  def check_window(self, height: int, width: int) -> None:
    """Raises UserError if the image tower takes no images of that size."""
    side = self._window
    if side is not None and (height, width) != (side, side):
      raise UserError(
        f'this export takes windows of {side} x {side} px and an image or a protocol asks for {height} x {width}; '
        'export it with --window, or choose another protocol'
      )


class Bundle(NamedTuple):
  """What a bundle's folder holds."""

  towers: ExportedTowers
  variables: dict[str, Any]  # those that are not in the towers: the temperature
  tokenizer: Tokenizer
  runtime: str  # that runs the towers
  origin: dict[str, str]  # step, weights and precision of the run


def read_bundle(folder: epath.PathLike, runtime: onnx.Runtime | None = None) -> Bundle:
  """Reads a folder that `export` wrote with --format=stablehlo or --format=onnx; `runtime` is of the latter.

  Raises:
    UserError: a file is missing or damaged, or the runtime is not there.
  """
  folder = epath.Path(folder)
  try:
    metadata = json.loads((folder / FILE).read_text())
    sizes = Sizes(tuple(metadata['image_size']), metadata['patch_size'], metadata['context_length'])
    variables = {'params': {'logit_scale': math.log(metadata['logit_scale'])}}
    window = metadata.get('window')
    if window is None and runtime is not None:
      raise UserError(f'{folder} is StableHLO, which JAX runs; leave out runtime={runtime!r}')
    runtime = runtime or ('jax' if window is None else 'onnxruntime')
    image, text = _read_stablehlo(folder) if window is None else _read_onnx(folder, window, runtime)
    towers = ExportedTowers(image, text, sizes, metadata['pad_id'], window)
    precision = f'{metadata["dtype"]} by {runtime}, exported from {metadata["workdir"]} with code {metadata["code"]}'
    origin = {'step': metadata['step'], 'weights': metadata['weights'], 'precision': precision}
  except UserError:
    raise
  except Exception as error:  # which one depends on what is missing or damaged
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise UserError(f'{folder} is no whole bundle ({reason}); export it again') from error
  return Bundle(towers, variables, build_tokenizer(folder / 'tokenizer'), runtime, origin)


def _read_stablehlo(folder: epath.Path) -> tuple[Callable, Callable]:
  image, text = (
    jax.export.deserialize(bytearray((folder / f'{side}.stablehlo').read_bytes())) for side in ('image', 'text')
  )

  def encode(images: jax.Array) -> SegmentOutput:
    out = image.call(images)
    return SegmentOutput(out['image_embeds'], out['segment_embeds'], tuple(out['assignments']))

  return encode, text.call


def open_onnx(towers: Mapping[str, bytes], window: int, runtime: onnx.Runtime) -> tuple[Callable, Callable]:
  """What `ExportedTowers` takes, from the files that `onnx.export_towers` made for windows of that side."""
  image, text = (onnx.load(towers[side], runtime) for side in ('image', 'text'))
  rows = [array.shape[1:] for array in image(np.zeros((1, window, window, 3), np.uint8))]  # of one image
  embed_dim = rows[0][0]

  def call(run: Callable, x: jax.Array, shapes: list[tuple[int, ...]]) -> list[jax.Array]:
    results = [jax.ShapeDtypeStruct((len(x), *shape), jnp.float32) for shape in shapes]
    return jax.pure_callback(lambda array: run(np.asarray(array)), results, x)

  def encode(images: jax.Array) -> SegmentOutput:
    image_embeds, segment_embeds, *assignments = call(image, images, rows)
    return SegmentOutput(image_embeds, segment_embeds, tuple(assignments))

  return encode, lambda tokens: call(text, tokens, [(embed_dim,)])[0]


def _read_onnx(folder: epath.Path, window: int, runtime: onnx.Runtime) -> tuple[Callable, Callable]:
  towers = {side: (folder / f'{side}.onnx').read_bytes() for side in ('image', 'text')}
  return open_onnx(towers, window, runtime)
