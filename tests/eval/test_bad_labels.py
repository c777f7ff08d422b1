"""Label maps in files: of 8 and 16 bits, and those that do not fit, which are refused in one line."""

import io

import numpy as np
from PIL import Image
import pytest

from groupvit_jax.errors import UserError
from groupvit_jax.eval import draw, labelled
from tests import official_layouts


def test_label_maps_without_image_and_of_colours(tmp_path):
  data = io.BytesIO()
  Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(data, 'PNG')
  with pytest.raises(UserError, match='x.png is an image of mode RGB; it must be a PNG of indices of 8 or 16 bits'):
    labelled.decode_label(data.getvalue(), 'x.png')
  official_layouts.folder(tmp_path)
  labelled.open_folder(tmp_path)
  Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / 'labels' / 'spare.png')
  with pytest.raises(UserError, match='there is no image of .*labels/spare.png .* have none.; add it, or remove'):
    labelled.open_folder(tmp_path)


def test_more_classes_than_8_bits_hold(tmp_path):
  """Then 255 is a class in label maps of 16 bits, and ignored in those of 8."""
  official_layouts.folder(tmp_path)
  wide = official_layouts.labels_of(0, (0, 255, 299, 65535))
  official_layouts.save(tmp_path / 'labels' / 'a.png', wide)
  (tmp_path / 'classes.txt').write_text('\n'.join(f'class {n}' for n in range(300)))
  benchmark, source = labelled.open_folder(tmp_path)
  assert benchmark.num_classes == len(benchmark.palette) == 300
  np.testing.assert_array_equal(source[0]['label'], wide, strict=True)
  data = io.BytesIO()
  draw.mask_image(wide, benchmark.palette).save(data, 'PNG')
  np.testing.assert_array_equal(labelled.decode_label(data.getvalue(), 'a'), wide, strict=True)
  colours = draw.colour_map(wide, benchmark.palette)
  assert tuple(colours[0, 10]) == benchmark.palette[255] and tuple(colours[0, -1]) == (224, 224, 224)
  narrow = official_layouts.labels_of(1, (0, 1, 2, 65535))
  np.testing.assert_array_equal(source[1]['label'], narrow, strict=True)
