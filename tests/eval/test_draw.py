"""Pictures for people: what they show, where names go, and that masks keep their labels."""

import functools
import io

import jax
import numpy as np
from PIL import Image, ImageDraw
import pytest

from groupvit_jax.eval import draw, lettering, window_encoder
from groupvit_jax.model import segmentation
from groupvit_jax.model.pixels import normalize_images
from groupvit_jax.running import sharding
from tests.tiny import tiny_model
from tests.weights import random_variables

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def halves(height: int, width: int) -> np.ndarray:
  """Label 0 on the left, 1 on the right."""
  labels = np.zeros((height, width), np.uint8)
  labels[:, width // 2 :] = 1
  return labels


def test_palette_is_fixed_distinct_and_grows_at_its_end():
  palette = draw.spread_palette(60)
  assert len(set(palette)) == 60
  assert draw.spread_palette(7) == palette[:7]
  apart = np.abs(np.array(palette[:12])[:, None] - np.array(palette[:12])[None]).sum(axis=-1)
  assert apart[~np.eye(12, dtype=bool)].min() > 80
  assert len(draw.spread_palette(256)) == 256


def test_classes_get_the_colours_people_expect_and_others_that_the_colour_blind_can_tell_apart():
  names = ('dog', 'Grass', 'panda', 'sky', 'frog', 'water', 'banana')
  palette = dict(zip(names, draw.class_palette(names), strict=True))
  assert np.argmax(palette['Grass']) == 1 and np.argmax(palette['sky']) == np.argmax(palette['water']) == 2
  assert draw.class_palette(('dog', 'panda')) == draw.spread_palette(2)
  lab = draw.perceived(np.uint8(list(palette.values())))
  distances = np.linalg.norm(lab[:, :, None] - lab[:, None], axis=-1)
  assert distances[:, ~np.eye(len(names), dtype=bool)].min() > 15


def test_mask_is_indexed_and_keeps_every_label(rng):
  labels = rng.integers(0, 256, (5, 7), np.uint8)
  palette = draw.spread_palette(255)
  data = io.BytesIO()
  draw.mask_image(labels, palette).save(data, 'PNG')
  mask = Image.open(data)
  assert mask.mode == 'P' and np.array_equal(np.asarray(mask), labels)
  colours = np.array([*palette, (224, 224, 224)], np.uint8)
  assert np.array_equal(np.asarray(mask.convert('RGB')), colours[labels])
  assert np.array_equal(draw.colour_map(labels, palette), colours[labels])


def test_overlay_mixes_colours_and_leaves_what_is_ignored():
  image = np.full((400, 400, 3), 100, np.uint8)
  labels = halves(400, 400)
  labels[:100] = 255
  out = draw.draw_overlay(image, labels, (RED, GREEN), ('', ''), opacity=0.5)
  assert out.shape == image.shape
  assert out[300, 50].tolist() == [178, 50, 50] and out[300, 350].tolist() == [50, 178, 50]
  assert out[50, 50].tolist() == [100, 100, 100]
  assert out[300, 200].tolist() == [255, 255, 255]  # the border between them


@pytest.mark.parametrize('side', [64, 1600])
def test_names_lie_on_their_areas_at_any_size(side):
  """Plates are opaque: their pixels are in the classes' own colours, which the overlay mixes."""
  image = np.full((side, side, 3), 255, np.uint8)
  out = draw.draw_overlay(image, halves(side, side), (BLUE, RED), ('sky', 'a tractor'))
  for colour, area in ((BLUE, slice(0, out.shape[1] // 2)), (RED, slice(out.shape[1] // 2, None))):
    plate = (out == colour).all(axis=-1)
    inside = np.zeros_like(plate)
    inside[:, area] = plate[:, area]
    assert plate.any() and inside.sum() == plate.sum()
    height = np.ptp(np.nonzero(plate)[0])
    assert height >= max(12, out.shape[0] / 40)  # legible
    # Letters are dark or bright on it: within its box not everything is plate.
    box = out[np.ix_(*(np.unique(axis) for axis in np.nonzero(plate)))]
    assert 0.05 < 1 - (box == colour).all(axis=-1).mean() < 0.6


def test_names_do_not_cover_each_other():
  """Stripes lower than a plate: plates must move along them."""
  labels = np.arange(12, dtype=np.uint8)[:, None].repeat(48, axis=1)
  palette = draw.spread_palette(12)
  image = np.full((12, 48, 3), 128, np.uint8)
  out = draw.draw_overlay(image, labels, palette, [f'class {c}' for c in range(10, 22)])
  plates = [int((out == colour).all(axis=-1).sum()) for colour in palette]
  assert min(plates) > 0.8 * max(plates)


def test_a_group_has_one_colour_in_all_pictures():
  image = np.zeros((400, 400, 3), np.uint8)
  few, many = halves(400, 400), halves(400, 400)
  many[300:] = 5
  a, b = draw.draw_groups(image, few), draw.draw_groups(image, many)
  assert np.array_equal(a[100, 50], b[100, 50]) and np.array_equal(a[100, 350], b[100, 350])
  assert not np.array_equal(a[100, 50], a[100, 350])


def row(rng, *, stages: int, truth: bool = True) -> draw.Row:
  image = rng.integers(0, 256, (32, 32, 3), np.uint8)
  labels = halves(32, 32)
  return draw.Row(image, labels if truth else None, labels, (labels,) * stages)


def test_panel_has_a_tile_for_everything_there_is(rng):
  tile = 256 + 6
  sizes = {
    (truth, stages): draw.draw_panel([row(rng, stages=stages, truth=truth)] * 2, (RED, GREEN), ('dog', 'grass')).shape
    for truth in (True, False)
    for stages in (1, 2)
  }
  assert sizes[True, 2][1] == 6 + 5 * tile  # input, truth, prediction, final and first groups
  assert sizes[True, 1][1] == sizes[False, 2][1] == 6 + 4 * tile
  assert sizes[False, 1][1] == 6 + 3 * tile
  unnamed = row(rng, stages=2, truth=False)._replace(prediction=None)
  assert draw.draw_panel([unnamed], (), ()).shape[1] == 6 + 3 * tile  # input, final and first groups
  height = sizes[True, 2][0]
  assert 2 * tile < height < 2 * tile + 90  # two rows, titles and a legend
  panel = draw.draw_panel([row(rng, stages=1)], (RED, GREEN), ('dog', 'grass'))
  legend = panel[-30:].reshape(-1, 3)
  assert (legend == RED).all(axis=1).any() and (legend == GREEN).all(axis=1).any()
  assert (panel[:24] < 60).any()  # titles


def test_group_maps_are_those_of_the_windows(rng):
  """At the window's size: the same as upsampling each stage's assignments on the device."""
  model = tiny_model()
  images = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
  variables = random_variables(model)
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  maps = window_encoder.group_maps(model, variables, list(images), 16, mesh)
  encode = jax.jit(functools.partial(model.apply, method='encode_segments'))
  assignments = encode(variables, normalize_images(images)).assignments
  want = [
    segmentation.segment_map(segmentation.token_affinity(assignments[:stages]), (4, 4), (16, 16)) for stages in (1, 2)
  ]
  assert [len(stages) for stages in maps] == [2, 2]
  for b in range(2):
    for stage in range(2):
      assert (maps[b][stage] == np.asarray(want[stage][b])).mean() > 0.99  # near-ties may differ
  assert len(np.unique(maps[0][0])) > 1
  # Any other size is seen through the same square.
  large = window_encoder.group_maps(model, variables, [draw.enlarge(images[0], 3)], 16, mesh)
  assert large[0][0].shape == (48, 48)
  assert (large[0][0][1::3, 1::3] == maps[0][0]).mean() > 0.95


def written(text: str) -> np.ndarray:
  """Whether each pixel of a text is inked, and whether in colour: bool [2, H, W]."""
  canvas = Image.new('RGB', (200, 40), 'white')
  lettering.write_text(ImageDraw.Draw(canvas), (100, 20), text, (0, 0, 0), 20, 'mm')
  pixels = np.asarray(canvas).astype(int)
  return np.stack([pixels.min(axis=2) < 250, np.ptp(pixels, axis=2) > 50])


def test_names_in_any_script_are_written_and_not_boxes(monkeypatch):
  ink, colour = written('🐶')
  assert colour.sum() > 100  # a dog in colour
  for text in ('dog', 'caf\xe9', '\u0441\u043e\u0431\u0430\u043a\u0430'):  # the last two in DejaVu
    ink, colour = written(text)
    assert ink.any() and not colour.any()
  monkeypatch.setattr(lettering, '_fonts', lambda: iter([lettering._PILLOW]))
  (part, _) = next(lettering._parts('caf\xe9 \u732b', 20))
  assert part == 'caf\xe9 U+732B ' and written('\u732b')[0].sum() > 3 * written('o')[0].sum()  # a cat without a font
