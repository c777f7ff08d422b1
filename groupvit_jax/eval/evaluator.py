"""Zero-shot semantic segmentation: a model, labelled images and class names in, mIoU out."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools

import jax
from jax.sharding import Mesh
import ml_collections
import numpy as np

from groupvit_jax.data.images import read_image
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval import draw
from groupvit_jax.eval.benchmarks import Benchmark
from groupvit_jax.eval.class_names import embed_synonyms, find_names, NameSet
from groupvit_jax.eval.labelled import (
  BadImages,
  LabelledSource,
  open_scenes,
  prefetch,
  spread_indices,
  subset,
  VALIDATION,
)
from groupvit_jax.eval.labeller import CountingLabeller, LabelMap
from groupvit_jax.eval.protocols import native_protocol, Protocol
from groupvit_jax.eval.result import Result
from groupvit_jax.eval.window_encoder import cut_image, CutImage, EncodedWindows, group_maps, WindowEncoder
from groupvit_jax.model import metrics
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.metrics import GroupingHealth, ignore_label
from groupvit_jax.running import sharding

_WINDOWS_PER_DEVICE = 32
_PIXELS_PER_CPU = 4 * 448**2  # in windows: larger batches are no faster there

OnImage = Callable[[EncodedWindows, LabelMap], None]


def windows_per_batch(mesh: Mesh, window: int) -> int:
  """Windows of a side that all devices of a mesh encode together."""
  each = _WINDOWS_PER_DEVICE
  if mesh.devices.flat[0].platform == 'cpu':
    each = min(each, max(1, _PIXELS_PER_CPU // window**2))
  return each * sharding.data_parallel_size(mesh)


def own_labels(labels: np.ndarray) -> np.ndarray:
  """The labels as they are."""
  return labels


@dataclasses.dataclass(frozen=True, eq=False)
class Scoring:
  """One way to score encoded images; those of a call share the encodings.

  Attributes:
    benchmark: classes and colours.
    protocol: how images are labelled, with the threshold of a background.
    names: of the classes.
    text_embeds: [C, E], of `names.prompts`.
    thresholds: further background thresholds, counted along at little cost.
    train_labels: labels of the benchmark from those of the source, both [H, W].
  """

  benchmark: Benchmark
  protocol: Protocol
  names: NameSet
  text_embeds: np.ndarray
  thresholds: tuple[float, ...] = ()
  train_labels: Callable[[np.ndarray], np.ndarray] = own_labels


def build_scoring(
  model: ImageTextModel,
  variables: dict,
  tokenizer: Tokenizer,
  benchmark: Benchmark,
  protocol: Protocol,
  **options: object,
) -> Scoring:
  """A scoring by the names of a protocol; options as for `Scoring`.

  Raises:
    ValueError: there is no such set of names, or the benchmark has a background and the protocol no threshold for it.
  """
  protocol, names = benchmark.fix_threshold(protocol), find_names(benchmark, protocol.class_names)
  embeds = embed_synonyms(model, variables, tokenizer, names.prompts, protocol.templates)
  return Scoring(benchmark, protocol, names, embeds, **options)


def evaluate(
  model: ImageTextModel,
  variables: dict,
  source: LabelledSource,
  scorings: Sequence[Scoring],
  *,
  batch_size: int,
  mesh: Mesh | None = None,
  num_threads: int = 2,
  oracle: bool = True,
  on_image: OnImage | None = None,
  provenance: Mapping[str, str] | None = None,
) -> list[Result]:
  """Segments labelled images and scores the label maps; each image is decoded and encoded once for all scorings.

  Every process takes its share of the images. Calls with the same model, mesh, number of classes,
  batch size and, but for thresholds, protocol compile once.

  Args:
    model: the model.
    variables: of the model, on the devices of the mesh.
    source: labelled images.
    scorings: at least one; their protocols cut images alike.
    batch_size: windows per batch, of all processes.
    mesh: the devices; None for the first of this process.
    num_threads: threads that decode and resize ahead of the devices.
    oracle: whether segments are also scored with perfect names, for a second pass over the pixels.
    on_image: called with every image and its label map by the first scoring, about in order. Without it label maps
      stay on the devices.
    provenance: what else to name in the results.

  Returns:
    A result per scoring, the same on every process.

  Raises:
    BadImage: an image or label map is bad; on every process, whichever has met it.
    ValueError: there are no images, names and embeddings differ in number, or a batch does not fit the mesh.
  """
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
  for scoring in scorings:
    _check(source, scoring)
  logit_scale = float(variables['params']['logit_scale'])
  labellers = [_build_labeller(scoring, logit_scale, mesh) for scoring in scorings]
  cut = functools.partial(cut_labelled, source, scorings=scorings, patch_size=model.vision.patch_size)
  mine, bad_images = range(jax.process_index(), len(source), jax.process_count()), BadImages()
  images = prefetch(bad_images.guard(cut), mine, num_threads=num_threads)
  refinements = tuple(dict.fromkeys(scoring.protocol.refinement for scoring in scorings))
  encoder = WindowEncoder(model, scorings[0].protocol, mesh, batch_size, refinements)
  health: GroupingHealth | None = None
  for item in encoder.encode(variables, (image for image in images if image is not None)):
    if isinstance(item, GroupingHealth):
      health = item if health is None else health.merge(item)
      continue
    for scoring, labeller in zip(scorings, labellers):
      fetch = on_image is not None and scoring is scorings[0]
      label_map = labeller.count(item, scoring.train_labels(item.image.label), oracle=oracle, fetch=fetch)
      if fetch:
        on_image(item, label_map)
  bad_images.check()
  results = []
  for scoring, labeller in zip(scorings, labellers):
    predicted, named = labeller.counts()
    result = Result(
      benchmark=scoring.benchmark,
      protocol=scoring.protocol,
      names=scoring.names,
      num_images=len(source),
      counts=predicted[0],
      oracle_counts=named if oracle else None,
      health=health.compute(),
      thresholds=scoring.thresholds,
      threshold_counts=predicted[1:],
      provenance=provenance or {},
    )
    results.append(result)
  return results


def _build_labeller(scoring: Scoring, logit_scale: float, mesh: Mesh) -> CountingLabeller:
  return CountingLabeller(
    scoring.protocol,
    scoring.text_embeds,
    logit_scale,
    mesh,
    thresholds=(scoring.protocol.threshold, *scoring.thresholds) if scoring.benchmark.background else (),
    num_phrases=len(scoring.names.background),
  )


def _check(source: LabelledSource, scoring: Scoring) -> None:
  """Raises ValueError for what would fail, or mislead, only after a while."""
  benchmark, names = scoring.benchmark, scoring.names.prompts
  if not len(source):
    raise UserError(f'{benchmark.name} has no images; check its path and split')
  if len(scoring.text_embeds) != len(names):
    raise UserError(
      f'{benchmark.name} asks for {len(names)} classes but {len(scoring.text_embeds)} are embedded; embed names.prompts'
    )
  if source.classes and tuple(source.classes) != benchmark.classes:
    raise UserError(
      f'the source labels {len(source.classes)} classes ({", ".join(source.classes[:3])}, ...) but '
      f'{benchmark.name} has {benchmark.num_classes} ({", ".join(benchmark.classes[:3])}, ...); '
      'give both the same names in the same order'
    )


def cut_labelled(source: LabelledSource, index: int, *, scorings: Sequence[Scoring], patch_size: int) -> CutImage:
  """Reads, checks and cuts the image of an index.

  Raises:
    ValueError: it cannot be decoded, or its label map does not fit it or a benchmark.
  """
  record = source[index]
  key, label = record['key'], record['label']
  for scoring in scorings:
    benchmark, found = scoring.benchmark, scoring.train_labels(label)
    ignored = ignore_label(found.dtype)
    beyond = found[(found >= benchmark.num_classes) & (found != ignored)]
    if beyond.size:
      raise UserError(
        f'the label map of {key!r} holds {beyond[0]}, but {benchmark.name} has labels 0 to '
        f'{benchmark.num_classes - 1} and {ignored}'
      )
  image = read_image(record['image'], key)
  return cut_image(image, scorings[0].protocol, patch_size, key=key, index=index, label=label)


def image_miou(truth: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
  """mIoU of one image over the classes that it or its label map has; nan where nothing is labelled."""
  counted = truth < num_classes
  cells = truth[counted].astype(int) * num_classes + labels[counted]
  counts = np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
  return float(metrics.scores_from_counts(counts).miou)


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Scores a model on labelled images, as often as asked for. Compiles at the first call only.

  Variables are {'params': ..., 'batch_stats': ...}, on the mesh.

  Attributes:
    model: the model.
    tokenizer: of the model.
    mesh: where the variables live.
    source: the images.
    benchmark: their classes.
    protocol: how they are labelled.
    num_threads: threads that decode and resize ahead of the devices; 0 for images that need neither.
    thresholds: further background thresholds, counted along.
  """

  model: ImageTextModel
  tokenizer: Tokenizer
  mesh: Mesh
  source: LabelledSource
  benchmark: Benchmark
  protocol: Protocol
  num_threads: int
  thresholds: tuple[float, ...] = ()

  def evaluate(
    self, variables: dict, *, on_image: OnImage | None = None, provenance: Mapping[str, str] | None = None
  ) -> Result:
    """Labels and scores all images; the same result on every process. `on_image` is called for its own images."""
    return self._evaluate(variables, self.source, self.thresholds, on_image=on_image, provenance=provenance)

  def rows(self, variables: dict, indices: Sequence[int]) -> list[draw.Row]:
    """Input, truth, prediction and groups of some images, to be drawn; the same on every process."""
    labels: dict[str, np.ndarray] = {}
    # Every process labels all of them: it takes each n-th of a source in which each occurs n times.
    everywhere = subset(self.source, np.repeat(indices, jax.process_count()).tolist())
    keep = lambda encoded, label_map: labels.setdefault(encoded.image.key, label_map.labels)
    self._evaluate(variables, everywhere, (), oracle=False, on_image=keep)
    records = [self.source[index] for index in indices]
    images = [read_image(record['image'], record['key']) for record in records]
    grouped = group_maps(self.model, variables, images, self.protocol.window, self.mesh)
    return [
      draw.Row(image, record['label'], labels[record['key']], maps)
      for record, image, maps in zip(records, images, grouped)
    ]

  def panel(self, variables: dict, count: int = 4) -> np.ndarray:
    """A drawing of some images, spread evenly, the same at every call: uint8 [H, W, 3], on every process."""
    rows = self.rows(variables, spread_indices(len(self.source), count))
    return draw.draw_panel(rows, self.benchmark.palette, self.benchmark.classes)

  def _evaluate(
    self, variables: dict, source: LabelledSource, thresholds: tuple[float, ...], **options: object
  ) -> Result:
    names = self.benchmark, self.protocol
    scoring = build_scoring(self.model, variables, self.tokenizer, *names, thresholds=thresholds)
    (result,) = evaluate(
      self.model,
      variables,
      source,
      [scoring],
      batch_size=windows_per_batch(self.mesh, self.protocol.window),
      mesh=self.mesh,
      num_threads=self.num_threads,
      **options,
    )
    return result


def build_scene_evaluator(
  config: ml_collections.ConfigDict, model: ImageTextModel, tokenizer: Tokenizer, mesh: Mesh, *, split: str = VALIDATION
) -> Evaluator:
  """Scores a run's model on its held-out scenes; see `open_scenes`."""
  benchmark, source = open_scenes(config, split)
  protocol = native_protocol(tuple(config.model.vision.image_size))
  # A scene is composed faster than a thread is woken.
  return Evaluator(model, tokenizer, mesh, source, benchmark, protocol, num_threads=0)
