"""The licence of weights: read from where they come from, kept beside what is made of them, written into exports."""

import json
import re
from typing import NamedTuple

from etils import epath
import yaml

from groupvit_jax.errors import UserError

_FILE = 'licence.json'  # in a workdir whose weights come from elsewhere
_CARD = 'README.md'  # in every other folder of weights, with a header as the Hugging Face Hub knows it
_UNKNOWN = 'unknown'  # the Hub's words for one that nobody named, and for one that has no identifier there
_OTHER = 'other'


class Licence(NamedTuple):
  """What a source says of its licence; '' where it says nothing."""

  identifier: str = ''  # as the Hub has them: 'mit', 'cc-by-nc-4.0', 'other'
  name: str = ''  # of an 'other' one
  link: str = ''  # to its text

  def __str__(self) -> str:
    """In words, for people."""
    words = [word for word in (self.name or self.identifier, self.link) if word]
    return ', '.join(words) or 'the source names none; see the page that the weights come from'

  def header(self) -> str:
    """The lines of a model card's header, in words that the Hub accepts."""
    identifier, name = self.identifier or _UNKNOWN, self.name
    if not re.fullmatch(r'[a-z0-9][a-z0-9.\-]*', identifier):
      identifier, name = _OTHER, name or identifier
    values = dict(license=identifier)
    if identifier == _OTHER:
      values['license_name'] = re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-') or 'see-license-link'
    if self.link:
      values['license_link'] = self.link
    return yaml.safe_dump(values, sort_keys=False, width=1000).rstrip()


def read_card(folder: epath.Path) -> Licence:
  """The licence in the header of a folder's model card; an empty one where there is no such card or header."""
  card = folder / _CARD
  found = re.match(r'---\s*\n(.*?)^---\s*$', card.read_text(), re.DOTALL | re.MULTILINE) if card.is_file() else None
  try:
    values = yaml.safe_load(found[1]) if found else {}
  except yaml.YAMLError:
    values = {}
  values = values if isinstance(values, dict) else {}
  return Licence(*(_text(values.get(key)) for key in ('license', 'license_name', 'license_link')))


def keep(workdir: epath.PathLike, licence: Licence) -> None:
  """Notes in a workdir the licence of the weights that its run starts from, if one is known."""
  if any(licence):
    (epath.Path(workdir) / _FILE).write_text(json.dumps(licence._asdict(), indent=2, ensure_ascii=False) + '\n')


def read_kept(workdir: epath.PathLike) -> Licence:
  """What `keep` noted in a workdir; an empty one of a run that started at random.

  Raises:
    ValueError: the note is damaged.
  """
  path = epath.Path(workdir) / _FILE
  if not path.exists():
    return Licence()
  try:
    return Licence(**json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise UserError(
      f'{path} is damaged ({error}); write into it what the weights came with, as in '
      f'{json.dumps(Licence("mit")._asdict())}'
    ) from error


def _text(value: object) -> str:
  """A value of a header in one line; the Hub allows lists of licences."""
  values = value if isinstance(value, list) else [value]
  return ', '.join(' '.join(str(each).split()) for each in values if each is not None)
