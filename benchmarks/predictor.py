"""Times the predictor on pictures of one 448 x 448 window, GroupViT-S/16 with random weights, and prints JSON:

  python -m benchmarks.predictor > docs/speed_predictor.json

One picture at a time and sixteen at once, from pixels to labels, with the share of each half: `encode`, and `find` for
20 words whose embeddings are known; then `groups`, which only those wait for who look at them. Medians of calls that
take turns.
"""

import collections
import json
import os
import pathlib
import platform
import tempfile
import time

import jax
import numpy as np
import optax

from configs import groupvit_vits16_gcc_yfcc, quickstart
from groupvit_jax.data.scenes.scenes import ALL_STUFF, ALL_THINGS
from groupvit_jax.data.sources import build_source, sample_captions
from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer, train_sentencepiece
from groupvit_jax.eval import protocols
from groupvit_jax.model.build import build_model
from groupvit_jax.predictor import Predictor
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import with_fastest_attention
from groupvit_jax.train import state

_ROUNDS = 7
_SIDE = 448
_WORDS = (*ALL_STUFF, *ALL_THINGS)[:20]


def _tokenizer() -> Tokenizer:
  """The quickstart's: what a text costs does not depend on its words."""
  config = quickstart.get_config()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'tokenizer.model'
    captions = sample_captions(build_source(config.data, (64, 64)), 2000)
    train_sentencepiece(captions, path, config.tokenizer.vocab_size)
    return build_tokenizer(path)


def _predictor() -> Predictor:
  tokenizer, mesh = _tokenizer(), sharding.make_mesh()
  model = build_model(
    groupvit_vits16_gcc_yfcc.get_config().model,
    vocab_size=tokenizer.vocab_size,
    eos_id=tokenizer.eos_id,
    multi_label=True,
  )
  shape = 1, model.text.context_length
  variables = state.init_state(model, optax.identity(), 0, shape, mesh).variables
  protocol = protocols.find_protocol('groupvit', model.vision.image_size)
  return Predictor(with_fastest_attention(model, mesh), variables, tokenizer, mesh, protocol=protocol)


def main() -> None:
  """Measures and prints."""
  predictor, seconds = _predictor(), collections.defaultdict(list)
  rng = np.random.default_rng(0)
  batches = {f'batch {size}': list(rng.integers(0, 256, (size, _SIDE, _SIDE, 3), np.uint8)) for size in (1, 16)}
  for turn in range(_ROUNDS + 1):  # the first one compiles
    for name, pictures in batches.items():
      start = time.perf_counter()
      encoded = predictor.encode(pictures)
      middle = time.perf_counter()
      found = [predictor.find(one, _WORDS) for one in encoded]
      end = time.perf_counter()
      for one in found:
        one.groups  # noqa: B018 (computed when asked for)
      groups = time.perf_counter()
      if turn:
        seconds[f'{name}: encode'].append(middle - start)
        seconds[f'{name}: find'].append(end - middle)
        seconds[f'{name}: both'].append(end - start)
        seconds[f'{name}: groups'].append(groups - end)
  medians = {name: round(1000 * float(np.median(values)), 1) for name, values in seconds.items()}
  print(
    json.dumps(
      dict(
        milliseconds=medians,
        device=jax.devices()[0].device_kind,
        devices=len(jax.devices()),
        cores=len(os.sched_getaffinity(0)),
        python=platform.python_version(),
        jax=jax.__version__,
        rounds=_ROUNDS,
      ),
      indent=2,
    )
  )


if __name__ == '__main__':
  main()
