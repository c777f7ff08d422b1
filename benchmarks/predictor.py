"""Time of the predictor on images of one 448 x 448 window, GroupViT-S/16 with random weights.

  python -m benchmarks predictor > docs/speed_predictor.json

One image at a time and sixteen at once, from pixels to labels: `encode`, and `find` for 20 class names whose embeddings
are known; then `groups`, which is computed for those who ask for it. Medians of calls that take turns.
"""

import collections
import pathlib
import tempfile
import time

import jax
import numpy as np
import optax

from benchmarks import our_side, processes
from configs import quickstart
from groupvit_jax.data.scenes.scenes import ALL_STUFF, ALL_THINGS
from groupvit_jax.data.sources import build_source, sample_captions
from groupvit_jax.data.tokenizer import train_sentencepiece
from groupvit_jax.eval import protocols
from groupvit_jax.predictor import Predictor
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import with_fastest_attention

_ROUNDS, _SIDE = 7, 448
_CLASS_NAMES = (*ALL_STUFF, *ALL_THINGS)[:20]


def _predictor() -> Predictor:
  """With the quickstart's tokenizer: what a prompt costs does not depend on its words."""
  config = quickstart.get_config()
  with tempfile.TemporaryDirectory() as folder:
    captions = sample_captions(build_source(config.data, (64, 64)), 2000)
    tokenizer = train_sentencepiece(captions, pathlib.Path(folder) / 'tokenizer.model', config.tokenizer.vocab_size)
  mesh, paper = sharding.make_mesh(), our_side.paper_config(1, 'bfloat16')
  paper.tokenizer.vocab_size = tokenizer.vocab_size
  model = our_side.make_model(paper)
  variables = our_side.init_state(model, optax.identity(), (1, model.text.context_length), mesh).variables
  protocol = protocols.GROUPVIT
  return Predictor(with_fastest_attention(model, mesh), variables, tokenizer, mesh, protocol=protocol)


def main() -> None:
  predictor, seconds = _predictor(), collections.defaultdict(list)
  rng = np.random.default_rng(0)
  batches = {f'batch {size}': list(rng.integers(0, 256, (size, _SIDE, _SIDE, 3), np.uint8)) for size in (1, 16)}
  for number in range(_ROUNDS + 1):  # the first one compiles
    for name, images in batches.items():
      clock = [time.perf_counter()]
      encoded = predictor.encode(images)
      clock.append(time.perf_counter())
      found = [predictor.segment(one, _CLASS_NAMES) for one in encoded]
      clock.append(time.perf_counter())
      for one in found:
        one.groups  # noqa: B018 (computed when asked for)
      clock.append(time.perf_counter())
      if number:
        spent = dict(zip(('encode', 'find', 'groups'), np.diff(clock)))
        for part, value in (spent | {'both': spent['encode'] + spent['find']}).items():
          seconds[f'{name}: {part}'].append(value)
  medians = {name: round(1000 * float(np.median(values)), 1) for name, values in seconds.items()}
  device = {'device': jax.devices()[0].device_kind, 'devices': len(jax.devices()), 'jax': jax.__version__}
  processes.write({'milliseconds': medians} | device | {'rounds': _ROUNDS} | processes.machine())
