"""Evaluation protocols: resizing, windows, templates, thresholds and post-processing, as named presets."""

import ast
from collections.abc import Mapping
import dataclasses
import math
from typing import Any, get_args, Literal, NamedTuple

from groupvit_jax.data import prompts
from groupvit_jax.errors import UserError

Resize = Literal['short_side', 'square']
Refinement = Literal['pamr']
ThresholdMode = Literal['window', 'global']
# Protocols that are made for a model, by `native_protocol`, `shifted_protocol` and `refined_protocol`.
NATIVE, SHIFTED, SHIFTED_PAMR = 'native', 'shifted', 'shifted+pamr'


class Pamr(NamedTuple):
  """Options of `pamr.refine`."""

  iterations: int
  dilations: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Protocol:
  """A way to label an image. A score holds only for its protocol, so results name all of it.

  Attributes:
    name: which of `PROTOCOLS` it is, or was made from.
    resize: 'short_side' keeps the aspect ratio, 'square' gives both sides the length of `short_side`.
    short_side: pixels that an image's short side is resized to.
    max_long_side: pixels that its long side may have at most; where it would have more, the image
      is made smaller than `short_side` asks.
    antialias: whether images are averaged where they shrink; OpenCV's bilinear skips pixels.
    window: side of the square windows, in pixels; a smaller image is one smaller window.
    stride: pixels from one window to the next; the last one is moved back inside.
    class_filter: classes kept per window, those that fit its pooled feature best; None for all.
    double_softmax: whether the filtered softmax is multiplied by the unfiltered one.
    final_softmax: whether a pixel's class is the argmax of the softmax of its scores, in float32: scores closer than
      about 1e-7 become equal, and the first class wins. With a background class it changes nothing and is left out.
    threshold: score below which a pixel is background; None for the benchmark's own under this
      protocol. Without a background class it has no meaning.
    threshold_mode: 'window' lowers it to the best score of any segment of the window where that is
      smaller, so the best segment is never background (paper); 'global' is the same everywhere.
    refine: 'pamr' moves the segments of each window to the edges of the image, by `pamr.refine`; None leaves them.
    refine_iterations: how often.
    refine_dilations: distances of the neighbours that are averaged, in pixels of the window.
    templates: name of the set of sentences that class names are put into.
    class_names: which names the classes are looked for by, see `class_names.find_names`.
    changed: parameters that are not those of the protocol of this name.
  """

  name: str
  resize: Resize
  short_side: int
  max_long_side: int
  antialias: bool
  window: int
  stride: int
  class_filter: int | None
  double_softmax: bool
  final_softmax: bool
  threshold: float | None
  threshold_mode: ThresholdMode
  refine: Refinement | None
  refine_iterations: int
  refine_dilations: tuple[int, ...]
  templates: str
  class_names: str
  changed: tuple[str, ...] = dataclasses.field(default=(), compare=False)

  def __post_init__(self):
    for field in ('short_side', 'max_long_side', 'window', 'stride', 'refine_iterations'):
      _check(field, getattr(self, field), 1, None, int)
    if not isinstance(self.refine_dilations, (list, tuple)) or not self.refine_dilations:
      raise UserError(f'protocol.refine_dilations={self.refine_dilations!r}: use whole numbers, as in 1,2,4')
    for dilation in self.refine_dilations:
      _check('refine_dilations', dilation, 1, None, int)
    object.__setattr__(self, 'refine_dilations', tuple(self.refine_dilations))
    if self.class_filter is not None:
      _check('class_filter', self.class_filter, 1, None, int)
    if self.threshold is not None:
      _check('threshold', self.threshold, 0, 1, (int, float))
    for field in ('antialias', 'double_softmax', 'final_softmax'):
      if not isinstance(getattr(self, field), bool):
        raise UserError(f'protocol.{field}={getattr(self, field)!r}: use True or False')
    if self.max_long_side < self.short_side:
      raise UserError(
        f'protocol.max_long_side={self.max_long_side} is less than short_side={self.short_side}; raise it'
      )
    if self.short_side < self.window:
      raise UserError(
        f'protocol.short_side={self.short_side} is less than window={self.window}: every image would be a window of '
        f'its own size; set protocol.window={self.short_side} as well, and a stride of at most that'
      )
    if self.stride > self.window:
      raise UserError(
        f'protocol.stride={self.stride} leaves gaps between windows of {self.window} px; use {self.window} or less'
      )
    _check_choice('refine', self.refine, (None, *get_args(Refinement)))
    _check_choice('resize', self.resize, get_args(Resize))
    _check_choice('threshold_mode', self.threshold_mode, get_args(ThresholdMode))
    if not isinstance(self.class_names, str) or not self.class_names:
      raise UserError(f'protocol.class_names={self.class_names!r}: name a set of class names, or a file')
    prompts.template_set(str(self.templates))  # raises ValueError if there is none

  @property
  def title(self) -> str:
    """The name and the changed parameters: 'groupvit with stride=112'."""
    changes = ', '.join(f'{key}={getattr(self, key)}' for key in self.changed)
    return f'{self.name} with {changes}' if changes else self.name

  @property
  def refinement(self) -> Pamr | None:
    """The refinement of segments."""
    return Pamr(self.refine_iterations, self.refine_dilations) if self.refine else None

  @property
  def cut(self) -> tuple[object, ...]:
    """What the windows of an image depend on: protocols with equal ones share their encodings."""
    return self.resize, self.short_side, self.max_long_side, self.antialias, self.window, self.stride

  @property
  def max_windows(self) -> int:
    """The most windows that any image is cut into."""
    long_side = self.short_side if self.resize == 'square' else self.max_long_side
    return self.windows_along(self.short_side) * self.windows_along(long_side)

  def windows_along(self, length: int) -> int:
    """How many windows cover `length` pixels along one axis."""
    return -(-max(length - self.window, 0) // self.stride) + 1

  def to_json(self) -> dict[str, Any]:
    """All parameters, and under 'changed' those that differ from the preset."""
    return dataclasses.asdict(self) | {'changed': list(self.changed)}


# What `override` can change.
PARAMETERS = tuple(field.name for field in dataclasses.fields(Protocol) if field.name not in ('name', 'changed'))


def override(protocol: Protocol, changes: Mapping[str, Any]) -> Protocol:
  """The protocol with some parameters changed; it keeps its name, and `changed` lists them.

  Raises:
    ValueError: there is no such parameter, or it cannot have that value.
  """
  for key in changes:
    if key not in PARAMETERS:
      raise UserError(f'a protocol has no {key!r}; it has {", ".join(PARAMETERS)}')
  differs = lambda key: key in changes and changes[key] != getattr(protocol, key)
  changed = tuple(key for key in PARAMETERS if key in protocol.changed or differs(key))
  return dataclasses.replace(protocol, **changes, changed=changed)


def native_protocol(image_size: tuple[int, int]) -> Protocol:
  """The paper's protocol for a model trained on images of (H, W): windows of that size, and no threshold."""
  side = min(image_size)
  return dataclasses.replace(
    GROUPVIT,
    name=NATIVE,
    short_side=side,
    max_long_side=4 * side,
    antialias=True,
    final_softmax=False,
    window=side,
    stride=max(side // 2, 1),
    class_names='benchmark',
  )


def shifted_protocol(image_size: tuple[int, int], patch_size: int) -> Protocol:
  """The native protocol for a square image in four windows, half a patch apart down and across.

  A mask of one window has steps of a whole patch. The mean of four that are shifted by half a patch has steps of half.
  """
  native, half = native_protocol(image_size), max(patch_size // 2, 1)
  side = native.window + half
  return dataclasses.replace(native, name=SHIFTED, resize='square', short_side=side, stride=half)


def refined_protocol(image_size: tuple[int, int], patch_size: int) -> Protocol:
  """The shifted protocol with PAMR of an eighth of the usual cost, which suffices at 64 px."""
  shifted = shifted_protocol(image_size, patch_size)
  return dataclasses.replace(shifted, name=SHIFTED_PAMR, refine='pamr', refine_iterations=2, refine_dilations=(2, 4))


def find_protocol(name: str, image_size: tuple[int, int], patch_size: int) -> Protocol:
  """The protocol of that name, one of `PROTOCOLS` or made for a model trained on images of (H, W).

  Raises:
    ValueError: there is none.
  """
  own = {
    NATIVE: native_protocol(image_size),
    SHIFTED: shifted_protocol(image_size, patch_size),
    SHIFTED_PAMR: refined_protocol(image_size, patch_size),
  }
  protocols = own | PROTOCOLS
  if name not in protocols:
    raise UserError(f'there is no protocol {name!r}; choose one of {", ".join(protocols)}')
  return protocols[name]


def parse_protocol(name: str, image_size: tuple[int, int], patch_size: int, changes: Mapping[str, str]) -> Protocol:
  """`find_protocol` with parameters changed as people write them: numbers, True, False, None (in any case), or text.

  Raises:
    ValueError: there is no such protocol or parameter, or it cannot have that value.
  """
  return override(find_protocol(name, image_size, patch_size), {key: _parse(text) for key, text in changes.items()})


def _parse(text: str) -> object:
  try:
    return ast.literal_eval(text.title() if text.isalpha() else text)
  except (ValueError, SyntaxError):
    return text


def _check(field: str, value: Any, low: float, high: float | None, kind: type | tuple[type, ...]) -> None:
  valid = isinstance(value, kind) and not isinstance(value, bool)
  if not valid or not low <= value <= (math.inf if high is None else high):  # nan is in no range
    noun = 'a whole number' if kind is int else 'a number'
    bounds = f'from {low} up' if high is None else f'from {low} to {high}'
    raise UserError(f'protocol.{field}={value!r}: use {noun} {bounds}')


def _check_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise UserError(f'protocol.{field}={value!r}: use {" or ".join(map(repr, choices))}')


# The paper's. The thresholds belong to the benchmarks.
GROUPVIT = Protocol(
  name='groupvit',
  resize='short_side',
  short_side=448,
  max_long_side=2048,
  antialias=False,
  window=448,
  stride=224,
  class_filter=5,
  double_softmax=True,
  final_softmax=True,
  threshold=None,
  threshold_mode='window',
  refine=None,
  refine_iterations=10,
  refine_dilations=(1, 2, 4, 8, 12, 24),
  templates='simple',
  class_names='groupvit',
)
# The unified one of later papers: the same windows, the benchmark's names, one threshold for all.
TCL = dataclasses.replace(GROUPVIT, name='tcl', threshold=0.5, class_names='benchmark')
TCL_PAMR = dataclasses.replace(TCL, name='tcl+pamr', refine='pamr')
# Without post-processing: softmax over all classes, one threshold.
PLAIN = dataclasses.replace(
  TCL, name='plain', class_filter=None, double_softmax=False, final_softmax=False, threshold_mode='global'
)
# Windows of the training size in images of 1.5 times that: less context, a sixth of the work.
TCL_336 = dataclasses.replace(TCL, name='tcl-336', short_side=336, max_long_side=1536, window=224, stride=112)
# One window, which shows the whole image without its aspect ratio.
WHOLE = dataclasses.replace(TCL, name='tcl-whole', resize='square')
PROTOCOLS = {protocol.name: protocol for protocol in (GROUPVIT, TCL, TCL_PAMR, TCL_336, WHOLE, PLAIN)}
