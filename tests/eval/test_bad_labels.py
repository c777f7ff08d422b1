"""Label maps that do not fit: refused in one line."""

import io

import numpy as np
from PIL import Image
import pytest

from groupvit_jax.errors import UserError
from groupvit_jax.eval import labelled
from tests import official_layouts


def test_label_maps_of_16_bits_and_without_image(tmp_path):
  data = io.BytesIO()
  Image.fromarray(np.full((2, 2), 3, np.uint16)).save(data, 'PNG')
  with pytest.raises(UserError, match='x.png has 16 bits or more a pixel; save its indices with 8'):
    labelled.decode_label(data.getvalue(), 'x.png')
  official_layouts.folder(tmp_path)
  labelled.open_folder(tmp_path)
  Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / 'labels' / 'spare.png')
  with pytest.raises(UserError, match='there is no image of .*labels/spare.png .* have none.; add it, or remove'):
    labelled.open_folder(tmp_path)
