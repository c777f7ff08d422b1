"""Embedded scenes: a random-access source of captioned images of things on backgrounds, with label maps."""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import operator
import threading
from typing import Any

import numpy as np

from groupvit_jax.data.scenes import captions, composition, glyphs
from groupvit_jax.data.scenes import textures as backgrounds
from groupvit_jax.data.scenes.composition import pick
from groupvit_jax.errors import UserError

ALL_THINGS = tuple(glyphs.offered_glyphs())
ALL_STUFF = tuple(backgrounds.STUFF)
SPLITS = ('train', 'validation', 'test')

# Domains of randomness: one word of the generator's counter, so that no two streams overlap.
_COMPOSITION, _POSE, _TEXTURE, _NOISE = range(4)
_TEXTURE_SIDE = 1.5  # in scene sides: room to cut a different window for every scene
_NOISE_LEVELS = 4.0  # standard deviation of the pixel noise, of 255
_TRIES = 10  # positions tried for a thing before it is left out
_SCENE_DRAWS, _THING_DRAWS = 22, 8  # random numbers used, besides two for each try
_BANK_LOCK = threading.Lock()  # fonts are not safe to share between reader threads


def _generator(scenes: 'Scenes', domain: int, index: int) -> np.random.Generator:
  """The random numbers of one purpose and index, of this seed and split alone."""
  key = np.array((scenes.seed, SPLITS.index(scenes.split)), np.uint64)
  counter = np.array((0, index, domain, 0), np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=counter))


class _Bank:
  """Sprites and textures of one source, drawn when first needed and kept for the process."""

  def __init__(self, scenes: 'Scenes'):
    self._scenes = scenes
    offered = glyphs.offered_glyphs()
    # Twice the largest size, so that turning and scaling blur nothing.
    side = round(2 * scenes.max_scale * scenes.size)
    self.glyphs = [[glyphs.draw_glyph(c, side, scenes.style) for c in offered[name]] for name in scenes.things]
    plane = _generator(scenes, _NOISE, 0).standard_normal((2 * scenes.size,) * 2, np.float32)
    self.noise = plane * np.float32(_NOISE_LEVELS)
    self._sprites: dict[tuple[int, int, int], glyphs.Sprite] = {}
    self._textures: dict[tuple[int, int], np.ndarray] = {}

  def sprite(self, name: int, variant: int, pose: int) -> glyphs.Sprite:
    key = (name, variant, pose)
    if key not in self._sprites:
      scenes = self._scenes
      flat = (name * 16 + variant) * scenes.poses + pose
      u, v = _generator(scenes, _POSE, flat).random(2)
      scale = scenes.min_scale + (scenes.max_scale - scenes.min_scale) * (pose + u) / scenes.poses
      degrees = scenes.max_degrees * (2 * v - 1)
      glyph = self.glyphs[name][variant]
      self._sprites[key] = glyphs.make_sprite(glyph, round(scale * scenes.size), degrees)
    return self._sprites[key]

  def texture(self, name: int, variant: int) -> np.ndarray:
    key = (name, variant)
    if key not in self._textures:
      scenes = self._scenes
      rng = _generator(scenes, _TEXTURE, name * scenes.textures + variant)
      stuff = backgrounds.STUFF[scenes.stuff[name]]
      side = round(_TEXTURE_SIDE * scenes.size)
      self._textures[key] = backgrounds.paint_texture(stuff, rng, side, scenes.size)
    return self._textures[key]


@dataclasses.dataclass(frozen=True)
class Scenes:
  """Random-access source of composed scenes, each pure in (seed, split, index).

  The randomness is Philox, a block cipher of a counter under a key. The key is (seed, split); the scene's index is one
  word of the counter and the position among its draws another, so no two scenes of any splits and seeds share random
  numbers. Textures and poses are drawn per split too: held-out scenes show backgrounds and poses unseen in training.

  Attributes:
    size: side of the square scenes in pixels.
    things: names of the things, of `ALL_THINGS`.
    stuff: names of the backgrounds, of `ALL_STUFF`.
    seed: key of the randomness.
    length: number of scenes; none is stored, so it may be as large as `sys.maxsize`.
    split: which of the disjoint streams, of `SPLITS`.
    min_things: fewest things put into a scene.
    max_things: most things put into a scene. One that finds no room in a few tries is left out, so
      with many large things a scene may have fewer than `min_things`, never none.
    min_scale: shortest long side of a thing, in scene sides.
    max_scale: longest; turned by 45 degrees, 0.7 just fits.
    max_degrees: largest turn of a thing either way.
    min_visible: share of each thing's pixels that must be inside the image and not covered.
    poses: number of (size, turn) pairs kept per glyph; mirroring doubles them.
    textures: number of textures kept per stuff; windows, turns and light vary them.
    style: whose drawings of the things. The same seed gives the same scenes in either, but for the things' outlines.
  """

  size: int
  things: Sequence[str]
  stuff: Sequence[str]
  seed: int
  length: int
  split: str = 'train'
  min_things: int = 1
  max_things: int = 3
  min_scale: float = 0.35
  max_scale: float = 0.65
  max_degrees: float = 40.0
  min_visible: float = 0.5
  poses: int = 64
  textures: int = 24
  style: glyphs.Style = 'openmoji'

  def __post_init__(self):
    object.__setattr__(self, 'things', _check_names('things', self.things, ALL_THINGS))
    object.__setattr__(self, 'stuff', _check_names('stuff', self.stuff, ALL_STUFF))
    _check_range('size', self.size, 16, 4096)
    _check_range('min_things', self.min_things, 1, self.max_things)

  def __reduce__(self):
    # Worker processes rebuild sprites and textures rather than receive them.
    return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  @property
  def classes(self) -> tuple[str, ...]:
    """Class names in label order: things, then stuff."""
    return self.things + self.stuff

  def __len__(self) -> int:
    return self.length

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Composes one scene.

    Returns:
      'image' uint8 [H, W, 3], 'text' the caption, 'key' a name unique to (split, seed, index), and 'label', the labels
      of the pixels in the order of `classes`, uint8 [H, W].

    Raises:
      IndexError: index is negative or not below the length.
    """
    layout = self._lay_out(index)
    labels = [len(self.things) + layout.stuff, *(thing.name for thing in layout.placed)]
    return {
      'image': composition.paint_scene(layout),
      'text': layout.caption,
      'key': f'scene-{self.split}-{self.seed}-{operator.index(index)}',
      'label': np.array(labels, np.uint8)[layout.owner],
    }

  @functools.cached_property
  def _bank(self) -> _Bank:
    with _BANK_LOCK:
      return _Bank(self)

  def _lay_out(self, index: int) -> composition.Layout:
    """Decides everything about a scene, in a fixed order of draws."""
    index = operator.index(index)
    if not 0 <= index < self.length:
      raise IndexError(f'scene {index} of {self.length}')
    count = _SCENE_DRAWS + self.max_things * (_THING_DRAWS + 2 * _TRIES)
    draws = iter(_generator(self, _COMPOSITION, index).random(count).tolist())
    stuff = pick(draws, len(self.stuff))
    kind = backgrounds.STUFF[self.stuff[stuff]]
    texture = self._bank.texture(stuff, pick(draws, self.textures))
    texture = composition.cut_window(draws, texture, self.size)
    texture = composition.turn_texture(draws, texture, kind.turns)
    light = composition.light_scene(draws, self.size)
    noise = composition.cut_window(draws, self._bank.noise, self.size)
    place = kind.places[pick(draws, len(kind.places))]
    template, backwards = next(draws), next(draws) < 0.5
    for _ in range(3):  # spent on captions once: a seed's scenes stay as they are
      next(draws)
    owner = np.zeros((self.size, self.size), np.uint8)
    placed = self._place_things(draws, owner)
    names = [self.things[thing.name] for thing in placed][:: -1 if backwards else 1]
    caption = captions.write_caption(names, place, template)
    return composition.Layout(stuff, texture, light, noise, placed, owner, caption)

  def _place_things(self, draws: Iterator[float], owner: np.ndarray) -> list[composition.Placed]:
    placed: list[composition.Placed] = []
    spare: list[float] = [np.inf]  # pixels each owner can still lose; the stuff can lose all
    wanted = self.min_things + pick(draws, self.max_things - self.min_things + 1)
    for _ in range(wanted):
      name = pick(draws, len(self.things))
      variant = pick(draws, len(self._bank.glyphs[name]))
      sprite = self._bank.sprite(name, variant, pick(draws, self.poses))
      mirror = slice(None, None, -1 if next(draws) < 0.5 else 1)
      gain = np.float32([next(draws), next(draws), next(draws)]) * 0.2 + (0.7 + 0.3 * next(draws))
      mask = sprite.mask[:, mirror]
      spots = [(next(draws), next(draws)) for _ in range(_TRIES)]
      found = composition.find_room(owner, mask, sprite.area, spots, spare, self.min_visible)
      if found is None:
        continue
      rows, columns, window = found
      owner[rows, columns][mask[window]] = len(placed) + 1
      rgb, clear = sprite.rgb[:, :, mirror], sprite.clear[:, mirror]
      placed.append(composition.Placed(name, rgb[:, *window], clear[window], rows, columns, gain[:, None, None]))
    return placed


def _check_names(what: str, names: Sequence[str], offered: Sequence[str]) -> tuple[str, ...]:
  """Names as a tuple. Raises UserError for none, one twice, or one that is not offered."""
  names = tuple(names)
  if not names:
    raise UserError(f'no {what}; name at least one of {", ".join(offered)}')
  for i, name in enumerate(names):
    if name not in offered:
      raise UserError(f'unknown {what} {name!r}; choose from {", ".join(offered)}')
    if name in names[:i]:
      raise UserError(f'{what} names {name!r} twice; remove one')
  return names


def _check_range(name: str, value: float, low: float, high: float) -> None:
  if not low <= value <= high:
    raise UserError(f'{name} is {value}; it must lie between {low} and {high}')
