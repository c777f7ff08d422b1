"""Both towers as ONNX files, and their use by ONNX Runtime or OpenVINO."""

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib
import os
import pathlib
import sys
import tempfile
from typing import Any, get_args, Literal

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from groupvit_jax.errors import UserError
from groupvit_jax.interop import onnx_graph, state_dicts
from groupvit_jax.model.vision import resize_positions

Runtime = Literal['onnxruntime', 'openvino', 'openvino-bfloat16']
Dtype = Literal['float32', 'float16', 'int8']
_REMEDY = 'pip install "groupvit_jax[onnx]"'


def export_towers(spec: state_dicts.ModelSpec, variables: Mapping, window: int, dtype: Dtype) -> dict[str, bytes]:
  """Converts both towers, weights inside, for any batch.

  Args:
    spec, variables: the model and its weights.
    window: side of the square images that the image tower takes: the converter knows no free sizes.
    dtype: 'float32'; 'float16' stores and computes in it; 'int8' stores the weights of matmuls in it, and scales
      activations when it runs.

  Returns:
    'image': uint8 `images` [b, window, window, 3] -> `image_embeds` [b, E] and `segment_embeds` [b, S, E], projected
    and not normalised, and `assignments_1`, ..., the soft assignment [b, S, N] of each grouping stage.
    'text': int32 `tokens` [b, L] -> `text_embeds` [b, E], likewise.

  Raises:
    UserError: a package is missing, or the converter does not know an operation.
  """
  config = spec.config.copy_and_resolve_references()
  config.dtype, config.vision.image_size = 'float32', (window, window)
  model = spec._replace(config=config).build().with_attention('xla')
  variables = _resize_positions(variables, window // config.vision.patch_size)
  num_stages = sum(stage.num_segments > 0 for stage in model.vision.stages)

  def image(images: jax.Array) -> tuple[jax.Array, ...]:
    out = model.apply(variables, images, method='encode_pixels')
    return out.image_embeds, out.segment_embeds, *out.assignments

  text = lambda tokens: model.apply(variables, tokens, method='encode_text')
  assignments = [f'assignments_{stage}' for stage in range(1, num_stages + 1)]
  shapes = ('b', window, window, 3), ('b', spec.config.text.context_length)
  return {
    'image': _convert(image, shapes[0], jnp.uint8, 'images', ['image_embeds', 'segment_embeds', *assignments], dtype),
    'text': _convert(text, shapes[1], jnp.int32, 'tokens', ['text_embeds'], dtype),
  }


def _resize_positions(variables: Mapping, side: int) -> Mapping:
  """The same weights for square images of side x side patches: the converter knows no bicubic interpolation."""
  flat = traverse_util.flatten_dict(variables)
  path = ('params', 'vision', 'positions')
  return traverse_util.unflatten_dict(flat | {path: resize_positions(flat[path], side, side)})


def load(data: bytes, runtime: Runtime) -> Callable[[np.ndarray], list[np.ndarray]]:
  """A function that runs an ONNX file on the CPU, or on what ONNX Runtime finds; 'openvino-bfloat16' where it can.

  Raises:
    UserError: there is no such runtime, or its package is missing.
  """
  if runtime not in get_args(Runtime):
    raise UserError(f'runtime={runtime!r}: use {", ".join(get_args(Runtime))}')
  if runtime == 'onnxruntime':
    ort = _import('onnxruntime')
    session = ort.InferenceSession(data, providers=ort.get_available_providers())
    (name,) = (each.name for each in session.get_inputs())
    return lambda x: session.run(None, {name: x})
  sys.modules.setdefault('openvino_telemetry', None)  # it reports each import to its makers, from a forked process
  ov = _import('openvino')
  core, precision = ov.Core(), 'bf16' if runtime == 'openvino-bfloat16' else 'f32'
  model, cores = core.read_model(data), len(os.sched_getaffinity(0))

  @functools.cache
  def requests(streams: int) -> list[Any]:
    options = {'INFERENCE_PRECISION_HINT': precision, 'NUM_STREAMS': str(streams)}
    compiled = core.compile_model(model, 'CPU', options)
    return [compiled.create_infer_request() for _ in range(streams)]

  def run(x: np.ndarray) -> list[np.ndarray]:
    parts = np.array_split(x, min(len(x), cores))  # each on its own cores: they wait for each other once
    running = requests(len(parts))
    for request, part in zip(running, parts):
      request.start_async({0: part}, share_inputs=True)
    for request in running:
      request.wait()
    return [np.concatenate(rows) for rows in zip(*(request.results.values() for request in running))]

  requests(1)  # raises what is wrong with the file
  return run


def _convert(
  function: Callable, shape: Sequence[int | str], dtype: jnp.dtype, name: str, outputs: list[str], stored: Dtype
) -> bytes:
  """An ONNX file of a function of one array."""
  try:
    model = onnx_graph.convert(function, shape, dtype, name, outputs)
    _import('onnx').checker.check_model(model, full_check=True)
    if stored == 'float16':
      model = _import('onnxruntime.transformers.float16').convert_float_to_float16(model, keep_io_types=True)
    return _quantize(model) if stored == 'int8' else model.SerializeToString()
  except NotImplementedError as error:
    raise UserError(f'this model cannot be converted: {" ".join(str(error).split())}') from error


def _quantize(model: Any) -> bytes:
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'model.onnx'
    _import('onnxruntime.quantization').quantize_dynamic(model, path)
    return path.read_bytes()


def _import(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise UserError(f'{name.partition(".")[0]} is not installed: {_REMEDY}') from error
