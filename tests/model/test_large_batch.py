"""What makes large batches fit changes nothing but memory: losses in blocks, micro-batches, rematerialisation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import plain_losses
from groupvit_jax.model import losses, text_packing
from groupvit_jax.model.image_text import ImageTextModel, Projected
from groupvit_jax.model.layers import Remat
from groupvit_jax.model.losses import MultiLabel
from groupvit_jax.model.pixels import RandomErasing
from groupvit_jax.model.text_packing import one_a_row
from groupvit_jax.model.vision import StageSpec
from groupvit_jax.running import sharding
from groupvit_jax.train import state as train_state
from groupvit_jax.train import step as train_step
from groupvit_jax.train.step import map_micro_batches
from tests.agreement import assert_agree
from tests.running.test_sharding import random_batch, TEXT_SHAPE
from tests.tiny import tiny_model
from tests.weights import random_variables

BATCH = 64

# Tokens an image; with rows of 8, a micro-batch of one image has one row and needs one to three. So all that
# is compared here with padded texts is packed, and most of it does not fit at once.
BUDGET, ROW_LENGTH = 4, 8


def small_model(remat: Remat = 'none') -> ImageTextModel:
  """One grouping stage, with stochastic depth in half of the samples and Gumbel noise."""
  return tiny_model(remat, stages=(StageSpec(1, 4, 4), StageSpec(1, 0, 0)), drop_path=0.5)


@functools.cache
def compiled_step(
  devices: int, steps: int, remat: Remat = 'none', text_budget: int = BUDGET, loss: MultiLabel = 'pooled'
) -> jax.stages.Compiled:
  """loss_and_grads of (variables, root key, batch)."""
  place = sharding.batch_sharding(sharding.make_mesh(devices=jax.devices()[:devices]))

  def step(variables, rng, batch):
    state = train_state.TrainState.start(variables, (), rng).replace(step=3)
    return train_step.loss_and_grads(
      state,
      batch,
      model=small_model(remat),
      grad_accum_steps=steps,
      text_budget=text_budget,
      random_erasing=RandomErasing(0.5),
      batch_sharding=place,
      multi_label_loss=loss,
    )

  whole = sharding.replicated(place.mesh)
  with jax.default_matmul_precision('highest'):
    return jax.jit(step, in_shardings=(whole, whole, place)).lower(*arguments()).compile()


def arguments(seed: int = 0) -> tuple[dict, jax.Array, dict[str, np.ndarray]]:
  """Variables, root key and batch."""
  words = np.random.default_rng(seed).integers(9, size=(BATCH, TEXT_SHAPE[0] - 1, 2), dtype=np.int32)
  return random_variables(small_model()), jax.random.key(seed), random_batch(BATCH) | {'words': words}


def outcome(*variant, seed: int = 0):
  """Figures, BatchNorm statistics and gradients of one batch, on the host; `compiled_step` has the variants."""
  step = compiled_step(*variant)
  found = jax.device_get(step(*jax.device_put(arguments(seed), step.input_shardings[0])))
  found[0].metrics.scalars.pop('text_turns')  # how texts are packed depends on the variant
  return found


@pytest.fixture(scope='module', autouse=True)
def short_rows():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(text_packing, 'ROW_LENGTH', ROW_LENGTH)
    yield


@pytest.fixture(scope='module')
def one_shot():
  """The step on one device that keeps everything and pads texts."""
  return outcome(1, 1, 'none', 0)


def assert_same(one, other) -> None:
  """Figures, statistics and each parameter's gradient agree to 3e-5: see `assert_agree`."""
  for a, b in zip(one, other, strict=True):
    assert_agree(a, b, 3e-5)


def test_micro_batches_devices_and_rematerialised_blocks_change_nothing(one_shot):
  """Losses, accuracies, health, BatchNorm statistics and gradients of 8 x 8 with remat are those of 1 x 64."""
  assert_same(one_shot, outcome(8, 8, 'blocks'))


def test_nor_do_they_with_rematerialised_matmuls_for_the_best_segment(one_shot):
  whole, split = outcome(1, 1, 'none', 0, 'best_segment'), outcome(8, 8, 'dots', BUDGET, 'best_segment')
  assert_same(whole, split)
  pooled, best = (found[0].metrics.scalars['multi_label_loss'] for found in (one_shot, whole))
  assert abs(pooled - best) > 1e-3


def test_no_sample_moves_between_devices():
  """Neither for a micro-batch nor for the losses, which need the embeddings of all, width 8, and nothing larger."""
  program = compiled_step(8, 8, 'blocks').as_text()
  gathered = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather', program)
  assert 'all-reduce' in program and gathered
  assert max(np.prod([int(n) for n in shape.split(',')]) for shape in gathered) <= BATCH * 8
  assert 'all-to-all' not in program and 'collective-permute' not in program


def test_the_comparisons_include_noise(one_shot):
  """Otherwise they would pass with noise that depends on the micro-batch."""
  other = outcome(1, 1, 'none', 0, seed=1)
  assert abs(one_shot[0].metrics.scalars['loss'] - other[0].metrics.scalars['loss']) > 1e-3


def test_micro_batches_and_policies_keep_less():
  """Bytes that wait for the backward pass, as JAX plans it."""
  params = random_variables(small_model())['params']
  batch = {'images': jnp.zeros((BATCH, 16, 16, 3)), 'tokens': jnp.zeros((BATCH, *TEXT_SHAPE), jnp.int32)}
  size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

  def kept(steps: int, remat: Remat) -> int:
    def features(params):
      def encode(rows):
        apply = functools.partial(small_model(remat).apply, {'params': params})
        texts = one_a_row(rows['tokens'].reshape(-1, TEXT_SHAPE[1]), 2)
        out = apply(rows['images'], method='vision_features').pooled
        return (out, apply(texts, method='text_features').reshape(len(out), -1)), ()

      return map_micro_batches(encode, batch, steps)[0]

    return size(jax.eval_shape(lambda params: jax.vjp(features, params)[1], params)) - size(params)

  none, dots, blocks, micro = kept(1, 'none'), kept(1, 'dots'), kept(1, 'blocks'), kept(8, 'none')
  assert none > 1.3 * dots > 1.3 * 1.3 * blocks, (none, dots, blocks)
  assert micro <= 1.1 * size(batch), (micro, size(batch))


@pytest.mark.parametrize('prompts', [0, 2])
def test_total_loss_with_any_number_of_prompts(prompts):
  images, *texts = jax.random.normal(jax.random.key(0), (2 + prompts, 5, 4))
  texts = jnp.stack(texts, axis=1)
  out = Projected(images, texts, jnp.float32(1.0), jnp.float32(2.0) if prompts else None)
  loss, logged = train_step.total_loss(out, 0.5, None)
  plain = plain_losses.multi_label_loss(images, texts[:, :1], jnp.float32(1.0)).loss
  if prompts:
    plain += 0.5 * plain_losses.multi_label_loss(images, texts[:, 1:], jnp.float32(2.0)).loss
  np.testing.assert_allclose(loss, plain, rtol=1e-5)
  assert ('multi_label_loss' in logged) == (prompts > 0)


def test_prompts_are_contrasted_with_the_segments_of_every_stage():
  model = tiny_model()
  tower = lambda variables, images: model.apply(variables, images, method='vision_features')
  out = jax.eval_shape(tower, random_variables(model), jnp.zeros((5, 16, 16, 3)))
  assert [each.shape for each in (*out.earlier_segments, out.segments)] == [(5, 4, 8), (5, 2, 8)]

  segments, prompts = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
  stages = [(segments[:, :4], jnp.ones((5, 4), bool)), (segments[:, 4:], jnp.array([[True, False]] * 5))]
  words = jnp.arange(20).reshape(5, 2, 2)
  projected = Projected(segments[:, 0], prompts[:, :3], jnp.float32(1.0), jnp.float32(2.0))
  total = train_step.prompt_loss(projected, [train_step.Segments(*stage) for stage in stages], words, None)
  each = [losses.best_segment_loss(*stage, prompts[:, 1:3], words, jnp.float32(2.0)).loss for stage in stages]
  np.testing.assert_allclose(total, sum(each), rtol=1e-6)


def pooled_loss(segments, in_use, prompts, words, **options):
  return losses.multi_label_loss(segments[:, 0], prompts, jnp.float32(1.0), **options).loss


def best_segment_loss(*args, **options):
  return losses.best_segment_loss(*args, jnp.float32(1.0), **options).loss


@pytest.mark.parametrize('loss, logits', [(pooled_loss, 1), (best_segment_loss, 8)])
def test_memory_of_the_losses_is_linear_in_the_batch(loss, logits):
  """The compiler's own figures; the matrix of logits would grow sixteenfold, and is never there."""
  place = sharding.batch_sharding(sharding.make_mesh())

  def temporaries(batch: int) -> int:
    of_loss = functools.partial(loss, sharding=place, block=128)
    shapes = {(8, 8): jnp.float32, (8,): jnp.bool, (3, 8): jnp.float32, (3, 2): jnp.int32}
    args = [jax.ShapeDtypeStruct((batch, *shape), dtype, sharding=place) for shape, dtype in shapes.items()]
    step = jax.jit(jax.grad(of_loss, argnums=(0, 2)), out_shardings=place)
    return step.lower(*args).compile().memory_analysis().temp_size_in_bytes

  small, large = temporaries(1024), temporaries(4096)
  assert large < 4.4 * small
  assert large < logits * 512 * 4096 * 3 * 4 / 4  # of a device's logits
