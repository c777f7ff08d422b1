"""Zero-shot classification: a model, images and class names in, top-1 and top-5 accuracy out.

A class is the mean of its name's embeddings in every template of a set, normalised; an image's class is the nearest.
Shape letters: B images, H W pixels, C classes, E joint embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from PIL import Image

from groupvit_jax.data import prompts
from groupvit_jax.data.images import read_image
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval.benchmarks import load_published, Published
from groupvit_jax.eval.class_names import embed_classes
from groupvit_jax.eval.labelled import BadImages, decode_threads, IMAGENET, LabelledSource, prefetch
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.running import sharding

# Those of the published accuracies (reference section 5, published.json): seven templates; `full` has all 80.
TEMPLATES = 'subset'
NUM_IMAGES = 50_000  # that these are about
NO_PROTOCOL = f'{IMAGENET} has neither label maps nor windows; of the parts of a protocol it has templates alone'
METRICS = ('top1', 'top5')  # of every evaluation
_FILE = Path(__file__).with_name('imagenet_classes.json')
_PADDING = -1  # as a label
_IMAGES_PER_DEVICE = 64  # in a batch
_TOP = 5


class Hits(NamedTuple):
  """Counts over the images of a batch that are no padding."""

  top1: jax.Array  # []
  top5: jax.Array  # []
  images: jax.Array  # []


@dataclasses.dataclass(frozen=True)
class Result:
  """Accuracies, and everything that they depend on.

  Attributes:
    num_images: images counted.
    num_classes: C.
    top1: share whose class is the nearest.
    top5: share whose class is among the five nearest.
    protocol: how images and names were prepared.
    provenance: whatever else they depend on: checkpoint, step, weights, commit, precision.
  """

  num_images: int
  num_classes: int
  top1: float
  top5: float
  protocol: Mapping[str, Any]
  provenance: Mapping[str, str]

  def scalars(self) -> dict[str, float]:
    """The metrics by name, for logs."""
    return dict(zip(METRICS, (self.top1, self.top5)))

  def settings(self) -> dict[str, Any]:
    """What the metrics hold for, in short."""
    return {
      'num_images': self.num_images,
      'num_images_published': NUM_IMAGES,
      'protocol': dict(self.protocol),
      'provenance': dict(self.provenance),
    }

  def to_json(self) -> dict[str, Any]:
    """The metrics, and what they depend on."""
    return {
      'benchmark': IMAGENET,
      **self.settings(),
      'num_classes': self.num_classes,
      **self.scalars(),
      'templates': list(prompts.template_set(self.protocol['templates'])),
      'published': [{'training_data': row.training_data, 'top1': row.scores[IMAGENET]} for row in _published()],
    }

  def table(self) -> str:
    """The metrics in percent, and the published ones."""
    pairs = ', '.join(f'{key}={value}' for key, value in self.protocol.items())
    images = f'{self.num_images:,}' if self.num_images == NUM_IMAGES else f'{self.num_images:,} of {NUM_IMAGES:,}'
    differences = ['other templates'] * (self.protocol['templates'] != TEMPLATES)
    differences += [f'here {images} images'] * (self.num_images != NUM_IMAGES)
    name = lambda row: f'{row.model} of {row.training_data}'
    published = [f'published ({name(row)}): top-1 {row.scores[IMAGENET]:.1f}' for row in _published()]
    return '\n'.join(
      [
        f'{IMAGENET}, {images} images, {self.num_classes} classes\n({pairs})',
        '',
        f'top-1  {self.top1:6.1%}',
        f'top-5  {self.top5:6.1%}',
        *('; '.join([line, *differences]) for line in published),
      ]
    )


def _published() -> list[Published]:
  return [row for row in load_published() if IMAGENET in row.scores]


def class_names() -> tuple[str, ...]:
  """ImageNet's 1000 classes in the order of their WordNet ids, as CLIP calls them."""
  return tuple(json.loads(_FILE.read_text()))


def crop_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """The middle of an image whose short side is resized to 8/7 of the crop's: bilinear, as Pillow does it.

  Args:
    image: uint8 [rows, columns, 3].
    size: (H, W) of the crop.

  Returns:
    uint8 [H, W, 3].
  """
  short = _short_side(size)
  rows, columns = (max(short * length // min(image.shape[:2]), short) for length in image.shape[:2])
  resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
  top, left = (round((length - side) / 2) for length, side in zip((rows, columns), size))  # as torchvision rounds
  return np.asarray(resized)[top : top + size[0], left : left + size[1]]


def _short_side(size: tuple[int, int]) -> int:
  return round(8 / 7 * max(size))


@functools.partial(jax.jit, static_argnames=('model', 'mesh'))
def count_hits(
  variables: dict, images: jax.Array, labels: jax.Array, text_embeds: jax.Array, *, model: ImageTextModel, mesh: Mesh
) -> Hits:
  """Counts right answers in a batch.

  Args:
    variables: of the model.
    images: uint8 [B, H, W, 3].
    labels: int32 [B], -1 for padding.
    text_embeds: [C, E], unit vectors, C at least 5.
    model: the model.
    mesh: over which the batch is sharded.
  """
  embeds = model.apply(variables, images, method='encode_pixels').image_embeds
  # Neither the image's norm nor the temperature changes an order.
  _, nearest = jax.lax.top_k(jnp.einsum('be,ce->bc', embeds, text_embeds, precision='highest'), _TOP)
  right = (nearest == labels[:, None]).astype(jnp.int32)
  hits = Hits(right[:, 0].sum(), right.sum(), (labels != _PADDING).astype(jnp.int32).sum())
  return jax.lax.with_sharding_constraint(hits, sharding.replicated(mesh))


@dataclasses.dataclass(frozen=True)
class ZeroShotEvaluator:
  """Classifies images, as often as asked for. Compiles at the first call only.

  Attributes:
    model: the model.
    tokenizer: of the model.
    mesh: where the variables live.
    source: the images.
    names: C class names, at least 5.
    templates: name of a template set.
    batch_size: of all processes.
    num_threads: threads that decode and resize ahead of the devices.
  """

  model: ImageTextModel
  tokenizer: Tokenizer
  mesh: Mesh
  source: LabelledSource
  names: Sequence[str]
  templates: str
  batch_size: int
  num_threads: int

  def __post_init__(self):
    sharding.check_batch_size('eval batch_size', self.batch_size, self.mesh)
    prompts.template_set(self.templates)  # raises ValueError if there is none
    if not len(self.source) or len(self.names) < _TOP:
      raise UserError(f'there are {len(self.source)} images of {len(self.names)} classes; it takes 1 of {_TOP}')

  def evaluate(self, variables: dict, *, provenance: Mapping[str, str] | None = None) -> Result:
    """Classifies all images; every process takes its share, and has the same result.

    Raises:
      BadImage: an image cannot be decoded, or its class is none; on every process, whichever has met it.
    """
    texts = embed_classes(self.model, variables, self.tokenizer, self.names, self.templates)
    texts = jax.device_put(texts, sharding.replicated(self.mesh))
    mine, bad_images = range(jax.process_index(), len(self.source), jax.process_count()), BadImages()
    read = prefetch(bad_images.guard(self._read), mine, num_threads=self.num_threads)
    images = (image for image in read if image is not None)
    total, running = np.zeros(3, np.int64), None
    for _ in range(-(-len(self.source) // self.batch_size)):
      hits = count_hits(variables, *self._batch(images), texts, model=self.model, mesh=self.mesh)
      sharding.synchronize(hits, self.mesh)
      if running is not None:  # while this batch runs
        total += np.array(jax.device_get(running))
      running = hits
    total += np.array(jax.device_get(running))
    bad_images.check()
    size = tuple(self.model.vision.image_size)
    protocol = dict(
      name=IMAGENET,
      crop=size,
      short_side=_short_side(size),
      resize='bilinear',
      templates=self.templates,
      class_names='clip',
    )
    top1, top5 = (float(hits / total[2]) for hits in total[:2])
    return Result(len(self.source), len(self.names), top1, top5, protocol, provenance or {})

  def _read(self, index: int) -> tuple[np.ndarray, int]:
    record = self.source[index]
    if not 0 <= record['label'] < len(self.names):
      raise UserError(f'{record["key"]} has the class {record["label"]}; there are 0 to {len(self.names) - 1}')
    return crop_image(read_image(record['image'], record['key']), self.model.vision.image_size), record['label']

  def _batch(self, classified: Iterator[tuple[np.ndarray, int]]) -> tuple[jax.Array, ...]:
    """The next images and labels of this process, padded, as its part of a batch."""
    rows = len(sharding.process_local_rows(self.batch_size, self.mesh))
    images, labels = np.zeros((rows, *self.model.vision.image_size, 3), np.uint8), np.full(rows, _PADDING, np.int32)
    for row, (image, label) in zip(range(rows), classified):
      images[row], labels[row] = image, label
    return tuple(sharding.make_global_array(array, self.mesh) for array in (images, labels))


def build_evaluator(
  model: ImageTextModel, tokenizer: Tokenizer, mesh: Mesh, source: LabelledSource, templates: str
) -> ZeroShotEvaluator:
  """Classifies images into ImageNet's classes. Raises ValueError if there is no such set of templates."""
  batch_size = _IMAGES_PER_DEVICE * sharding.data_parallel_size(mesh)
  return ZeroShotEvaluator(
    model, tokenizer, mesh, source, class_names(), templates, batch_size, num_threads=decode_threads()
  )
