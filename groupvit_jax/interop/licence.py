"""Licences of weights: read from model cards, kept in workdirs, written into exports."""

import json
import re
from typing import NamedTuple

from etils import epath
import yaml

from groupvit_jax import storage
from groupvit_jax.errors import UserError

FILE = 'licence.json'  # in a workdir whose weights come from elsewhere
_CARD = 'README.md'  # in every other folder of weights, with a header as the Hugging Face Hub knows it
_UNKNOWN = 'unknown'  # the Hub's identifiers for a missing licence, and for one without an identifier
_OTHER = 'other'


class Licence(NamedTuple):
  """A licence as a model card names it; '' where it has no such entry."""

  identifier: str = ''  # the Hub's: 'mit', 'cc-by-nc-4.0', 'other'
  name: str = ''  # of an 'other' one
  link: str = ''  # to its text

  def __str__(self) -> str:
    """One line for people."""
    known = [entry for entry in (self.name or self.identifier, self.link) if entry]
    return ', '.join(known) or 'the source names none; see the page that the weights come from'

  def header(self) -> str:
    """The lines of a model card's header, as the Hub accepts them."""
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
  """The licence in the header of a folder's model card; an empty one where there is no card or header."""
  card = folder / _CARD
  found = re.match(r'---\s*\n(.*?)^---\s*$', card.read_text(), re.DOTALL | re.MULTILINE) if card.is_file() else None
  try:
    values = yaml.safe_load(found[1]) if found else {}
  except yaml.YAMLError:
    values = {}
  values = values if isinstance(values, dict) else {}
  return Licence(*(_text(values.get(key)) for key in ('license', 'license_name', 'license_link')))


def keep(workdir: epath.PathLike, licence: Licence) -> None:
  """Writes into a workdir the licence of the weights that its run starts from, if one is known."""
  if any(licence):
    text = json.dumps(licence._asdict(), indent=2, ensure_ascii=False) + '\n'
    storage.write_atomic(str(epath.Path(workdir) / FILE), text.encode())


def read_kept(workdir: epath.PathLike) -> Licence:
  """The licence that `keep` wrote into a workdir; an empty one of a run with random initial weights.

  Raises:
    UserError: the file is damaged.
  """
  path = epath.Path(workdir) / FILE
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
