"""Our side of `evaluation`: the evaluator as eval.py runs it, but for the oracle's second pass."""

import argparse
import json
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks import our_model, rounds, voc_pictures
from groupvit_jax import sharding
from groupvit_jax.evals import evaluator, protocols, semantic_seg
from groupvit_jax.evals.benchmarks import find_benchmark
from groupvit_jax.interop import huggingface, state_dicts


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


def main() -> None:
  """Serves `evaluation`."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--config', required=True)
  args = parser.parse_args()
  spec = huggingface.from_huggingface_config(json.loads(args.config))
  model = spec.build()
  with np.load(args.folder / 'weights.npz') as weights:
    variables = huggingface.from_huggingface(dict(weights), state_dicts.abstract_variables(model))
  mesh = sharding.make_mesh()
  batch_size = evaluator.windows_per_batch(mesh, voc_pictures.WINDOW)
  variables = jax.device_put(variables, sharding.replicated(mesh))

  def evaluate(number: int, **options: Any) -> int:
    result = semantic_seg.evaluate(
        model, variables, Pictures(number), voc_pictures.text_embeds(), find_benchmark('voc21'), protocols.GROUPVIT,
        batch_size=batch_size, mesh=mesh, oracle=False, **options)
    return result.num_images

  maps = {}
  evaluate(4, on_picture=lambda encoded, found: maps.update({encoded.picture.key: found.labels}))
  np.savez(args.folder / 'our_maps.npz', **maps)
  product = our_model.multiply()

  def multiply(number: int) -> int:
    for _ in range(number):
      product()
    return number

  facts = {'jax': jax.__version__, 'devices': jax.device_count(), 'kind': jax.devices()[0].device_kind,
           'windows_a_batch': batch_size,
           'product_flop': our_model.SQUARES[jax.default_backend()].flops}
  rounds.serve(facts, {'evaluate': evaluate, 'multiply': multiply})


if __name__ == '__main__':
  main()
