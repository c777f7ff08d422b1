"""One predictor, whatever form the model comes in: the same call, the same answer."""

import numpy as np
import pytest

from groupvit_jax.interop.export import export
from groupvit_jax.predictor import Predictor
from tests.photos import photo
from tests.trained import trained_workdir

WORDS = ('dog|puppy', 'banana', 'grass')


@pytest.fixture(scope='module')
def want():
  return Predictor.open(trained_workdir())(photo(48, 70), WORDS, threshold=0.2)


@pytest.mark.parametrize('form', ['huggingface', 'safetensors', 'stablehlo'])
def test_every_form_gives_the_same_answer(form, want, tmp_path):
  export(str(trained_workdir()), form, str(tmp_path / 'exported'))
  predictor = Predictor.open(tmp_path / 'exported')
  found = predictor(photo(48, 70), WORDS, threshold=0.2)
  assert found.classes == want.classes
  np.testing.assert_allclose(found.class_scores, want.class_scores, atol=1e-4)
  np.testing.assert_allclose(found.scores[1:], want.scores[1:], atol=1e-4)
  assert (found.labels == want.labels).mean() > 0.99  # but for near-ties
  assert (found.segments == want.segments).mean() > 0.99
  if form == 'stablehlo':
    with pytest.raises(ValueError, match='a window of 8 x 32 px: the bundle was exported for 32 x 32 alone'):
      predictor(photo(8, 200), WORDS)
    (tmp_path / 'exported' / 'text.stablehlo').write_bytes(b'half')
    with pytest.raises(ValueError, match='exported is no whole bundle'):
      Predictor.open(tmp_path / 'exported')


def test_nothing_there(tmp_path):
  with pytest.raises(ValueError, match='there is no workdir'):
    Predictor.open(tmp_path / 'none')
