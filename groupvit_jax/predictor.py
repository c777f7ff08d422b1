"""Predictor: images and class names in; label maps, groups, scores and overlays out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import functools
import itertools
import os
from typing import Literal, NamedTuple, overload

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np

from groupvit_jax.data.images import AnyImage, is_one_image, read_image
from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval import class_names as names_lib
from groupvit_jax.eval import draw
from groupvit_jax.eval.class_names import ClassName, parse_class_names
from groupvit_jax.eval.evaluator import windows_per_batch
from groupvit_jax.eval.labeller import Labeller
from groupvit_jax.eval.protocols import find_protocol, NATIVE, Protocol
from groupvit_jax.eval.window_encoder import cut_image, CutImage, EncodedWindows, group_maps, WindowEncoder
from groupvit_jax.interop import bundle, hub, onnx, read
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.prediction import Prediction
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import with_fastest_attention
from groupvit_jax.train import restored_run

BACKGROUND = 'background'
_BATCH_SIZES = (1, 4, 16)  # windows on each device: one compilation each, when first needed
_MAX_CLASSES = 255  # that 8-bit label maps hold, the background included
_MIN_CAPACITY = 16  # classes to compile for; then twice as many, and so on
_MAX_EMBEDDINGS = 4096  # of class names that are kept


class EncodedImage(NamedTuple):
  """An image that has been through the encoder, ready for any classes."""

  image: np.ndarray  # uint8 [H, W, 3]
  windows: EncodedWindows
  group_maps: Callable[[], tuple[np.ndarray, ...]]  # per grouping stage uint8 [H, W]; computed once


class Predictor:
  """Segments images of any size into any classes.

      predictor = Predictor.from_pretrained('runs/quickstart')
      prediction = predictor('dog.jpg', ['dog|puppy', 'grass'])

  `encode` and `segment` are its two halves: other classes and thresholds need only the second one. Each is
  compiled once for all images and numbers of classes of about one size: batches of 1, 4 and 16 windows
  (on a CPU fewer of large ones), up to 16, 32, 64, 128 and 256 classes. Embeddings of recent class names
  are kept.
  """

  def __init__(
    self,
    model: ImageTextModel,
    variables: dict[str, object],
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    *,
    protocol: Protocol | str | None = None,
    source: str = 'weights in memory',
  ):
    """Wraps a model that is in memory; `from_pretrained` opens one.

    Args:
      model: the model.
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      tokenizer: of the model.
      mesh: all devices, of one process.
      protocol: how images are labelled, or its name: 'groupvit' for the paper's windows of 448 px;
        None for windows of the size the model was trained on. Its threshold is not used: calls have
        their own.
      source: of the weights, for people.
    """
    if jax.process_count() > 1:
      raise UserError(f'images are segmented by one process and there are {jax.process_count()}; start only one')
    if not isinstance(protocol, Protocol):
      protocol = find_protocol(protocol or NATIVE, model.vision.image_size, model.vision.patch_size)
    self.protocol = protocol
    self.source = source
    self._model, self._variables, self._tokenizer, self._mesh = model, variables, tokenizer, mesh
    self._embeds: dict[str, np.ndarray] = {}

  @classmethod
  def of_run(cls, run: restored_run.RestoredRun, *, protocol: Protocol | str | None = None) -> 'Predictor':
    """The predictor of a run that is open; arguments and errors as for `Predictor`."""
    runtime = f' on {run.provenance["runtime"]}' if 'runtime' in run.provenance else ''
    source = f'{run.workdir}, step {run.step}, {run.weights} weights{runtime}'
    return cls(run.model, run.variables, run.tokenizer, run.mesh, protocol=protocol, source=source)

  @classmethod
  def from_pretrained(
    cls,
    path: epath.PathLike,
    *,
    protocol: Protocol | str | None = None,
    weights: restored_run.Weights = 'best',
    checkpoint: str = restored_run.NEWEST,
    runtime: onnx.Runtime | None = None,
    dtype: Literal['float32', 'bfloat16'] | None = None,
  ) -> 'Predictor':
    """Opens a model; nothing is written.

    Args:
      path: a workdir, a Hugging Face folder, or a folder that `export` wrote in any of its formats; or the id of one
        on the Hub (see `hub.fetch`). One of `--format=stablehlo` runs on one device, one of `--format=onnx` on a CPU.
      protocol: as for `Predictor`.
      weights: which of a workdir's, as for `restored_run.restore`.
      checkpoint: likewise.
      runtime: of an ONNX export: 'onnxruntime' (None), 'openvino', or 'openvino-bfloat16', the fastest where the
        processor has bfloat16.
      dtype: of matmuls; None for the model's own. 'bfloat16' is faster on accelerators and on processors that have it.

    Raises:
      ValueError: there is no model, it cannot be read, or a choice was asked that this kind of folder does not offer.
    """
    name, path = path, hub.fetch(path)
    is_bundle = (path / bundle.FILE).exists()
    if dtype not in (None, 'float32', 'bfloat16') or (dtype and is_bundle):
      has = 'an export has its own, leave it out' if is_bundle else 'use float32 or bfloat16'
      raise UserError(f'dtype={dtype!r}: {has}')
    if runtime or is_bundle or not path.is_dir() or (path / 'checkpoints').is_dir():
      run = restored_run.open_model(path, checkpoint, weights=weights, runtime=runtime)
      model = run.model.with_dtype(jnp.dtype(dtype)) if dtype else run.model
      return cls.of_run(run._replace(model=model), protocol=protocol)
    if weights != 'best' or checkpoint != restored_run.NEWEST:
      raise UserError(f'{path} is no workdir and has one set of weights; leave out weights and checkpoint')
    found, mesh, tokenizer = read.read_weights(path), sharding.make_mesh(), build_tokenizer(path)
    read.check_tokenizer(
      tokenizer, vocab_size=found.spec.vocab_size, eos_id=found.spec.eos_id, remedy=f'put that into {path}'
    )
    variables = jax.device_put(found.variables, sharding.replicated(mesh))
    model = found.spec.build()
    model = with_fastest_attention(model.with_dtype(jnp.dtype(dtype)) if dtype else model, mesh)
    return cls(model, variables, tokenizer, mesh, protocol=protocol, source=str(name))

  def __repr__(self) -> str:
    height, width = self._model.vision.image_size
    count = sum(leaf.size for leaf in jax.tree.leaves(self._variables['params']) if np.ndim(leaf))
    model = f'GroupViT of {height} x {width} px' + (f' and {count:,} parameters' if count else '')
    return f'Predictor({model}; {self.source}; protocol {self.protocol.name})'

  @overload
  def __call__(self, images: AnyImage, class_names: Sequence[str], *, threshold: float | None = None) -> Prediction: ...

  @overload
  def __call__(
    self, images: Iterable[AnyImage], class_names: Sequence[str], *, threshold: float | None = None
  ) -> list[Prediction]: ...

  def __call__(
    self, images: AnyImage | Iterable[AnyImage], class_names: Sequence[str], *, threshold: float | None = None
  ) -> Prediction | list[Prediction]:
    """Segments one image or a list of them.

    Args:
      images: each a path, an https:// address, a Pillow image, a NumPy or JAX array (uint8 [H, W, 3]; grey, RGBA and 16
        bits as well), the bytes of a file, or a file opened with mode rb.
      class_names: the classes; 'dog|puppy' is one class with two names.
      threshold: score from 0 to 1 below which a pixel is background; None gives every pixel a class.

    Returns:
      A prediction, or a list in the order of the images.

    Raises:
      ValueError: an image cannot be read, there are no classes, one is named twice, or the
        threshold is out of range.
    """
    segment = self._segmenter(class_names, threshold)
    encoded = self.encode(images)
    return segment(encoded) if isinstance(encoded, EncodedImage) else [segment(each) for each in encoded]

  @overload
  def encode(self, images: AnyImage) -> EncodedImage: ...

  @overload
  def encode(self, images: Iterable[AnyImage]) -> list[EncodedImage]: ...

  def encode(self, images: AnyImage | Iterable[AnyImage]) -> EncodedImage | list[EncodedImage]:
    """Encodes an image or several, as for `__call__`, once for any classes and thresholds that `segment` is given."""
    if is_one_image(images) or not isinstance(images, Iterable):
      return self.encode([images])[0]
    images = list(images)
    keys = [_name(image, index) for index, image in enumerate(images)]
    pixels = [read_image(image, key) for image, key in zip(images, keys)]
    return sorted(self._encode(zip(keys, pixels)), key=lambda encoded: encoded.windows.image.index)

  def segment(self, encoded: EncodedImage, class_names: Sequence[str], *, threshold: float | None = None) -> Prediction:
    """Segments an encoded image; arguments and errors as for `__call__`."""
    return self._segmenter(class_names, threshold)(encoded)

  def stream(
    self, images: Iterable[tuple[str, np.ndarray]], class_names: Sequence[str], *, threshold: float | None = None
  ) -> Iterator[Prediction]:
    """Segments any number of images, holding only a few of them.

    Args:
      images: (key, uint8 [H, W, 3]) pairs.
      class_names: as for `__call__`.
      threshold: as for `__call__`.

    Returns:
      An iterator over a prediction per image, in about the order of the images. It raises as `__call__` does: of class
      names and threshold at once, of an image when its turn comes.
    """
    return map(self._segmenter(class_names, threshold), self._encode(images))

  def embed_classes(self, classes: Sequence[ClassName]) -> np.ndarray:
    """Unit embeddings [C, E] of classes: the mean of their synonyms', each the mean over templates."""
    wanted = dict.fromkeys(name for each in classes for name in each.synonyms)
    found = {name: self._embeds.pop(name) for name in wanted if name in self._embeds}
    new = [name for name in wanted if name not in found]
    if new:
      templates = self.protocol.templates
      embeds = names_lib.embed_classes(self._model, self._variables, self._tokenizer, new, templates)
      found.update(zip(new, embeds))
    self._embeds.update(found)  # the least recently used come first
    for name in list(self._embeds)[:-_MAX_EMBEDDINGS]:
      del self._embeds[name]
    return names_lib.pool_synonyms(found, [each.synonyms for each in classes])

  def _segmenter(self, class_names: Sequence[str], threshold: float | None) -> Callable[[EncodedImage], Prediction]:
    """A function that segments encoded images into some classes."""
    background = threshold is not None
    classes = parse_class_names(class_names, reserved=(BACKGROUND,) * background)
    if len(classes) > _MAX_CLASSES - background:
      raise UserError(f'there are {len(classes)} classes; at most {_MAX_CLASSES - background} fit 8-bit labels')
    labeller = Labeller(
      dataclasses.replace(self.protocol, threshold=threshold),
      self.embed_classes(classes),
      float(self._variables['params']['logit_scale']),
      self._mesh,
      thresholds=(threshold,) if background else (),
      capacity=max(_MIN_CAPACITY, 1 << (len(classes) - 1).bit_length()),
    )
    names = tuple(each.name for each in classes)
    return functools.partial(_segment, labeller, names, background=background)

  def _encode(self, images: Iterable[tuple[str, np.ndarray]]) -> Iterator[EncodedImage]:
    """Encodes (key, image) pairs, in about their order."""
    originals: dict[int, np.ndarray] = {}

    def cut() -> Iterator[CutImage]:
      for index, (key, image) in enumerate(images):
        originals[index] = image
        yield cut_image(image, self.protocol, self._model.vision.patch_size, key=key, index=index)

    encoder, cut_images = self._fit_encoder(cut())
    for item in encoder.encode(self._variables, cut_images):
      if isinstance(item, EncodedWindows):
        image = originals.pop(item.image.index)
        yield EncodedImage(image, item, functools.cache(functools.partial(self._groups, image)))

  def _groups(self, image: np.ndarray) -> tuple[np.ndarray, ...]:
    return group_maps(self._model, self._variables, [image], self.protocol.window, self._mesh)[0]

  def _fit_encoder(self, images: Iterator[CutImage]) -> tuple[WindowEncoder, Iterator[CutImage]]:
    """An encoder with batches no larger than the work, and the images, of which it has looked at the first."""
    ways, ahead, total = sharding.data_parallel_size(self._mesh), [], 0
    most = windows_per_batch(self._mesh, self.protocol.window)
    sizes = [size for size in _BATCH_SIZES if size * ways <= most]
    for image in images:
      ahead.append(image)
      total += len(image.windows)
      if total > sizes[-1] * ways:
        break
    rows = next((size for size in sizes if size * ways >= total), sizes[-1])
    if rows > total and self._mesh.size == 1 and self._mesh.devices.flat[0].platform == 'cpu':
      rows = max(
        (size for size in sizes if size <= total), default=sizes[0]
      )  # a core takes as long over padding as over a window
    encoder = WindowEncoder(self._model, self.protocol, self._mesh, rows * ways, (self.protocol.refinement,))
    return encoder, itertools.chain(ahead, images)


def _segment(labeller: Labeller, names: tuple[str, ...], encoded: EncodedImage, *, background: bool) -> Prediction:
  """The prediction of an encoded image; the background is black and comes first."""
  label_map = labeller.label(encoded.windows)
  return Prediction(
    key=encoded.windows.image.key,
    image=encoded.image,
    classes=(BACKGROUND,) * background + names,
    background=background,
    palette=((0, 0, 0),) * background + draw.class_palette(names),
    labels=label_map.labels,
    pixel_scores=label_map.scores,
    group_maps=encoded.group_maps,
    windows=encoded.windows,
    class_scores=label_map.class_scores,
  )


def _name(image: AnyImage, index: int) -> str:
  """The name of an image in messages."""
  return str(image) if isinstance(image, (str, os.PathLike)) else f'number {index + 1}'
