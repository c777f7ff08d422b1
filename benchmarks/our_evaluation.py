"""Our side of `evaluation`: label maps alone, as the peer makes them, and the whole of what eval.py --output does."""

import argparse
from collections.abc import Callable
import functools
import io
import json
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import our_model, rounds, voc_pictures
from groupvit_jax.eval import evaluator, labelled, protocols, semantic_seg, windows
from groupvit_jax.eval.benchmarks import find_benchmark
from groupvit_jax.eval.image_scores import PictureScores
from groupvit_jax.interop import huggingface, state_dicts
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import with_fastest_attention

_QUALITY = 95  # of JPEGs; VOC's files are of about this size


class Pictures:
  """The first pictures, in memory: neither side decodes."""

  classes = find_benchmark('voc21').classes

  def __init__(self, number: int):
    self._number = number

  def __len__(self) -> int:
    return self._number

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns a record."""
    image, label = voc_pictures.picture(index)
    return {'image': image, 'label': label, 'key': str(index)}


class Files(Pictures):
  """The same as files, as a data set holds them."""

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns a record."""
    image, label = _files(index)
    return {'image': image, 'label': labelled.decode_label(label, str(index)), 'key': str(index)}


@functools.cache
def _files(index: int) -> tuple[bytes, bytes]:
  """A JPEG and a PNG."""
  data = io.BytesIO(), io.BytesIO()
  for array, stream, options in zip(voc_pictures.picture(index), data, (('JPEG', _QUALITY), ('PNG', None))):
    kind, quality = options
    Image.fromarray(array).save(stream, kind, quality=quality)
  return data[0].getvalue(), data[1].getvalue()


def make_evaluate(folder: pathlib.Path, config: str, dtype: str, mesh: jax.sharding.Mesh) -> Callable[..., int]:
  """The evaluation of a source, with the weights that the peer left in a folder."""
  spec = huggingface.from_huggingface_config(json.loads(config))
  spec.config.dtype = dtype
  model, batch_size = spec.build(), evaluator.windows_per_batch(mesh, voc_pictures.WINDOW)
  model = with_fastest_attention(model, mesh)
  with np.load(folder / 'weights.npz') as weights:
    variables = huggingface.from_huggingface(dict(weights), state_dicts.abstract_variables(model))
  variables = jax.device_put(variables, sharding.replicated(mesh))

  def evaluate(source: semantic_seg.LabelledSource, **options: Any) -> int:
    return semantic_seg.evaluate(
      model,
      variables,
      source,
      voc_pictures.text_embeds(),
      find_benchmark('voc21'),
      protocols.GROUPVIT,
      batch_size=batch_size,
      mesh=mesh,
      num_threads=windows.decode_threads(),
      **options,
    ).num_images

  return evaluate


def main() -> None:
  """Serves `evaluation`."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--config', required=True)
  parser.add_argument('--device', choices=('cpu', 'gpu'), default='cpu')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  args = parser.parse_args()
  jax.config.update('jax_platforms', {'cpu': 'cpu', 'gpu': 'cuda'}[args.device])
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  evaluate = make_evaluate(args.folder, args.config, args.dtype, mesh)
  maps = {}
  keep = lambda encoded, found: maps.update({encoded.picture.key: found.labels})
  evaluate(Pictures(4), oracle=False, on_picture=keep)
  np.savez(args.folder / 'our_maps.npz', **maps)
  product = our_model.multiply(args.dtype)

  def whole(number: int) -> int:
    scores = PictureScores(Files(number))
    return evaluate(scores, oracle=True, on_picture=scores.note)

  def multiply(number: int) -> int:
    for _ in range(number):
      product()
    return number

  facts = {
    'jax': jax.__version__,
    'devices': mesh.size,
    'kind': jax.devices()[0].device_kind,
    'windows_a_batch': evaluator.windows_per_batch(mesh, voc_pictures.WINDOW),
    'product_flop': our_model.SQUARES[jax.default_backend()].flops,
  }
  works = {'labels': lambda number: evaluate(Pictures(number), oracle=False), 'as_eval_py': whole, 'multiply': multiply}
  rounds.serve(facts, works, our_model.device_peak_mb)


if __name__ == '__main__':
  main()
