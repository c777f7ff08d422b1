"""Zero-shot classification: a model, pictures and class names in, top-1 and top-5 accuracy out.

A class is the mean of its name's embeddings in every template of a set, normalised; a picture's class is the nearest.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple
from typing import Protocol as Interface

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
from PIL import Image

from groupvit_jax.data import prompts
from groupvit_jax.data.images import read_image
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval import semantic_seg, windows
from groupvit_jax.eval.bad_images import PictureFaults
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.pixels import normalize_images
from groupvit_jax.running import sharding

IMAGENET = 'imagenet'
# The published figures' (reference section 5): seven templates; `full` has all 80.
TEMPLATES = 'subset'
PUBLISHED = {'gcc_yfcc': 43.7, 'gcc_redcaps': 51.6}
NUM_IMAGES = 50_000  # that these are about
NO_PROTOCOL = f'{IMAGENET} has neither label maps nor windows; of the parts of a protocol it has templates alone'
FIGURES = ('top1', 'top5')  # what every evaluation measures
_FILE = Path(__file__).with_name('imagenet_zero_shot.json')
_NONE = -1  # label of padding
_PICTURES_PER_DEVICE = 64  # that are classified at a time
_TOP = 5


class ClassifiedSource(Interface):
  """Random access to pictures with a class."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': uint8 [H, W, 3] or bytes, 'label': int, 'key': name}."""
    ...


class Hits(NamedTuple):
  """Counts over pictures that are no padding."""

  top1: jax.Array  # []
  top5: jax.Array  # []
  pictures: jax.Array  # []


@dataclasses.dataclass(frozen=True)
class Result:
  """What an evaluation found, and everything its figures depend on.

  Attributes:
    num_images: pictures counted.
    num_classes: C.
    top1: share whose class is the nearest.
    top5: share whose class is among the five nearest.
    protocol: how pictures and names were prepared.
    provenance: whatever else the figures depend on: checkpoint, step, weights, commit, precision.
  """

  num_images: int
  num_classes: int
  top1: float
  top5: float
  protocol: Mapping[str, Any]
  provenance: Mapping[str, str]

  def scalars(self) -> dict[str, float]:
    """The figures by name, for logs."""
    return dict(zip(FIGURES, (self.top1, self.top5)))

  def settings(self) -> dict[str, Any]:
    """What the figures hold for, in short."""
    return {
      'num_images': self.num_images,
      'num_images_published': NUM_IMAGES,
      'protocol': dict(self.protocol),
      'provenance': dict(self.provenance),
    }

  def to_json(self) -> dict[str, Any]:
    """Figures and what they depend on."""
    return {
      'benchmark': IMAGENET,
      **self.settings(),
      'num_classes': self.num_classes,
      **self.scalars(),
      'templates': list(prompts.template_set(self.protocol['templates'])),
      'published': [{'training_data': data, 'top1': value} for data, value in PUBLISHED.items()],
    }

  def table(self) -> str:
    """The figures, in percent, as text."""
    pairs = ', '.join(f'{key}={value}' for key, value in self.protocol.items())
    pictures = f'{self.num_images:,}' if self.num_images == NUM_IMAGES else f'{self.num_images:,} of {NUM_IMAGES:,}'
    unlike = ['other templates'] * (self.protocol['templates'] != TEMPLATES)
    unlike += [f'here {pictures} pictures'] * (self.num_images != NUM_IMAGES)
    return '\n'.join(
      [
        f'{IMAGENET}, {pictures} pictures, {self.num_classes} classes\n({pairs})',
        '',
        f'top-1  {self.top1:6.1%}',
        f'top-5  {self.top5:6.1%}',
        *(
          '; '.join([f'published (GroupViT-S/16 of {data}): top-1 {value:.1f}', *unlike])
          for data, value in PUBLISHED.items()
        ),
      ]
    )


def class_names() -> tuple[str, ...]:
  """ImageNet's 1000 classes in the order of their WordNet ids, as CLIP calls them."""
  return tuple(json.loads(_FILE.read_text())['classes'])


def crop_picture(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """The middle of a picture resized so that its short side is 8/7 of the crop's: bicubic, as Pillow does it.

  Args:
    image: uint8 [rows, columns, 3].
    size: (H, W) of the crop.

  Returns:
    uint8 [H, W, 3].
  """
  short = _short_side(size)
  rows, columns = (max(short * length // min(image.shape[:2]), short) for length in image.shape[:2])
  resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BICUBIC)
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
    mesh: over which the batch is divided.

  Returns:
    Counts, on every device.
  """
  embeds = model.apply(variables, normalize_images(images), method='encode_image').embeds
  # Neither the picture's norm nor the temperature changes an order.
  _, nearest = jax.lax.top_k(jnp.einsum('be,ce->bc', embeds, text_embeds, precision='highest'), _TOP)
  right = (nearest == labels[:, None]).astype(jnp.int32)
  hits = Hits(right[:, 0].sum(), right.sum(), (labels != _NONE).astype(jnp.int32).sum())
  return jax.lax.with_sharding_constraint(hits, sharding.replicated(mesh))


@dataclasses.dataclass(frozen=True)
class ZeroShotEvaluator:
  """Classifies pictures, as often as asked for. Compiles at the first call only.

  Attributes:
    model: the model.
    tokenizer: of the model.
    mesh: where the variables live.
    source: the pictures.
    names: C class names, at least 5.
    templates: name of a template set.
    batch_size: of all hosts.
    num_threads: threads that decode and resize ahead of the devices.
  """

  model: ImageTextModel
  tokenizer: Tokenizer
  mesh: Mesh
  source: ClassifiedSource
  names: Sequence[str]
  templates: str
  batch_size: int
  num_threads: int

  def __post_init__(self):
    sharding.check_batch_size('eval batch_size', self.batch_size, self.mesh)
    prompts.template_set(self.templates)  # raises ValueError if there is none
    if not len(self.source) or len(self.names) < _TOP:
      raise UserError(f'there are {len(self.source)} pictures of {len(self.names)} classes; it takes 1 of {_TOP}')

  def evaluate(self, variables: dict, *, provenance: Mapping[str, str] | None = None) -> Result:
    """Classifies all pictures; every host takes its share, and has the same result.

    Args:
      variables: {'params': ..., 'batch_stats': ...}, on the mesh.
      provenance: what else to name in the result.

    Raises:
      PictureFault: a picture cannot be decoded, or its class is none; on every host, whichever has met it.
    """
    texts = semantic_seg.embed_classes(self.model, variables, self.tokenizer, self.names, self.templates)
    texts = jax.device_put(texts, sharding.replicated(self.mesh))
    hosts = jax.process_count()
    mine, faults = range(jax.process_index(), len(self.source), hosts), PictureFaults()
    prepared = windows.prefetch(faults.guard(self._prepare), mine, num_threads=self.num_threads)
    pictures = (picture for picture in prepared if picture is not None)
    total, waiting = np.zeros(3, np.int64), None
    for _ in range(-(-len(self.source) // self.batch_size)):
      images, labels = self._batch(pictures)
      hits = count_hits(variables, images, labels, texts, model=self.model, mesh=self.mesh)
      sharding.synchronize(hits, self.mesh)
      if waiting is not None:  # while this batch runs
        total += np.array(jax.device_get(waiting))
      waiting = hits
    total += np.array(jax.device_get(waiting))
    faults.check()
    size = tuple(self.model.vision.image_size)
    protocol = dict(
      name=IMAGENET,
      crop=size,
      short_side=_short_side(size),
      resize='bicubic',
      templates=self.templates,
      class_names='clip',
    )
    return Result(
      len(self.source),
      len(self.names),
      float(total[0] / total[2]),
      float(total[1] / total[2]),
      protocol,
      provenance or {},
    )

  def _prepare(self, index: int) -> tuple[np.ndarray, int]:
    record = self.source[index]
    if not 0 <= record['label'] < len(self.names):
      raise UserError(f'{record["key"]} has the class {record["label"]}; there are 0 to {len(self.names) - 1}')
    return crop_picture(read_image(record['image'], record['key']), self.model.vision.image_size), record['label']

  def _batch(self, pictures: Any) -> tuple[jax.Array, jax.Array]:
    """The next pictures of this host, padded, as its part of a batch."""
    rows = len(sharding.process_local_rows(self.batch_size, self.mesh))
    images, labels = np.zeros((rows, *self.model.vision.image_size, 3), np.uint8), np.full(rows, _NONE, np.int32)
    for row in range(rows):
      found = next(pictures, None)
      if found is None:
        break
      images[row], labels[row] = found
    return tuple(sharding.make_global_array(array, self.mesh) for array in (images, labels))


def build_evaluator(
  model: ImageTextModel, tokenizer: Tokenizer, mesh: Mesh, source: ClassifiedSource, templates: str
) -> ZeroShotEvaluator:
  """What classifies pictures into ImageNet's classes. Raises ValueError if there is no such set of templates."""
  batch_size = _PICTURES_PER_DEVICE * sharding.data_parallel_size(mesh)
  threads = windows.decode_threads()
  return ZeroShotEvaluator(model, tokenizer, mesh, source, class_names(), templates, batch_size, threads)
