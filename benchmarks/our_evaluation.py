"""Our side of the evaluation benchmark: label maps alone, and all that eval.py --output does."""

import argparse
import functools
import io
import pathlib
from typing import Any

import jax
import numpy as np
from PIL import Image

from benchmarks import evaluation, our_side, processes
from groupvit_jax.eval import evaluator, labelled, protocols
from groupvit_jax.eval.benchmarks import find_benchmark
from groupvit_jax.eval.class_names import find_names
from groupvit_jax.interop import huggingface, state_dicts
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import with_fastest_attention

_QUALITY = 95  # of JPEGs; VOC's files are of about this size


class Images:
  """The first images, in memory: neither side decodes. Or, as a data set holds them, in files."""

  classes = find_benchmark('voc21').classes

  def __init__(self, number: int, in_files: bool = False):
    self._number, self._in_files = number, in_files

  def __len__(self) -> int:
    return self._number

  def __getitem__(self, index: int) -> dict[str, Any]:
    image, label = _encode(index) if self._in_files else evaluation.draw_image(index)
    label = labelled.decode_label(label, str(index)) if self._in_files else label
    return {'image': image, 'label': label, 'key': str(index)}


@functools.cache
def _encode(index: int) -> tuple[bytes, bytes]:
  """A JPEG and a PNG."""
  (image, label), (jpeg, png) = evaluation.draw_image(index), (io.BytesIO(), io.BytesIO())
  Image.fromarray(image).save(jpeg, 'JPEG', quality=_QUALITY)
  Image.fromarray(label).save(png, 'PNG')
  return jpeg.getvalue(), png.getvalue()


def main() -> None:
  """Serves rounds, with the weights that the peer left in a folder."""
  parser = argparse.ArgumentParser()
  parser.add_argument('folder', type=pathlib.Path)
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu')
  mesh = our_side.one_device()
  spec = huggingface.from_huggingface_config({'model_type': 'groupvit'})
  model, batch_size = spec.build(), evaluator.windows_per_batch(mesh, evaluation.WINDOW)
  model = with_fastest_attention(model, mesh)
  with np.load(args.folder / 'weights.npz') as weights:
    variables = huggingface.from_huggingface(dict(weights), state_dicts.abstract_variables(model))
  variables = jax.device_put(variables, sharding.replicated(mesh))
  benchmark = find_benchmark('voc21')
  protocol, names = benchmark.fix_threshold(protocols.GROUPVIT), find_names(benchmark, 'groupvit')
  scoring = evaluator.Scoring(benchmark, protocol, names, evaluation.class_embeds())

  def evaluate(source: labelled.LabelledSource, **options: Any) -> int:
    (result,) = evaluator.evaluate(
      model,
      variables,
      source,
      [scoring],
      batch_size=batch_size,
      mesh=mesh,
      num_threads=labelled.decode_threads(),
      **options,
    )
    return result.num_images

  maps = {}
  keep = lambda encoded, found: maps.update({encoded.image.key: found.labels})
  evaluate(Images(4), oracle=False, on_image=keep)
  np.savez(args.folder / 'our_maps.npz', **maps)

  def as_eval_py(number: int) -> int:
    num_classes = len(benchmark.classes)
    score = lambda encoded, found: evaluator.image_miou(encoded.image.label, found.labels, num_classes)
    return evaluate(Images(number, in_files=True), oracle=True, on_image=score)

  multiply = our_side.matmul('float32')
  works = {
    'labels': lambda number: evaluate(Images(number), oracle=False),
    'as_eval_py': as_eval_py,
    'multiply': lambda number: sum(multiply(1) for _ in range(number)),
  }
  facts = {'jax': jax.__version__, 'windows_a_batch': batch_size, 'product_flop': our_side.matmul_flop()}
  processes.serve(facts, works, our_side.device_peak_mb)


if __name__ == '__main__':
  main()
