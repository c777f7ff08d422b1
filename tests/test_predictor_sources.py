"""One predictor, whatever form the model comes in: the same call, the same answer."""

import numpy as np
import pytest

from groupvit_jax.commands.export import export
from groupvit_jax.eval import protocols
from groupvit_jax.predictor import Predictor
from groupvit_jax.train import restored_run
from tests.photos import photo
from tests.trained import trained_workdir

WORDS = ('dog|puppy', 'banana', 'grass')


PICTURES = [photo(48, 70), photo(8, 200, seed=1), photo(40, 33, seed=2)]  # the second one is lower than a window
# By default, and as the paper has it but for the size of windows, which are others than those of training.
PROTOCOLS = {
  'native': None,
  'groupvit': protocols.override(protocols.GROUPVIT, dict(short_side=48, max_long_side=192, window=48, stride=24)),
}


@pytest.fixture(scope='module')
def want():
  return {
    name: Predictor.from_pretrained(trained_workdir(), protocol=protocol)(PICTURES, WORDS, threshold=0.2)
    for name, protocol in PROTOCOLS.items()
  }


@pytest.mark.parametrize('form', ['huggingface', 'safetensors', 'stablehlo'])
def test_every_form_gives_the_same_answer(form, want, tmp_path):
  export(str(trained_workdir()), form, str(tmp_path / 'exported'))
  for name, protocol in PROTOCOLS.items():
    predictor = Predictor.from_pretrained(tmp_path / 'exported', protocol=protocol)
    for mine, other in zip(predictor(PICTURES, WORDS, threshold=0.2), want[name], strict=True):
      assert mine.classes == other.classes
      np.testing.assert_allclose(mine.class_scores, other.class_scores, atol=1e-4)
      np.testing.assert_allclose(mine.scores[1:], other.scores[1:], atol=1e-4)
      assert (mine.labels == other.labels).mean() > 0.99  # but for near-ties
      assert (mine.segments == other.segments).mean() > 0.99
  if form == 'stablehlo':
    with pytest.raises(ValueError, match='is a bundle of export --format=stablehlo and no workdir'):
      restored_run.restore(tmp_path / 'exported')
    (tmp_path / 'exported' / 'text.stablehlo').write_bytes(b'half')
    with pytest.raises(ValueError, match='exported is no whole bundle'):
      Predictor.from_pretrained(tmp_path / 'exported')


def test_another_dtype_and_no_best_checkpoint(want):
  predictor = Predictor.from_pretrained(trained_workdir(), dtype='bfloat16')
  for mine, other in zip(predictor(PICTURES, WORDS, threshold=0.2), want['native'], strict=True):
    assert (mine.segments == other.segments).mean() > 0.9
    difference = np.abs(mine.class_scores - other.class_scores).max()
    assert 0 < difference < 0.2, difference
  with pytest.raises(ValueError, match="dtype='float16': use float32 or bfloat16"):
    Predictor.from_pretrained(trained_workdir(), dtype='float16')
  with pytest.raises(ValueError, match='kept no best checkpoint'):
    Predictor.from_pretrained(trained_workdir(), checkpoint='best')
