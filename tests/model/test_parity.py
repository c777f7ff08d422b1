"""The model against `transformers.GroupViTModel`, with random weights that leave nothing at rest."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers

from groupvit_jax.interop import huggingface, state_dicts
from groupvit_jax.model import losses
from tests import huggingface_models

EOS = 33  # neither the largest nor the smallest id of a text

# Biases whose gradient is zero but for rounding, with the neighbour whose gradient says how small that is: a key's bias
# shifts all logits of a softmax over keys alike, a query's those of a softmax over queries, and every norm takes away
# what an MLP across tokens adds to all channels of a token.
DEAD = {
  'attn.k_proj.bias': 'attn.q_proj.bias',
  'assign.q_proj.bias': 'assign.k_proj.bias',
  'mlp_inter.fc2.bias': 'mlp_inter.fc1.bias',
  'group_projector.1.fc2.bias': 'group_projector.1.fc1.bias',
}


def released_config() -> transformers.GroupViTConfig:
  """GroupViT-S/16; a config's defaults are the released sizes."""
  config = transformers.GroupViTConfig()
  assert (config.vision_config.depths, config.text_config.num_hidden_layers) == ((6, 3, 3), 12)
  return config


def odd_config() -> transformers.GroupViTConfig:
  """Towers of unequal widths, 3 x 5 patches with pixels left over, odd numbers of groups."""
  sizes = dict(depths=[2, 1, 1], num_hidden_layers=4, image_size=[25, 43], patch_size=8)
  config = huggingface_models.small_config(**sizes)
  config.text_config.vocab_size, config.text_config.eos_token_id = 61, EOS
  return config


class Outputs(NamedTuple):
  """What both sides compute, as numpy arrays; gradients by transformers' names."""

  image_embeds: np.ndarray
  text_embeds: np.ndarray
  segments: np.ndarray
  assignments: list[np.ndarray]
  loss: float
  grads: dict[str, np.ndarray]


def theirs(model: transformers.GroupViTModel, images: np.ndarray, tokens: np.ndarray) -> Outputs:
  pixels, ids = torch.tensor(images.transpose(0, 3, 1, 2)), torch.tensor(tokens)
  # `forward` returns embeddings normalised; hooks see them as the projectors leave them.
  projected = {}
  for name in ('visual_projection', 'text_projection'):
    getattr(model, name).register_forward_hook(lambda module, args, out, name=name: projected.update({name: out}))
  out = model(input_ids=ids, pixel_values=pixels, return_loss=True, output_attentions=True)
  out.loss.backward()
  to_numpy = lambda x: x.detach().numpy()
  return Outputs(
    to_numpy(projected['visual_projection']),
    to_numpy(projected['text_projection']),
    to_numpy(out.vision_model_output.last_hidden_state),
    [to_numpy(x) for x in out.vision_model_output.attentions],
    out.loss.item(),
    {name: to_numpy(p.grad) for name, p in model.named_parameters()},
  )


def ours(model: transformers.GroupViTModel, images: np.ndarray, tokens: np.ndarray) -> Outputs:
  spec = huggingface.from_huggingface_config(model.config.to_dict())
  jax_model = spec.build()
  state = {name: x.numpy() for name, x in model.state_dict().items()}
  variables = huggingface.from_huggingface(state, state_dicts.abstract_variables(jax_model))

  @jax.jit
  def run(params, batch_stats, images, tokens):
    def loss_fn(params):
      bound = jax_model.bind({'params': params, 'batch_stats': batch_stats})
      image, text = bound.encode_image(images), bound.encode_text(tokens)
      return losses.contrastive_loss(image.embeds, text, params['logit_scale']).loss, (image, text)

    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  with jax.default_matmul_precision('highest'):
    (loss, (image, text)), grads = run(variables['params'], variables['batch_stats'], images, tokens)
  return Outputs(
    image.embeds,
    text,
    image.segments,
    list(image.assignments),
    float(loss),
    huggingface.to_huggingface({'params': grads}),
  )


@pytest.fixture(scope='module', params=[released_config, odd_config], ids=['released', 'odd'])
def outputs(request) -> tuple[Outputs, Outputs]:
  config = request.param()
  model = huggingface_models.random_model(config)
  text, vision = config.text_config, config.vision_config
  rng = np.random.default_rng(1)
  size = vision.image_size if isinstance(vision.image_size, list) else [vision.image_size] * 2
  images = rng.standard_normal((2, *size, 3)).astype(np.float32)
  tokens = rng.integers(0, text.vocab_size - 1, (2, text.max_position_embeddings))
  tokens[tokens == text.eos_token_id] = 0
  # Ids, larger ones than EOS too and EOS again, follow the first EOS: none may matter.
  tokens[0, [4, 6]] = tokens[1, -1] = text.eos_token_id
  return ours(model, images, tokens), theirs(model, images, tokens)


def test_assignments_are_decisive(outputs):
  # Otherwise the comparisons below would pass with uniform assignments.
  for soft in outputs[1].assignments:
    assert np.median(soft.max(axis=1)) > 0.5
    assert len(np.unique(soft.argmax(axis=1))) > 2


def test_features_agree(outputs):
  mine, other = outputs
  for name in ('image_embeds', 'text_embeds', 'segments'):
    np.testing.assert_allclose(getattr(mine, name), getattr(other, name), rtol=0, atol=1e-4, err_msg=name)


def test_assignments_agree(outputs):
  mine, other = outputs
  assert len(mine.assignments) == len(other.assignments) == 2
  for a, b in zip(mine.assignments, other.assignments):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    second, first = np.sort(b, axis=1)[:, -2:].swapaxes(0, 1)
    clear = first - second > 1e-4
    np.testing.assert_array_equal(a.argmax(axis=1)[clear], b.argmax(axis=1)[clear])


def test_loss_and_every_gradient_agree(outputs):
  mine, other = outputs
  np.testing.assert_allclose(mine.loss, other.loss, rtol=1e-3)
  assert {name for name in mine.grads if not name.endswith('num_batches_tracked')} == other.grads.keys()
  norm = np.linalg.norm
  for name, grad in other.grads.items():
    scale = norm(grad)
    for dead, alive in DEAD.items():
      if name.endswith(dead):
        scale = norm(other.grads[name.removesuffix(dead) + alive])
        assert norm(grad) < 1e-4 * scale, name
    assert norm(grad - mine.grads[name]) <= 1e-3 * scale, (name, norm(grad - mine.grads[name]), scale)
