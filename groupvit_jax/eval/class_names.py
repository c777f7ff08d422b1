"""Class names: sets of synonyms and of background phrases, in files that anyone can edit; and their embeddings."""

from collections.abc import Iterable, Mapping, Sequence
import functools
import os
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from groupvit_jax.data import prompts as prompts_lib
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval.benchmarks import Benchmark
from groupvit_jax.model.image_text import ImageTextModel

OWN = 'benchmark'  # the set of a benchmark's own names
PUBLISHED = 'groupvit'  # the spellings behind the published results, where they differ
POOLING = 'synonyms: mean of their embeddings; background phrases: a pixel whose best name is one is background'
_BUNDLED = Path(__file__).with_name('names')  # SET/BENCHMARK.txt
_BATCH_SIZES = 16, 256  # the smallest and the largest; a power of two
_LENGTH_MULTIPLE = 8  # of tokens


class ClassName(NamedTuple):
  """A class to segment."""

  name: str
  synonyms: tuple[str, ...]  # the name among them


class NameSet(NamedTuple):
  """The names that a benchmark's classes are looked for by."""

  name: str  # as asked for
  classes: tuple[ClassName, ...]  # all but the background
  background: tuple[str, ...]  # phrases whose pixels are background

  @property
  def prompts(self) -> tuple[tuple[str, ...], ...]:
    """The synonyms of each class, then each background phrase: what `embed_synonyms` takes and `Labeller` scores."""
    return tuple(each.synonyms for each in self.classes) + tuple((phrase,) for phrase in self.background)

  def to_json(self) -> dict[str, object]:
    """The names, and how several of one class are pooled."""
    return {
      'class_names': ['|'.join(each.synonyms) for each in self.classes],
      'background_phrases': list(self.background),
      'pooling': POOLING,
    }


def parse_class_names(class_names: Sequence[str], reserved: Sequence[str] = ()) -> tuple[ClassName, ...]:
  """Parses C class names, in which '|' separates synonyms; the first one names the class.

  Args:
    class_names: C of them.
    reserved: names that are taken.

  Raises:
    ValueError: there are none, one is empty, or a name occurs twice (case does not count).
  """
  if isinstance(class_names, str):
    raise UserError(f'class_names is one text, {class_names!r}; put it into a list')
  if not isinstance(class_names, Iterable):
    raise UserError(f'class_names={class_names!r} is no list; name classes, as in ["dog", "banana"]')
  parsed, seen = [], {name.casefold() for name in reserved}
  for text in class_names:
    if not isinstance(text, str):
      raise UserError(f'the class {text!r} is no text; write its name')
    synonyms = tuple(' '.join(name.split()) for name in text.split('|'))
    for name in synonyms:
      if not name:
        raise UserError(f'the class {text!r} has an empty name; write it or remove it')
      if name.casefold() in seen:
        raise UserError(f'the class {name!r} is named twice; remove one')
      seen.add(name.casefold())
    parsed.append(ClassName(synonyms[0], synonyms))
  if not parsed:
    raise UserError('there are no classes to look for; name at least one, as in dog,banana')
  return tuple(parsed)


def find_names(benchmark: Benchmark, name: str) -> NameSet:
  """A set of names of a benchmark's classes.

  Args:
    benchmark: whose classes.
    name: 'benchmark' for its own names; a set of the folder names/, such as 'synonyms', of which 'groupvit' is the
      benchmark's own where it has no file; or the path of a file, or of a folder with files called BENCHMARK.txt. A
      file has a line per class in label order, `name|synonym|synonym`; the line of a background class is
      `background|phrase|phrase`.

  Raises:
    ValueError: there is no such set, or it does not fit the benchmark.
  """
  path = _BUNDLED / name if name in bundled_sets() else Path(name)
  path = path / f'{benchmark.name}.txt' if os.path.isdir(path) else path
  if name == OWN or name == PUBLISHED and not os.path.exists(path):
    return _parse_lines(name, benchmark, benchmark.own_names or benchmark.classes)
  try:
    text = path.read_text('utf-8')
  except (OSError, ValueError) as error:
    known = ', '.join([OWN, *bundled_sets()])
    raise UserError(f'class_names={name!r}: there is no text file {path}; choose {known}, or write it') from error
  lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith('#')]
  if len(lines) != benchmark.num_classes:
    wanted = f'{benchmark.num_classes}: one a line' + ', the background first' * benchmark.background
    raise UserError(f'{path} names {len(lines)} classes; {benchmark.name} has {wanted}')
  try:
    return _parse_lines(name, benchmark, lines)
  except ValueError as error:
    raise UserError(f'{path}: {error}') from error


def _parse_lines(name: str, benchmark: Benchmark, lines: Sequence[str]) -> NameSet:
  classes = parse_class_names(lines)
  phrases = classes[0].synonyms[1:] if benchmark.background else ()
  return NameSet(name, classes[benchmark.background :], phrases)


def bundled_sets() -> tuple[str, ...]:
  """The sets in `names/`."""
  return tuple(sorted(path.name for path in _BUNDLED.iterdir()))


@functools.partial(jax.jit, static_argnames='model')
def _embed_texts(variables: dict, tokens: jax.Array, *, model: ImageTextModel) -> jax.Array:
  return model.apply(variables, tokens, method='encode_text')


def embed_classes(
  model: ImageTextModel, variables: dict, tokenizer: Tokenizer, class_names: Sequence[str], templates: str
) -> np.ndarray:
  """Embeds C class names in every template of a named set: unit vectors [C, E], float32."""
  return embed_prompts(model, variables, tokenizer, prompts_lib.class_prompts(class_names, templates))


def embed_synonyms(
  model: ImageTextModel, variables: dict, tokenizer: Tokenizer, classes: Sequence[Sequence[str]], templates: str
) -> np.ndarray:
  """Embeds C classes of several names each, as `embed_classes` and `pool_synonyms` do it: unit vectors [C, E]."""
  names = list(dict.fromkeys(name for synonyms in classes for name in synonyms))
  embeds = embed_classes(model, variables, tokenizer, names, templates)
  return pool_synonyms(dict(zip(names, embeds)), classes)


def pool_synonyms(embeds: Mapping[str, np.ndarray], classes: Sequence[Sequence[str]]) -> np.ndarray:
  """The mean of the embeddings of each class's synonyms, normalised: unit vectors [C, E], float32."""
  means = [np.mean([embeds[name] for name in synonyms], axis=0) for synonyms in classes]
  return np.stack([mean / np.linalg.norm(mean) for mean in means])


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
