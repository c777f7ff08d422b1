"""Zero-shot semantic segmentation: a model, labelled pictures and class names in, mIoU out."""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any
from typing import Protocol as Interface

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
import numpy as np

from groupvit_jax.data import prompts as text_ops
from groupvit_jax.data.images import read_image
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval import windows
from groupvit_jax.eval.bad_images import PictureFaults
from groupvit_jax.eval.benchmarks import Benchmark, IGNORE_LABEL
from groupvit_jax.eval.labeller import LabelMap, Segmenter
from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.eval.result import Result
from groupvit_jax.eval.window_encoder import EncodedPicture, WindowEncoder
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.metrics import GroupingHealth
from groupvit_jax.running import sharding

_TEXT_ROWS = 16, 256  # texts per batch, at least and at most: a power of two
_TEXT_STEP = 8  # lengths of texts are multiples of this


class LabelledSource(Interface):
  """Random access to labelled pictures."""

  classes: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': uint8 [H, W, 3] or bytes, 'label': uint8 [H, W], 'key': name}."""
    ...


@functools.partial(jax.jit, static_argnames='model')
def _embed_texts(variables: dict, tokens: jax.Array, *, model: ImageTextModel) -> jax.Array:
  return model.apply(variables, tokens, method='encode_text')


def embed_classes(
  model: ImageTextModel, variables: dict, tokenizer: Tokenizer, names: Sequence[str], templates: str
) -> np.ndarray:
  """Embeddings of classes by name.

  Args:
    model: the model.
    variables: of the model.
    tokenizer: of the model.
    names: C class names.
    templates: name of a template set.

  Returns:
    Unit vectors [C, E], float32.
  """
  return embed_prompts(model, variables, tokenizer, text_ops.class_prompts(names, templates))


def embed_prompts(
  model: ImageTextModel, variables: dict, tokenizer: Tokenizer, prompts: Sequence[Sequence[str]]
) -> np.ndarray:
  """Embeddings of classes that are each described by several texts.

  The mean over the texts of their projected features, which only then is normalised.

  Args:
    model: the model.
    variables: of the model.
    tokenizer: of the model.
    prompts: [C][T] texts.

  Returns:
    Unit vectors [C, E], float32.
  """
  texts = [text for row in prompts for text in row]
  tokens = tokenizer.encode(texts, model.text.context_length)
  # Nothing after the end-of-text token matters in a causal tower, and it is most of the work.
  ends = (tokens == tokenizer.eos_id).argmax(axis=1)
  # Rounded up, so that few shapes are ever compiled.
  tokens = tokens[:, : -(-(ends.max() + 1) // _TEXT_STEP) * _TEXT_STEP]
  rows = int(np.clip(1 << (len(tokens) - 1).bit_length(), *_TEXT_ROWS))
  batches = np.pad(tokens, ((0, -len(tokens) % rows), (0, 0)), mode='edge')
  batches = batches.reshape(-1, rows, tokens.shape[1])
  embeds = [_to_host(_embed_texts(variables, batch, model=model)) for batch in batches]
  means = np.concatenate(embeds)[: len(tokens)].reshape(len(prompts), -1, embeds[0].shape[1])
  means = means.mean(axis=1)
  return means / np.linalg.norm(means, axis=-1, keepdims=True)


def _to_host(array: jax.Array) -> np.ndarray:
  """The whole of an array that may be spread over hosts."""
  if array.is_fully_addressable:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def evaluate(
  model: ImageTextModel,
  variables: dict,
  source: LabelledSource,
  text_embeds: np.ndarray,
  benchmark: Benchmark,
  protocol: Protocol,
  *,
  batch_size: int,
  mesh: Mesh | None = None,
  num_threads: int = 2,
  oracle: bool = True,
  thresholds: Sequence[float] = (),
  on_picture: Callable[[EncodedPicture, LabelMap], None] | None = None,
  provenance: Mapping[str, str] | None = None,
) -> Result:
  """Segments labelled pictures and scores the label maps.

  Every host takes its share of the pictures. Calls with the same model, mesh, number of classes,
  batch size and, but for thresholds, protocol compile once.

  Args:
    model: the model.
    variables: of the model, on the devices of the mesh.
    source: labelled pictures.
    text_embeds: [C, E], of `benchmark.prompt_names(protocol.class_names)`.
    benchmark: classes and colours.
    protocol: how pictures are labelled.
    batch_size: windows per batch, of all hosts.
    mesh: the devices; None for the first of this host.
    num_threads: threads that decode and resize ahead of the devices.
    oracle: whether segments are also scored with perfect names, for a second pass over the pixels.
    thresholds: further background thresholds, counted along at little cost.
    on_picture: called with every picture and its label map, about in order. Without it label maps
      stay on the devices.
    provenance: what else to name in the result.

  Returns:
    The result, the same on every host.

  Raises:
    PictureFault: a picture or label map is bad; on every host, whichever has met it.
    ValueError: there are no pictures, names and embeddings differ in number, a batch does not fit
      the mesh, or a background lacks its threshold.
  """
  mesh = sharding.make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
  protocol = benchmark.fix_threshold(protocol)
  _check(source, text_embeds, benchmark, protocol)
  wanted = (protocol.threshold, *thresholds) if benchmark.background else (0.0,)
  segmenter = Segmenter(
    protocol,
    text_embeds,
    float(variables['params']['logit_scale']),
    background=benchmark.background,
    thresholds=wanted,
    mesh=mesh,
  )
  encoder = WindowEncoder(model, protocol, mesh, batch_size)
  prepare = functools.partial(
    prepare_picture, source, benchmark=benchmark, protocol=protocol, patch_size=model.vision.patch_size
  )
  mine, faults = range(jax.process_index(), len(source), jax.process_count()), PictureFaults()
  prepared = windows.prefetch(faults.guard(prepare), mine, num_threads=num_threads)
  pictures = (picture for picture in prepared if picture is not None)
  health: GroupingHealth | None = None
  for item in encoder.encode(variables, pictures):
    if isinstance(item, GroupingHealth):
      health = item if health is None else health.merge(item)
      continue
    labelled = segmenter.label(item, oracle=oracle)
    if on_picture is not None:
      on_picture(item, segmenter.fetch(labelled))
  faults.check()
  predicted, named = segmenter.counts()
  return Result(
    benchmark=benchmark,
    protocol=protocol,
    num_images=len(source),
    counts=predicted[0],
    oracle_counts=named if oracle else None,
    health=health.compute(),
    thresholds=wanted[1:],
    threshold_counts=predicted[1:],
    provenance=provenance or {},
  )


def _check(source: LabelledSource, text_embeds: np.ndarray, benchmark: Benchmark, protocol: Protocol) -> None:
  """Raises ValueError for what would fail, or mislead, only after a while."""
  names = benchmark.prompt_names(protocol.class_names)
  if not len(source):
    raise UserError(f'{benchmark.name} has no pictures; check its path and split')
  if len(text_embeds) != len(names):
    raise UserError(
      f'{benchmark.name} asks for {len(names)} classes but {len(text_embeds)} are embedded; '
      'embed benchmark.prompt_names(protocol.class_names)'
    )
  if tuple(source.classes) != benchmark.classes:
    raise UserError(
      f'the source labels {len(source.classes)} classes ({", ".join(source.classes[:3])}, ...) but '
      f'{benchmark.name} has {benchmark.num_classes} ({", ".join(benchmark.classes[:3])}, ...); '
      'give both the same names in the same order'
    )


def prepare_picture(
  source: LabelledSource, index: int, *, benchmark: Benchmark, protocol: Protocol, patch_size: int
) -> windows.Picture:
  """Reads, checks and cuts one picture.

  Args:
    source: labelled pictures.
    index: which one.
    benchmark: whose classes its labels are.
    protocol: how it is cut.
    patch_size: of the model.

  Returns:
    The picture.

  Raises:
    ValueError: it cannot be decoded, or its label map does not fit it or the benchmark.
  """
  record = source[index]
  key, label = record['key'], record['label']
  beyond = label[(label >= benchmark.num_classes) & (label != IGNORE_LABEL)]
  if beyond.size:
    raise UserError(
      f'the label map of {key!r} holds {beyond[0]}, but {benchmark.name} has labels 0 to '
      f'{benchmark.num_classes - 1} and {IGNORE_LABEL}'
    )
  image = read_image(record['image'], key)
  return windows.cut_picture(image, protocol, patch_size, key=key, label=label)
