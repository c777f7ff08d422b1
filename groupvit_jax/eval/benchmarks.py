"""Benchmarks: class names, colours, label encodings, thresholds and published results."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np

from groupvit_jax.errors import UserError
from groupvit_jax.eval.draw import class_palette
from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.model.metrics import ignore_label

_FILE = Path(__file__).with_name('segmentation_benchmarks.json')
_PUBLISHED = Path(__file__).with_name('published.json')


@dataclasses.dataclass(frozen=True)
class Published:
  """A row of published results.

  Attributes:
    model: its name.
    source: the paper.
    training_data: 'gcc_yfcc' or 'gcc_redcaps' of GroupViT; '' where it is not recorded here.
    frozen: whether it builds on a frozen foundation model.
    protocol: name of a protocol, or 'unknown'.
    refine: 'none', 'pamr', 'densecrf' or 'unknown'.
    scores: benchmark -> mIoU, of ImageNet top-1 accuracy, in percent; those that are recorded here.
  """

  model: str
  source: str
  training_data: str
  frozen: bool
  protocol: str
  refine: str
  scores: Mapping[str, float]

  @property
  def title(self) -> str:
    """Model, training data, protocol and refinement as a phrase."""
    data = f' of {self.training_data}' if self.training_data else ''
    refined = '' if self.refine == 'none' else f', refinement {self.refine}'
    return f'{self.model}{data}, protocol {self.protocol}{refined}'


@functools.cache
def load_published() -> tuple[Published, ...]:
  """The rows of published.json, GroupViT's first."""
  return tuple(Published(**row) for row in json.loads(_PUBLISHED.read_text()))


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A set of classes, and how the files and published results of a data set refer to them.

  Attributes:
    name: short name.
    classes: C names in label order; the background, where there is one, is the first.
    palette: C colours, RGB.
    background: whether the first class is whatever the others are not.
    own_names: a line `name|synonym` for each class, where it has synonyms; see `class_names.find_names`.
    reduce_zero_label: whether label 0 of the files is ignored and the others shift down by one.
    raw_label_ids: the files' label of each class but the background; None for the label itself.
    split: which images the published results are about.
    num_images: how many these are; 0 where nothing is published.
    thresholds: protocol -> its background threshold here.
  """

  name: str
  classes: tuple[str, ...]
  palette: tuple[tuple[int, int, int], ...]
  background: bool = False
  own_names: tuple[str, ...] = ()
  reduce_zero_label: bool = False
  raw_label_ids: tuple[int, ...] | None = None
  split: str = ''
  num_images: int = 0
  thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)

  @property
  def num_classes(self) -> int:
    """C, background included."""
    return len(self.classes)

  @property
  def published(self) -> tuple[Published, ...]:
    """Published results to compare with."""
    return tuple(row for row in load_published() if self.name in row.scores)

  def fix_threshold(self, protocol: Protocol) -> Protocol:
    """The protocol with this benchmark's threshold: its own, the given one, or none to need.

    A threshold counts as changed where it is neither the benchmark's own nor without meaning.

    Raises:
      ValueError: there is a background, and neither says from which score on it is not.
    """
    own = self.thresholds.get(protocol.name) if self.background else None
    if self.background and protocol.threshold not in (None, own):
      return protocol
    if self.background and own is None:
      raise UserError(
        f'{self.name} has a background class but no threshold under protocol {protocol.name!r}; set protocol.threshold'
      )
    changed = tuple(key for key in protocol.changed if key != 'threshold')
    return dataclasses.replace(protocol, threshold=own, changed=changed)

  def train_labels(self, raw: np.ndarray) -> np.ndarray:
    """Labels 0..C-1, and `ignore_label`, from those of the data set's files; both [H, W], uint8 or uint16."""
    return _lookup_table(self.raw_label_ids, self.background, self.reduce_zero_label, raw.dtype)[raw]


@functools.cache
def _lookup_table(
  raw_label_ids: tuple[int, ...] | None, background: bool, reduce_zero_label: bool, dtype: np.dtype
) -> np.ndarray:
  """Label in the files -> label, for each label of a type."""
  ignored = ignore_label(dtype)
  if raw_label_ids is not None:
    # With a background everything else is background, the files' ignored pixels included.
    table = np.full(ignored + 1, 0 if background else ignored, dtype)
    table[list(raw_label_ids)] = np.arange(len(raw_label_ids)) + background
    return table
  table = np.arange(ignored + 1, dtype=dtype)
  if reduce_zero_label:
    table[1:ignored] -= 1
    table[0] = ignored
  return table


@functools.cache
def load_benchmarks() -> dict[str, Benchmark]:
  """The public benchmarks by name."""
  return {name: _parse(name, fields) for name, fields in json.loads(_FILE.read_text()).items()}


def find_benchmark(name: str) -> Benchmark:
  """The benchmark of that name.

  Raises:
    ValueError: there is none.
  """
  benchmarks = load_benchmarks()
  if name not in benchmarks:
    raise UserError(f'there is no benchmark {name!r}; choose one of {", ".join(benchmarks)}')
  return benchmarks[name]


def _parse(name: str, fields: Mapping) -> Benchmark:
  tuples = {key: tuple(fields[key]) for key in ('classes', 'raw_label_ids') if key in fields}
  palette = fields['palette'] if 'palette' in fields else class_palette(fields['classes'])
  return Benchmark(name=name, **(dict(fields) | tuples | dict(palette=tuple(map(tuple, palette)))))


def make_benchmark(name: str, classes: Sequence[str], *, background: bool = False) -> Benchmark:
  """A benchmark of one's own classes, without published results; the background is black.

  Args:
    name: of the benchmark.
    classes: C names in label order; the background first, where there is one.
    background: whether there is one.

  Raises:
    ValueError: no class to look for, one twice, an empty name, or more than labels of 16 bits hold.
  """
  classes = tuple(classes)
  if len(classes) <= background:
    raise UserError(f'{name} has no classes to look for; name at least one')
  if len(classes) > (most := ignore_label(np.uint16)):
    raise UserError(f'{name} has {len(classes)} classes; at most {most} fit 16-bit labels')
  for i, label in enumerate(classes):
    if not label.strip():
      raise UserError(f'class {i} of {name} has an empty name; name it or remove it')
    if label in classes[:i]:
      raise UserError(f'{name} names the class {label!r} twice; remove one')
  palette = ((0, 0, 0),) * background + class_palette(classes[background:])
  return Benchmark(name, classes, palette, background)
