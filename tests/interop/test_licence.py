"""The licence of weights: what cards say of it, and what exports say in the Hub's words."""

import huggingface_hub
import pytest

from groupvit_jax.interop import licence
from groupvit_jax.interop.licence import Licence

LINK = 'https://example.org/a?b=c#d'


@pytest.mark.parametrize(
  'card, found, words',
  [
    ('---\nlicense: cc-by-nc-4.0\n---\n# A model\n', Licence('cc-by-nc-4.0'), 'cc-by-nc-4.0'),
    (
      f'---\ntags: [x]\nlicense: other\nlicense_name: nvidia\nlicense_link: >-\n  {LINK}\n---\n',
      Licence('other', 'nvidia', LINK),
      f'nvidia, {LINK}',
    ),
    ('---\nlicense:\n- mit\n- "apache-2.0"\n---\n', Licence('mit, apache-2.0'), 'mit, apache-2.0'),
    ('# A model\n\nlicense: mit\n', Licence(), 'the source names none'),  # not in a header
    ('---\ntags: [x]\n---\n\n```\nlicense: mit\n```\n', Licence(), 'the source names none'),
    ('---\nlicense: [mit\n---\n', Licence(), 'the source names none'),
    (None, Licence(), 'the source names none'),
  ],
)
def test_cards_and_back(card, found, words, tmp_path):
  if card is not None:
    (tmp_path / 'README.md').write_text(card)
  assert licence.read_card(tmp_path) == found and str(found).startswith(words)
  # What is kept in a workdir and written into an export says the same.
  licence.keep(tmp_path, found)
  assert licence.read_kept(tmp_path) == found
  assert (tmp_path / 'licence.json').exists() == any(found)
  header = huggingface_hub.ModelCard(f'---\n{found.header()}\n---\n', ignore_metadata_errors=False).data.to_dict()
  if found.link:
    assert header == dict(license='other', license_name='nvidia', license_link=LINK)
  else:
    assert (
      header
      == {
        'mit, apache-2.0': dict(license='other', license_name='mit-apache-2.0'),
        'cc-by-nc-4.0': dict(license='cc-by-nc-4.0'),
        '': dict(license='unknown'),
      }[found.identifier]
    )


def test_a_damaged_note_is_named(tmp_path):
  (tmp_path / 'licence.json').write_text('{"a": 1}')
  with pytest.raises(ValueError, match='licence.json is damaged .*; write into it what the weights came with'):
    licence.read_kept(tmp_path)
