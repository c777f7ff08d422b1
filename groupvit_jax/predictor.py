"""One call: pictures and words in; label maps, groups, scores and overlays out."""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import itertools
import os
from typing import Any, NamedTuple

from etils import epath
import jax
import numpy as np
from PIL import Image

from groupvit_jax import sharding, trained_run
from groupvit_jax.data.pictures import read_picture
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.evals import groups, semantic_seg, visualize, windows
from groupvit_jax.evals.benchmarks import Benchmark, make_benchmark
from groupvit_jax.evals.protocols import native_protocol, Protocol
from groupvit_jax.evals.segmenter import LabelMap, Segmenter
from groupvit_jax.evals.window_encoder import EncodedPicture, WindowEncoder
from groupvit_jax.models.image_text import ImageTextModel

BACKGROUND = 'background'
_BATCH_SIZES = (1, 4, 16)  # windows on each device at a time: one compilation each, when first needed

Picture = np.ndarray | Image.Image | os.PathLike | str


class Word(NamedTuple):
  """A class to look for."""

  name: str
  synonyms: tuple[str, ...]  # the name among them


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What was found in one picture. Label c stands for `classes[c]`.

  Attributes:
    key: name of the picture: its path, or its place in the list.
    image: uint8 [H, W, 3].
    classes: C names.
    background: whether the first of them is what no word fits well enough.
    palette: their colours.
    labels: uint8 [H, W].
    pixel_scores: float32 [H, W], of those labels.
    scores: [C], of the segment that fits a class best, in any window; nan for the background.
    groups: per grouping stage uint8 [H, W], of the picture seen whole; the final segments are last.
  """

  key: str
  image: np.ndarray
  classes: tuple[str, ...]
  background: bool
  palette: tuple[tuple[int, int, int], ...]
  labels: np.ndarray
  pixel_scores: np.ndarray
  scores: np.ndarray
  groups: tuple[np.ndarray, ...]

  @property
  def areas(self) -> np.ndarray:
    """Share of the picture that each class covers, [C]."""
    return np.bincount(self.labels.ravel(), minlength=len(self.classes)) / self.labels.size

  @property
  def segments(self) -> np.ndarray:
    """The final segments, uint8 [H, W]."""
    return self.groups[-1]

  def mask(self) -> Image.Image:
    """The label map as an indexed picture with the classes' colours."""
    return visualize.mask_image(self.labels, self.palette)

  def overlay(self, opacity: float = visualize.OPACITY) -> np.ndarray:
    """The picture under the classes' colours and names, uint8 [H', W', 3]; small ones are enlarged."""
    labels = self.labels
    if self.background:  # shows the picture as it is
      labels = np.where(labels == 0, np.uint8(visualize.IGNORE_LABEL), labels)
    return visualize.draw_overlay(self.image, labels, self.palette, self.classes, opacity=opacity)

  def group_overlay(self, stage: int = -1) -> np.ndarray:
    """The picture under a stage's groups, uint8 [H', W', 3]; 0 is the first, -1 the final one."""
    return visualize.draw_groups(self.image, self.groups[stage])

  def to_json(self) -> dict[str, Any]:
    """Areas and scores of the classes, largest area first."""
    rows = [
      {
        'label': label,
        'name': name,
        'area': float(area),
        'pixels': int((self.labels == label).sum()),
        'score': None if np.isnan(score) else float(score),
      }
      for label, (name, area, score) in enumerate(zip(self.classes, self.areas, self.scores))
    ]
    height, width = self.labels.shape
    return {
      'picture': self.key,
      'height': height,
      'width': width,
      'classes': sorted(rows, key=lambda row: -row['area']),
    }


class Predictor:
  """Segments pictures of any size into any words.

      predictor = Predictor.from_workdir('runs/quickstart')
      prediction = predictor('dog.jpg', ['dog|puppy', 'grass'])

  Compiled at the first call and for new numbers of words; embeddings of words are kept.
  """

  def __init__(
    self,
    model: ImageTextModel,
    variables: dict[str, object],
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    protocol: Protocol | None = None,
  ):
    """Takes a model as it is; `from_workdir` reads one.

    Args:
      model: the model.
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      tokenizer: of the model.
      mesh: all devices, of one process.
      protocol: how pictures are labelled; None for windows of the size the model was trained on.
        Its threshold is not used: calls have their own.

    Raises:
      ValueError: there is more than one process.
    """
    if jax.process_count() > 1:
      raise ValueError(
        f'pictures are labelled by one process and there are {jax.process_count()}; start only one'
      )
    self.protocol = native_protocol(model.vision.image_size) if protocol is None else protocol
    self._model, self._variables, self._tokenizer, self._mesh = model, variables, tokenizer, mesh
    self._embeds: dict[str, np.ndarray] = {}

  @classmethod
  def from_workdir(cls, workdir: epath.PathLike, *, protocol: Protocol | None = None) -> 'Predictor':
    """Reads the newest whole checkpoint of a run; nothing is written.

    Args:
      workdir: what train.py was given.
      protocol: as for `Predictor`.

    Raises:
      ValueError: there is no run, or no checkpoint of it can be read.
    """
    return cls.from_run(trained_run.open_run(workdir), protocol=protocol)

  @classmethod
  def from_run(
    cls, run: trained_run.TrainedRun, *, protocol: Protocol | None = None
  ) -> 'Predictor':
    """The predictor of a run that has been opened."""
    return cls(run.model, run.variables, run.tokenizer, run.mesh, protocol=protocol)

  def __call__(
    self,
    pictures: Picture | Sequence[Picture],
    words: Sequence[str],
    *,
    threshold: float | None = None,
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
    if isinstance(pictures, (np.ndarray, Image.Image, str, os.PathLike)):
      return self([pictures], words, threshold=threshold)[0]
    named = [(_name(picture, index), picture) for index, picture in enumerate(pictures)]
    images = [(key, read_picture(picture, key)) for key, picture in named]
    numbered = ((str(index), image) for index, (_, image) in enumerate(images))
    found = sorted(self.stream(numbered, words, threshold=threshold), key=lambda p: int(p.key))
    return [dataclasses.replace(p, key=key) for p, (key, _) in zip(found, images, strict=True)]

  def stream(
    self,
    images: Iterable[tuple[str, np.ndarray]],
    words: Sequence[str],
    *,
    threshold: float | None = None,
  ) -> Iterator[Prediction]:
    """Segments any number of pictures, holding only a few of them.

    Args:
      images: (key, uint8 [H, W, 3]) pairs; keys are unique.
      words: as for `__call__`.
      threshold: as for `__call__`.

    Yields:
      A prediction per picture, in about the order of the pictures.

    Raises:
      ValueError: as for `__call__`.
    """
    found_words = parse_words(words, reserved=() if threshold is None else (BACKGROUND,))
    benchmark = _benchmark(found_words, background=threshold is not None)
    protocol = dataclasses.replace(self.protocol, threshold=threshold)
    embeds = self.embed_words(found_words)
    segmenter = Segmenter(
      protocol,
      embeds,
      float(self._variables['params']['logit_scale']),
      background=benchmark.background,
      thresholds=(0.0 if threshold is None else threshold,),
      mesh=self._mesh,
    )
    waiting: dict[str, np.ndarray] = {}
    pictures = self._cut(images, protocol, waiting)
    encoder, pictures = self._fit_encoder(pictures, protocol)
    for item in encoder.encode(self._variables, pictures):
      if isinstance(item, EncodedPicture):
        labelled = segmenter.fetch(segmenter.label(item, oracle=False))
        yield self._finish(waiting.pop(item.picture.key), benchmark, item, labelled)

  def embed_words(self, words: Sequence[Word]) -> np.ndarray:
    """Unit embeddings [C, E] of classes: the mean of their synonyms', each the mean over templates."""
    wanted = dict.fromkeys(name for word in words for name in word.synonyms)
    new = [name for name in wanted if name not in self._embeds]
    if new:
      embeds = semantic_seg.embed_classes(
        self._model, self._variables, self._tokenizer, new, self.protocol.templates
      )
      self._embeds.update(zip(new, embeds))
    means = [np.mean([self._embeds[name] for name in word.synonyms], axis=0) for word in words]
    return np.stack([mean / np.linalg.norm(mean) for mean in means])

  def _cut(
    self,
    images: Iterable[tuple[str, np.ndarray]],
    protocol: Protocol,
    waiting: dict[str, np.ndarray],
  ) -> Iterator[windows.Picture]:
    """Cuts pictures into windows, and notes each under its key until it is done."""
    for key, image in images:
      waiting[key] = image
      yield windows.cut_picture(image, protocol, self._model.vision.patch_size, key=key)

  def _fit_encoder(
    self, pictures: Iterator[windows.Picture], protocol: Protocol
  ) -> tuple[WindowEncoder, Iterator[windows.Picture]]:
    """An encoder with batches no larger than the work, and the pictures, of which some were looked at."""
    ways, ahead, total = sharding.batch_ways(self._mesh), [], 0
    for picture in pictures:
      ahead.append(picture)
      total += len(picture.windows)
      if total > _BATCH_SIZES[-1] * ways:
        break
    rows = next((size for size in _BATCH_SIZES if size * ways >= total), _BATCH_SIZES[-1])
    encoder = WindowEncoder(self._model, protocol, self._mesh, rows * ways)
    return encoder, itertools.chain(ahead, pictures)

  def _finish(
    self, image: np.ndarray, benchmark: Benchmark, encoded: EncodedPicture, labelled: LabelMap
  ) -> Prediction:
    """Everything about a picture that has been labelled."""
    best = labelled.class_scores.max(axis=(0, 1))
    unscored = [np.nan] * benchmark.background
    maps = groups.group_maps(
      self._model, self._variables, [image], self.protocol.window, self._mesh
    )
    return Prediction(
      key=encoded.picture.key,
      image=image,
      classes=benchmark.classes,
      background=benchmark.background,
      palette=benchmark.palette,
      labels=labelled.labels,
      pixel_scores=labelled.scores,
      scores=np.concatenate([unscored, best]),
      groups=maps[0],
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
    raise ValueError(f'words is one text, {words!r}; put it into a list')
  parsed, seen = [], {name.casefold() for name in reserved}
  for word in words:
    synonyms = tuple(' '.join(name.split()) for name in word.split('|'))
    for name in synonyms:
      if not name:
        raise ValueError(f'the word {word!r} has an empty name; write it or remove it')
      if name.casefold() in seen:
        raise ValueError(f'the class {name!r} is named twice; remove one')
      seen.add(name.casefold())
    parsed.append(Word(synonyms[0], synonyms))
  if not parsed:
    raise ValueError('there are no classes to look for; name at least one, as in dog,banana')
  return tuple(parsed)


def _benchmark(words: Sequence[Word], *, background: bool) -> Benchmark:
  """Words as a benchmark: the background, if there is one, is black and comes first."""
  names = [word.name for word in words]
  benchmark = make_benchmark('words', [BACKGROUND] * background + names, background=background)
  palette = ((0, 0, 0),) * background + visualize.spread_palette(len(names))
  return dataclasses.replace(benchmark, palette=palette)


def _name(picture: Picture, index: int) -> str:
  """What messages call a picture."""
  return str(picture) if isinstance(picture, (str, os.PathLike)) else f'number {index + 1}'
