"""One call: pictures and words in; label maps, groups, scores and overlays out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import itertools
import os
from typing import NamedTuple

from etils import epath
import jax
import numpy as np
from PIL import Image

from groupvit_jax.data.images import read_image
from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval import class_embeddings, draw, windows
from groupvit_jax.eval.benchmarks import MAX_CLASSES
from groupvit_jax.eval.evaluator import windows_per_batch
from groupvit_jax.eval.labeller import Labeller
from groupvit_jax.eval.protocols import find_protocol, NATIVE, Protocol
from groupvit_jax.eval.window_encoder import EncodedWindows, group_maps, WindowEncoder
from groupvit_jax.interop import bundle, read
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.prediction import Prediction
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import with_fastest_attention
from groupvit_jax.train import open_run

BACKGROUND = 'background'
_BATCH_SIZES = (1, 4, 16)  # windows on each device at a time: one compilation each, when first needed
_FEWEST_WORDS = 16  # to compile for; then twice as many, and so on
_MOST_EMBEDDINGS = 4096  # of words that are kept

Picture = np.ndarray | Image.Image | os.PathLike | str


class Word(NamedTuple):
  """A class to look for."""

  name: str
  synonyms: tuple[str, ...]  # the name among them


class EncodedImage(NamedTuple):
  """A picture that has been through the encoder: any words can be looked for in it."""

  image: np.ndarray  # uint8 [H, W, 3]
  windows: EncodedWindows
  group_maps: Callable[[], tuple[np.ndarray, ...]]  # per grouping stage uint8 [H, W]; computed once


class Predictor:
  """Segments pictures of any size into any words.

      predictor = Predictor.from_workdir('runs/quickstart')
      prediction = predictor('dog.jpg', ['dog|puppy', 'grass'])

  `encode` and `find` are its two halves: other words and thresholds need only the second one. Each is
  compiled once for all pictures and numbers of words of about one size: batches of 1, 4 and 16 windows
  (on a CPU fewer of large ones), up to 16, 32, 64, 128 and 256 words. Embeddings of the last
  words are kept.
  """

  def __init__(
    self,
    model: ImageTextModel,
    variables: dict[str, object],
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    protocol: Protocol | str | None = None,
  ):
    """Takes a model as it is; `open` reads one.

    Args:
      model: the model.
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      tokenizer: of the model.
      mesh: all devices, of one process.
      protocol: how pictures are labelled, or its name: 'groupvit' for the paper's windows of 448 px;
        None for windows of the size the model was trained on. Its threshold is not used: calls have
        their own.

    Raises:
      ValueError: there is more than one process, or no protocol of that name.
    """
    if jax.process_count() > 1:
      raise UserError(f'pictures are labelled by one process and there are {jax.process_count()}; start only one')
    if not isinstance(protocol, Protocol):
      protocol = find_protocol(NATIVE if protocol is None else protocol, model.vision.image_size)
    self.protocol = protocol
    self._model, self._variables, self._tokenizer, self._mesh = model, variables, tokenizer, mesh
    self._embeds: dict[str, np.ndarray] = {}

  @classmethod
  def from_workdir(
    cls,
    workdir: epath.PathLike,
    *,
    protocol: Protocol | str | None = None,
    weights: open_run.Weights = 'best',
    checkpoint: str = open_run.NEWEST,
  ) -> 'Predictor':
    """Reads a checkpoint of a run; nothing is written.

    Args:
      workdir: what train.py was given.
      protocol: as for `Predictor`.
      weights: as for `trained_run.open_run`.
      checkpoint: likewise.

    Raises:
      ValueError: there is no run, or no checkpoint of it can be read.
    """
    return cls.from_run(open_run.open_run(workdir, checkpoint, weights=weights), protocol=protocol)

  @classmethod
  def open(
    cls,
    path: epath.PathLike,
    *,
    protocol: Protocol | str | None = None,
    weights: open_run.Weights = 'best',
    checkpoint: str = open_run.NEWEST,
  ) -> 'Predictor':
    """Opens a model of any form.

    Args:
      path: a workdir, a Hugging Face folder, or a folder that `export` wrote in any of its formats. One of
        `--format=stablehlo` runs on one device.
      protocol: as for `Predictor`.
      weights: which of a workdir's, as for `trained_run.open_run`.
      checkpoint: likewise.

    Raises:
      ValueError: there is no model, it cannot be read, or it is no workdir that had a choice of weights.
    """
    path = epath.Path(path)
    is_bundle = (path / 'bundle.json').exists()
    if not is_bundle and (not path.is_dir() or (path / 'checkpoints').is_dir()):
      return cls.from_workdir(path, protocol=protocol, weights=weights, checkpoint=checkpoint)
    if weights != 'best' or checkpoint != open_run.NEWEST:
      raise UserError(f'{path} is no workdir and has one set of weights; leave out weights and checkpoint')
    if is_bundle:
      model, variables, tokenizer = bundle.read_bundle(path)
      return cls(model, variables, tokenizer, sharding.make_mesh(devices=jax.devices()[:1]), protocol=protocol)
    found, mesh, tokenizer = read.read_weights(path), sharding.make_mesh(), build_tokenizer(path)
    read.check_tokenizer(
      tokenizer, vocab_size=found.spec.vocab_size, eos_id=found.spec.eos_id, remedy=f'put that into {path}'
    )
    variables = jax.device_put(found.variables, sharding.replicated(mesh))
    return cls(with_fastest_attention(found.spec.build(), mesh), variables, tokenizer, mesh, protocol=protocol)

  @classmethod
  def from_run(cls, run: open_run.TrainedRun, *, protocol: Protocol | str | None = None) -> 'Predictor':
    """The predictor of a run that has been opened."""
    return cls(run.model, run.variables, run.tokenizer, run.mesh, protocol=protocol)

  def __call__(
    self, pictures: Picture | Sequence[Picture], words: Sequence[str], *, threshold: float | None = None
  ) -> Prediction | list[Prediction]:
    """Segments pictures.

    Args:
      pictures: one or a list: uint8 arrays [H, W, 3] (grey, RGBA and 16 bits as well), Pillow images
        or paths.
      words: what to look for; 'dog|puppy' is one class with two names.
      threshold: score from 0 to 1 below which a pixel is background; None gives every pixel a word.

    Returns:
      A prediction, or a list in the order of the pictures.

    Raises:
      ValueError: a picture cannot be read, there are no words, a word is named twice, or the
        threshold is out of range.
    """
    finder = self._finder(words, threshold)
    if isinstance(pictures, (np.ndarray, Image.Image, str, os.PathLike)):
      return finder(self.encode([pictures])[0])
    return [finder(encoded) for encoded in self.encode(pictures)]

  def encode(self, pictures: Sequence[Picture]) -> list[EncodedImage]:
    """Takes pictures through the encoder, once for any words and thresholds that `find` is given.

    Args:
      pictures: as for `__call__`.

    Returns:
      What `find` takes, in the order of the pictures.

    Raises:
      ValueError: a picture cannot be read.
    """
    keys = [_name(picture, index) for index, picture in enumerate(pictures)]
    images = [read_image(picture, key) for picture, key in zip(pictures, keys)]
    numbered = ((str(index), image) for index, image in enumerate(images))
    found = sorted(self._encode(numbered), key=lambda encoded: int(encoded.windows.image.key))
    for key, encoded in zip(keys, found, strict=True):
      encoded.windows.image = dataclasses.replace(encoded.windows.image, key=key)
    return found

  def find(self, encoded: EncodedImage, words: Sequence[str], *, threshold: float | None = None) -> Prediction:
    """Looks for words in an encoded picture; arguments and errors as for `__call__`."""
    return self._finder(words, threshold)(encoded)

  def stream(
    self, images: Iterable[tuple[str, np.ndarray]], words: Sequence[str], *, threshold: float | None = None
  ) -> Iterator[Prediction]:
    """Segments any number of pictures, holding only a few of them.

    Args:
      images: (key, uint8 [H, W, 3]) pairs; keys are unique.
      words: as for `__call__`.
      threshold: as for `__call__`.

    Returns:
      An iterator over a prediction per picture, in about the order of the pictures.

    Raises:
      ValueError: as for `__call__`; of words and threshold at once, of a picture when its turn comes.
    """
    return map(self._finder(words, threshold), self._encode(images))

  def _finder(self, words: Sequence[str], threshold: float | None) -> Callable[[EncodedImage], Prediction]:
    """What finds the words in encoded pictures."""
    found_words = parse_words(words, reserved=() if threshold is None else (BACKGROUND,))
    if len(found_words) > MAX_CLASSES - (threshold is not None):
      raise UserError(f'there are {len(found_words)} classes; at most {MAX_CLASSES} fit 8-bit labels')
    labeller = Labeller(
      dataclasses.replace(self.protocol, threshold=threshold),
      self.embed_words(found_words),
      float(self._variables['params']['logit_scale']),
      self._mesh,
      thresholds=() if threshold is None else (threshold,),
      capacity=max(_FEWEST_WORDS, 1 << (len(found_words) - 1).bit_length()),
    )
    names = tuple(word.name for word in found_words)
    return functools.partial(_label, labeller, names, background=threshold is not None)

  def _encode(self, images: Iterable[tuple[str, np.ndarray]]) -> Iterator[EncodedImage]:
    """Encodes (key, image) pairs, in about their order."""
    waiting: dict[str, np.ndarray] = {}
    encoder, pictures = self._fit_encoder(self._cut(images, waiting))
    for item in encoder.encode(self._variables, pictures):
      if isinstance(item, EncodedWindows):
        image = waiting.pop(item.image.key)
        yield EncodedImage(image, item, functools.cache(functools.partial(self._groups, image)))

  def _groups(self, image: np.ndarray) -> tuple[np.ndarray, ...]:
    side = self.protocol.window
    return group_maps(self._model, self._variables, [image], side, self._mesh)[0]

  def embed_words(self, words: Sequence[Word]) -> np.ndarray:
    """Unit embeddings [C, E] of classes: the mean of their synonyms', each the mean over templates."""
    wanted = dict.fromkeys(name for word in words for name in word.synonyms)
    found = {name: self._embeds.pop(name) for name in wanted if name in self._embeds}
    new = [name for name in wanted if name not in found]
    if new:
      embeds = class_embeddings.embed_classes(
        self._model, self._variables, self._tokenizer, new, self.protocol.templates
      )
      found.update(zip(new, embeds))
    self._embeds.update(found)  # at the end: the first ones have not been asked for the longest
    for name in list(self._embeds)[:-_MOST_EMBEDDINGS]:
      del self._embeds[name]
    means = [np.mean([found[name] for name in word.synonyms], axis=0) for word in words]
    return np.stack([mean / np.linalg.norm(mean) for mean in means])

  def _cut(
    self, images: Iterable[tuple[str, np.ndarray]], waiting: dict[str, np.ndarray]
  ) -> Iterator[windows.CutImage]:
    """Cuts pictures into windows, and notes each under its key until it is done."""
    for key, image in images:
      waiting[key] = image
      yield windows.cut_image(image, self.protocol, self._model.vision.patch_size, key=key)

  def _fit_encoder(self, pictures: Iterator[windows.CutImage]) -> tuple[WindowEncoder, Iterator[windows.CutImage]]:
    """An encoder with batches no larger than the work, and the pictures, of which some were looked at."""
    ways, ahead, total = sharding.data_parallel_size(self._mesh), [], 0
    most = windows_per_batch(self._mesh, self.protocol.window)
    sizes = [size for size in _BATCH_SIZES if size * ways <= most]
    for picture in pictures:
      ahead.append(picture)
      total += len(picture.windows)
      if total > sizes[-1] * ways:
        break
    rows = next((size for size in sizes if size * ways >= total), sizes[-1])
    if rows > total and self._mesh.size == 1 and self._mesh.devices.flat[0].platform == 'cpu':
      rows = max(size for size in sizes if size <= total)  # a core takes as long over padding as over a window
    encoder = WindowEncoder(self._model, self.protocol, self._mesh, rows * ways)
    return encoder, itertools.chain(ahead, pictures)


def _label(labeller: Labeller, names: tuple[str, ...], encoded: EncodedImage, *, background: bool) -> Prediction:
  """Everything about an encoded image; the background is black and comes first."""
  label_map = labeller.label(encoded.windows)
  return Prediction(
    key=encoded.windows.image.key,
    image=encoded.image,
    classes=(BACKGROUND,) * background + names,
    background=background,
    palette=((0, 0, 0),) * background + draw.spread_palette(len(names)),
    labels=label_map.labels,
    pixel_scores=label_map.scores,
    scores=np.concatenate([[np.nan] * background, label_map.class_scores.max(axis=(0, 1))]),
    group_maps=encoded.group_maps,
    windows=encoded.windows,
    class_scores=label_map.class_scores,
  )


def parse_words(words: Sequence[str], reserved: Sequence[str] = ()) -> tuple[Word, ...]:
  """Classes from words, in which '|' separates synonyms; the first one names the class.

  Args:
    words: C of them.
    reserved: names that are taken.

  Returns:
    C classes.

  Raises:
    ValueError: there are none, one is empty, or a name occurs twice (case does not count).
  """
  if isinstance(words, str):
    raise UserError(f'words is one text, {words!r}; put it into a list')
  parsed, seen = [], {name.casefold() for name in reserved}
  for word in words:
    synonyms = tuple(' '.join(name.split()) for name in word.split('|'))
    for name in synonyms:
      if not name:
        raise UserError(f'the word {word!r} has an empty name; write it or remove it')
      if name.casefold() in seen:
        raise UserError(f'the class {name!r} is named twice; remove one')
      seen.add(name.casefold())
    parsed.append(Word(synonyms[0], synonyms))
  if not parsed:
    raise UserError('there are no classes to look for; name at least one, as in dog,banana')
  return tuple(parsed)


def _name(picture: Picture, index: int) -> str:
  """What messages call a picture."""
  return str(picture) if isinstance(picture, (str, os.PathLike)) else f'number {index + 1}'
