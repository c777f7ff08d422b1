"""Prints what micro-batches and rematerialisation cost and save in a config's training step.

  python -m benchmarks.accumulation --config=configs/quickstart.py --config.batch_size=512

Compiles the step and asks the compiler for its memory; runs nothing. Arithmetic is that of matrix products and
convolutions, counted in the step as JAX traces it, because the compiler counts the body of a loop once.
"""

import functools

from absl import app
from absl import flags
import jax
import jax.numpy as jnp
from ml_collections import config_flags

from groupvit_jax import optim, sharding, train_state, train_step
from groupvit_jax.models.build import build_model
from groupvit_jax.models.text_rows import one_a_row
from groupvit_jax.random_erasing import build_random_erasing
from groupvit_jax.traced_flops import matmul_flops

CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment.')
flags.mark_flag_as_required('config')

VARIANTS = ((1, 'none'), (2, 'none'), (8, 'none'), (1, 'dots'), (1, 'blocks'), (8, 'blocks'))


def main(_) -> None:
  """One line of a table per number of micro-batches and policy."""
  config = CONFIG.value
  mesh = sharding.make_mesh(**config.mesh)
  place = sharding.batch_sharding(mesh)
  tx = optim.build_optimizer(
    config.optim, optim.build_schedule(config.optim, config.total_steps, config.batch_size)
  )
  build = functools.partial(
    build_model,
    config.model,
    vocab_size=config.tokenizer.vocab_size,
    eos_id=1,
    multi_label=config.data.num_prompts > 0,
  )
  text_shape = 1 + config.data.num_prompts, config.model.text.context_length
  array = lambda shape, dtype: jax.ShapeDtypeStruct(
    (config.batch_size, *shape), dtype, sharding=place
  )
  batch = {
    'image': array((*config.model.vision.image_size, 3), jnp.uint8),
    'tokens': array(text_shape, jnp.int32),
  }
  state = train_state.abstract_state(build(), tx, text_shape, mesh)

  forward = matmul_flops(
    jax.make_jaxpr(
      lambda params: (
        build().apply(
          {'params': params},
          train_step.normalize_images(jnp.zeros(batch['image'].shape, jnp.uint8)),
          method='vision_features',
        ),
        build().apply(
          {'params': params},
          one_a_row(jnp.zeros((config.batch_size * text_shape[0], text_shape[1]), jnp.int32), 1),
          method='text_features',
        ),
      )
    )(state.params).jaxpr
  )
  print(
    f'batch {config.batch_size} on {mesh.size} device(s); '
    f'one forward pass of the towers: {forward / 1e9:.2f} GFLOP\n'
  )
  print(
    '| micro-batches | remat | GFLOP a step | extra tower forwards | temporaries, MiB a device |\n'
    '|--:|:--|--:|--:|--:|'
  )
  base = None
  for steps, remat in VARIANTS:
    step = functools.partial(
      train_step.train_step,
      model=build(remat=remat),
      tx=tx,
      multi_label_weight=config.multi_label_weight,
      grad_accum_steps=steps,
      text_budget=config.text_budget,
      random_erasing=build_random_erasing(config.data.augment),
      place=place,
    )
    flops = matmul_flops(jax.make_jaxpr(step)(state, batch).jaxpr)
    base = base or flops
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    extra = (flops - base) / forward
    print(
      f'| {steps} | {remat} | {flops / 1e9:.2f} | {extra:.2f} | {temporaries:,.0f} |', flush=True
    )


if __name__ == '__main__':
  app.run(main)
