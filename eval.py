"""Scores a trained run on its held-out scenes, or segments anyone's pictures with it.

  python eval.py --workdir=runs/quickstart --output=runs/quickstart/eval
  python eval.py --workdir=runs/quickstart --images='*.png' --classes='dog,banana,grass' --output=out
"""

import dataclasses
import json

from absl import flags

from groupvit_jax import cli
from groupvit_jax import cluster
from groupvit_jax.evals import protocols

WORKDIR = flags.DEFINE_string('workdir', None, 'The folder train.py wrote; its newest whole checkpoint is used.')
OUTPUT = flags.DEFINE_string('output', None, 'Results go here: a new folder, or one of an earlier eval.py.')
OVERWRITE = flags.DEFINE_bool('overwrite', False, 'Also accept an --output that holds other files.')
IMAGES = flags.DEFINE_string('images', None, "Pictures to segment: a path or a pattern, as in '*.png'.")
CLASSES = flags.DEFINE_string('classes', None, "Words to look for in --images: 'dog|puppy,banana,grass'.")
PROTOCOL = flags.DEFINE_string('protocol', protocols.NATIVE, f'native or {", ".join(protocols.PROTOCOLS)}.')
WEIGHTS = flags.DEFINE_enum('weights', 'best', ['best', 'ema', 'trained'],
                            'best: the moving average, where the run keeps one.')
CHANGES = {field.name: flags.DEFINE_string(f'protocol.{field.name}', None, 'Changes that part of the protocol.')
           for field in dataclasses.fields(protocols.Protocol) if field.name != 'name'}
CLUSTER = cluster.define_flags()
flags.mark_flag_as_required('workdir')


def main() -> int:
  if IMAGES.value is None and CLASSES.value is not None:
    return cli.fail('--classes are looked for in pictures; name them with --images')
  if IMAGES.value is not None and OUTPUT.value is None:
    return cli.fail('--images needs --output: the folder that results go to')
  from groupvit_jax import distributed  # after the flags: a mistake there should not wait for JAX to load
  from groupvit_jax.evals import run_eval
  options = dict(output=OUTPUT.value, overwrite=OVERWRITE.value, protocol=PROTOCOL.value, weights=WEIGHTS.value,
                 changes={key: flag.value for key, flag in CHANGES.items() if flag.value is not None})
  if IMAGES.value is None:
    evaluate = lambda: run_eval.evaluate_scenes(WORKDIR.value, **options)
  else:
    evaluate = lambda: run_eval.label_pictures(
      WORKDIR.value, images=IMAGES.value, classes=CLASSES.value or '', **options)
  return distributed.run(CLUSTER(), {'workdir': WORKDIR.value, 'request': json.dumps(options)}, evaluate)


if __name__ == '__main__':
  cli.run(main)
