"""The networks: sizes, assignment, position resize, precision, what the text tower ignores, what configs may say."""

import functools

import flax
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import groupvit_vits16_gcc_yfcc
from groupvit_jax.model import assignment, layers, text_packing, vision
from groupvit_jax.model.build import build_model
from tests.tiny import tiny_model
from tests.weights import random_variables


def model_config(**overrides) -> ml_collections.ConfigDict:
  """The paper's model in float32, with entries replaced by dotted key."""
  config = groupvit_vits16_gcc_yfcc.get_config().model
  config.update_from_flattened_dict({'dtype': 'float32'} | overrides)
  return config


SMALL = {
  'embed_dim': 6, 'projector_dim': 10, 'vision.image_size': (16, 16), 'vision.patch_size': 8, 'vision.width': 12,
  'vision.num_heads': 3, 'vision.depths': (1, 1, 1), 'text.width': 8, 'text.depth': 1, 'text.num_heads': 2,
  'text.context_length': 5,
}  # fmt: skip


def apply_tiny(method):
  return jax.jit(functools.partial(tiny_model().apply, random_variables(tiny_model()), method=method))


def test_any_number_of_stages_and_odd_sizes_run():
  tokens, segments, size = (7, 5, 3, 0), (9, 4, 1, 0), (17, 40)
  stages = {'vision.depths': (1, 2, 1, 1), 'vision.num_group_tokens': tokens, 'vision.num_segments': segments}
  config = model_config(**SMALL | stages | {'vision.image_size': size, 'vision.mlp_ratio': 2.5})
  model = build_model(config, vocab_size=11, eos_id=2, multi_label=True)
  images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
  out = jax.jit(model.apply)(random_variables(model), images, jnp.full((2, 4, 5), 2))
  assert out.image_embeds.shape == (2, 6) and out.text_embeds.shape == (2, 4, 6)
  assert [x.shape for x in out.assignments] == [(2, s, n) for s, n in zip(segments[:-1], (10, *segments))]
  for soft in out.assignments:
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
  assert np.isfinite(out.image_embeds).all() and np.ptp(out.image_embeds, axis=0).max() > 0


def test_other_input_sizes_run_and_pixels_beyond_the_last_patch_are_not_seen():
  images = np.random.default_rng(0).standard_normal((1, 24, 36, 3)).astype(np.float32)
  encode = apply_tiny('encode_segments')
  whole, more = encode(images), encode(np.pad(images, ((0, 0), (0, 3), (0, 2), (0, 0)), constant_values=9))
  assert whole.assignments[0].shape == (1, 4, 6 * 9) and whole.segment_embeds.shape[:2] == (1, 2)
  np.testing.assert_array_equal(whole.segment_embeds, more.segment_embeds)
  with pytest.raises(ValueError, match=r'3 x 20 px is smaller than one patch \(4 px\)'):
    encode(np.zeros((1, 3, 20, 3)))


@pytest.mark.parametrize(
  'grid, size', [((14, 14), (28, 42)), ((3, 5), (7, 4)), ((14, 14), (5, 9)), ((2, 3), (2, 11)), ((1, 4), (3, 4))]
)
def test_positions_are_resized_as_torch_does(grid, size, torch):
  positions = np.random.default_rng(0).standard_normal((*grid, 3)).astype(np.float32)
  theirs = torch.nn.functional.interpolate(
    torch.tensor(positions.transpose(2, 0, 1)[None]), size=size, mode='bicubic', align_corners=False
  )
  np.testing.assert_allclose(
    vision.resize_positions(positions, *size), theirs[0].permute(1, 2, 0).numpy(), rtol=0, atol=1e-5
  )


# Assignment of N = 3 tokens to S = 2 groups, [S, N].
LOGITS = np.log([[[1.0, 3.0, 1.0], [3.0, 1.0, 4.0]]])
SOFT = np.array([[[0.25, 0.75, 0.2], [0.75, 0.25, 0.8]]])
HARD = np.array([[[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]])


def test_logits_are_scaled_similarities():
  queries, keys = np.array([[[1.0, 2.0, 0.0, 0.0]]]), np.array([[[3.0, 4.0, 5.0, 6.0], [0.0, 1.0, 0.0, 0.0]]])
  np.testing.assert_allclose(assignment.assignment_logits(queries, keys), [[[5.5, 1.0]]])


def test_assignment_values():
  np.testing.assert_allclose(assignment.soft_assignment(LOGITS), SOFT, rtol=1e-6)
  np.testing.assert_allclose(assignment.assign(LOGITS, 'soft'), SOFT, rtol=1e-6)
  np.testing.assert_array_equal(assignment.assign(LOGITS, 'hard'), HARD)
  np.testing.assert_array_equal(assignment.assign(LOGITS, 'gumbel'), HARD)
  # A key makes noise for 'gumbel' alone.
  keys = jax.random.split(jax.random.key(0), 1)
  np.testing.assert_array_equal(assignment.assign(LOGITS, 'hard', keys), HARD)
  np.testing.assert_allclose(assignment.assign(LOGITS, 'soft', keys), SOFT, rtol=1e-6)


def test_straight_through_has_the_gradient_of_the_soft_assignment():
  weights = np.array([[[1.0, -2.0, 3.0], [5.0, 7.0, -1.0]]])
  gradient = {
    mode: jax.grad(lambda x, mode=mode: jnp.sum(weights * assignment.assign(x, mode)))(LOGITS)
    for mode in ('soft', 'hard')
  }
  # d/dl_s of sum_s w_s p_s is p_s (w_s - sum_t w_t p_t); with two groups +- p q (w_0 - w_1).
  expected = 0.1875 * -4.0, 0.1875 * -9.0, 0.16 * 4.0
  np.testing.assert_allclose(gradient['soft'], [[expected, np.negative(expected)]], rtol=1e-5)
  np.testing.assert_array_equal(gradient['hard'], gradient['soft'])


def test_gumbel_noise_draws_groups_by_their_probability():
  logits = np.log(np.array([0.2, 0.5, 0.3]))[None, :, None] + np.zeros((1, 3, 20_000))
  drawn = assignment.assign(logits, 'gumbel', jax.random.split(jax.random.key(0), 1))
  np.testing.assert_array_equal(drawn.sum(axis=1), 1)
  assert set(np.unique(drawn)) == {0, 1}
  np.testing.assert_allclose(drawn.mean(axis=2), [[0.2, 0.5, 0.3]], atol=0.015)


def test_segments_are_averages_with_one_added_to_the_count():
  hard = np.array([[[1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
  values = np.array([[[3.0, 0.0], [6.0, 3.0], [8.0, 2.0]]])
  np.testing.assert_allclose(assignment.pool_segments(hard, values), [[[3.0, 1.0], [4.0, 1.0], [0.0, 0.0]]], rtol=1e-6)
  np.testing.assert_allclose(
    assignment.pool_segments(hard[:, :2], values, eps=0.0), [[[4.5, 1.5], [8.0, 2.0]]], rtol=1e-6
  )


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
  x = jnp.ones((4000, 2, 3))
  keys = layers.sample_keys(jax.random.key(0), 4000)
  out = np.asarray(layers.drop_path(x, 0.25, keys))
  per_sample = out.reshape(4000, -1)
  assert (per_sample == per_sample[:, :1]).all()
  np.testing.assert_allclose(np.unique(out), [0, 4 / 3], rtol=1e-6)
  assert abs(out.mean() - 1) < 0.03
  assert layers.drop_path(x, 0.25, None) is x
  assert layers.drop_path(x, 0.0, keys) is x


def test_stochastic_depth_and_noise_need_a_key():
  images = np.random.default_rng(0).standard_normal((8, 16, 16, 3)).astype(np.float32)
  encode = apply_tiny('encode_image')
  still = encode(images)
  noisy, same, other = (encode(images, key=jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(noisy.embeds, same.embeds)
  assert np.abs(noisy.embeds - still.embeds).max() > 1e-3
  assert np.abs(noisy.embeds - other.embeds).max() > 1e-3


def test_text_is_pooled_at_the_first_eos_wherever_it_is():
  assert text_packing.eos_positions(jnp.array([[5, 2, 9], [2, 2, 2], [9, 8, 2]]), 2).tolist() == [1, 0, 2]
  encode = apply_tiny('encode_text')
  base = encode(jnp.array([[5, 7, 2, 0, 0, 0]]))
  for tail in ([9, 2, 19], [2, 2, 2]):
    np.testing.assert_allclose(encode(jnp.array([[5, 7, 2, *tail]])), base, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(encode(jnp.array([[5, 7, 2]])), base, rtol=1e-5, atol=1e-6)
  assert np.abs(encode(jnp.array([[6, 7, 2, 0, 0, 0]])) - base).max() > 1e-3
  with pytest.raises(ValueError, match='7 tokens exceed the context length 6'):
    encode(jnp.zeros((1, 7), jnp.int32))


def test_batch_norm_learns_from_the_batch_in_training_alone():
  model, variables = tiny_model(), random_variables(tiny_model())
  tokens = jnp.array([[5, 2, 0], [6, 7, 2], [8, 9, 2]])
  after = lambda train: model.apply(variables, tokens, train=train, method='encode_text', mutable=['batch_stats'])[1][
    'batch_stats'
  ]['text_projector']['norm']
  old = variables['batch_stats']['text_projector']['norm']
  jax.tree.map(np.testing.assert_array_equal, after(False), old)
  features = model.apply(variables, text_packing.one_a_row(tokens, 2), method='text_features')
  fc1 = variables['params']['text_projector']['fc1']
  hidden, new = features @ fc1['kernel'] + fc1['bias'][None], after(True)
  np.testing.assert_allclose(new['mean'], 0.9 * old['mean'] + 0.1 * hidden.mean(axis=0), rtol=1e-4)
  unbiased = hidden.var(axis=0, ddof=1)  # as torch's
  np.testing.assert_allclose(new['var'], 0.9 * old['var'] + 0.1 * unbiased, rtol=1e-4)


def test_bfloat16_leaves_parameters_norms_and_softmaxes_in_float32():
  stages = {'vision.num_group_tokens': (4, 2, 0), 'vision.num_segments': (4, 2, 0)}
  config = model_config(**SMALL | stages | {'dtype': 'bfloat16'})
  model = build_model(config, vocab_size=11, eos_id=2, multi_label=True)
  images, tokens = jnp.ones((2, 16, 16, 3)), jnp.full((2, 1, 5), 2)
  variables = jax.eval_shape(model.init, jax.random.key(0), images, tokens)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  capture = lambda _, method: method in ('__call__', 'parts')  # a fused projection is not called as a whole
  out, state = jax.eval_shape(
    functools.partial(model.apply, capture_intermediates=capture, mutable=['intermediates']), variables, images, tokens
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype('float32')}
  flat = flax.traverse_util.flatten_dict(state['intermediates'], sep='/')
  dtypes = lambda kind: {x.dtype.name for path, leaves in flat.items() if kind in path for x in jax.tree.leaves(leaves)}
  by_kind = {kind: dtypes(kind) for kind in ('norm', 'qkv', 'fc1', 'assign_', 'query')}
  assert by_kind == {'norm': {'float32'}} | {kind: {'bfloat16'} for kind in ('qkv', 'fc1', 'assign_', 'query')}
  jaxpr = str(jax.make_jaxpr(model.apply)(variables, images, tokens))
  exponentials = [line for line in jaxpr.splitlines() if ' exp ' in line]
  assert exponentials and not any(':bf16' in line for line in exponentials)


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('dtype', 'float16', "config.model.dtype='float16': must be one of 'float32', 'bfloat16'"),
    ('vision.num_heads', 7, 'model.vision.width=384 is not divisible by num_heads=7'),
    ('text.num_heads', 3, 'model.text.width=256 is not divisible by num_heads=3'),
    ('vision.patch_size', 225, r'patch_size=225 exceeds image_size=\(224, 224\)'),
    ('vision.mlp_ratio', 0.001, 'model.vision.mlp_ratio=0.001 leaves no hidden unit of width=384'),
    ('vision.depths', (6, 3), r'one entry per stage each, got \(6, 3\), \(64, 8, 0\), \(64, 8, 0\)'),
    ('vision.num_group_tokens', (64, 0, 0), r'positive in every stage but the last, where it is 0, got \(64, 0, 0\)'),
    ('vision.num_group_tokens', (64, 8, 8), r'positive in every stage but the last'),
    ('vision.num_segments', (64, 0, 0), r'num_segments must be positive, got \(64, 0, 0\)'),
  ],
)
def test_a_config_that_makes_no_model_says_why(key, value, message):
  with pytest.raises(ValueError, match=message):
    build_model(model_config(**{key: value}), vocab_size=10, eos_id=1, multi_label=False)


def test_parameters_that_start_as_in_torch():
  """Uniform in +-1 / sqrt(fan-in), with the paper's kernels: patch embedding, biases of text MLPs and projectors."""
  config = model_config(**SMALL | {'embed_dim': 64, 'projector_dim': 64})
  config.update_from_flattened_dict({'vision.width': 96, 'text.width': 64})
  model = build_model(config, vocab_size=9, eos_id=8, multi_label=False)
  images, tokens = np.zeros((1, 16, 16, 3), np.float32), np.full((1, 1, 5), 8)
  params = flax.traverse_util.flatten_dict(jax.jit(model.init)(jax.random.key(0), images, tokens)['params'], sep='/')
  text_mlp = {f'text/block0/mlp/fc{layer}/bias': fan_in for layer, fan_in in ((1, 64), (2, 256))}
  projectors = {f'{side}_projector/fc2/bias': 64 for side in ('image', 'text')}
  projectors |= {'image_projector/fc1/bias': 96, 'text_projector/fc1/bias': 64}
  patches = {f'vision/patch_embed/{name}': 192 for name in ('kernel', 'bias')}
  for name, fan_in in {**patches, **text_mlp, **projectors}.items():
    scaled = params.pop(name) * fan_in**0.5
    assert 0.9 < abs(scaled).max() <= 1 and 0.45 < scaled.std() < 0.7, name  # of a uniform: 0.58
  assert not any(params[name].any() for name in params if name.endswith('bias'))


def test_kernel_initialisers():
  config = model_config(**{'vision.init.kernel': 'fan_in:4', 'vision.init.assign_kernel': 'normal:0.5'})
  model = build_model(config, vocab_size=10, eos_id=1, multi_label=False)
  init = model.vision.init
  assert not (init.torch_defaults or model.text.torch_init or model.torch_init)
  np.testing.assert_allclose(init.kernel(jax.random.key(0), (400, 300), jnp.float32).std(), 0.1, rtol=0.02)
  np.testing.assert_allclose(init.assign_kernel(jax.random.key(0), (400, 300), jnp.float32).std(), 0.5, rtol=0.02)
