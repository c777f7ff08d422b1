"""Class embeddings: the mean of the text embeddings of each class's prompts."""

from collections.abc import Sequence
import functools

import jax
from jax.experimental import multihost_utils
import numpy as np

from groupvit_jax.data import prompts as prompts_lib
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.model.image_text import ImageTextModel

_BATCH_SIZES = 16, 256  # the smallest and the largest; a power of two
_LENGTH_MULTIPLE = 8  # of tokens


@functools.partial(jax.jit, static_argnames='model')
def _embed_texts(variables: dict, tokens: jax.Array, *, model: ImageTextModel) -> jax.Array:
  return model.apply(variables, tokens, method='encode_text')


def embed_classes(
  model: ImageTextModel, variables: dict, tokenizer: Tokenizer, class_names: Sequence[str], templates: str
) -> np.ndarray:
  """Embeds C class names in every template of a named set: unit vectors [C, E], float32."""
  return embed_prompts(model, variables, tokenizer, prompts_lib.class_prompts(class_names, templates))


def embed_prompts(
  model: ImageTextModel, variables: dict, tokenizer: Tokenizer, prompts: Sequence[Sequence[str]]
) -> np.ndarray:
  """Embeds classes that are each described by several prompts.

  The projected features are averaged over the prompts, and only then normalised.

  Args:
    model: the model.
    variables: of the model.
    tokenizer: of the model.
    prompts: [C][T].

  Returns:
    Unit vectors [C, E], float32.
  """
  tokens = tokenizer.encode([text for row in prompts for text in row], model.text.context_length)
  # Nothing after the end-of-text token matters in a causal tower, and it is most of the work.
  ends = (tokens == tokenizer.eos_id).argmax(axis=1)
  # Lengths and batches are rounded up, so that few shapes are ever compiled.
  tokens = tokens[:, : -(-(ends.max() + 1) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE]
  rows = int(np.clip(1 << (len(tokens) - 1).bit_length(), *_BATCH_SIZES))
  batches = np.pad(tokens, ((0, -len(tokens) % rows), (0, 0)), mode='edge').reshape(-1, rows, tokens.shape[1])
  embeds = [_to_host(_embed_texts(variables, batch, model=model)) for batch in batches]
  means = np.concatenate(embeds)[: len(tokens)].reshape(len(prompts), -1, embeds[0].shape[1]).mean(axis=1)
  return means / np.linalg.norm(means, axis=-1, keepdims=True)


def _to_host(array: jax.Array) -> np.ndarray:
  """The whole of an array that may be sharded over processes."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)
