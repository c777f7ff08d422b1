"""One of several hosts that evaluate together: `python -m tests.evaluation_host INDEX COUNT PORT`.

Prints the result as the last line, JSON.
"""

import json
import sys

from tests import conftest  # noqa: F401, sets JAX up before anything imports it
import jax
import numpy as np

from groupvit_jax import sharding
from groupvit_jax.evals import semantic_seg
from tests import test_semantic_seg as cases

SIZES = [*cases.ORDINARY[:7], cases.EXTREME[0], (300, 60)]


def main(index: str, count: str, port: str) -> None:
  jax.config.update('jax_num_cpu_devices', 2)
  if int(count) > 1:
    jax.distributed.initialize(f'localhost:{port}', int(count), int(index))
  mesh = sharding.make_mesh()
  model = cases.make_model()
  whole = lambda x: jax.make_array_from_process_local_data(sharding.replicated(mesh), x)
  variables = jax.tree.map(whole, jax.device_get(cases.init_variables(model)))
  result = semantic_seg.evaluate(
    model,
    variables,
    cases.Pictures(SIZES, cases.CLASSES),
    cases.make_text_embeds(),
    cases.WITH_BACKGROUND,
    cases.threshold(0.1),
    batch_size=8,
    mesh=mesh,
  )
  embeds = semantic_seg.embed_prompts(
    model, variables, cases.Words({}), [['a cat', 'the cat'], ['a dog', 'the dog']]
  )
  found = [result.counts, result.oracle_counts, np.asarray(embeds)]
  print(json.dumps([*(array.tolist() for array in found), result.health]))


if __name__ == '__main__':
  main(*sys.argv[1:])
