"""Captions of composed scenes: which things, on what background."""

from collections.abc import Sequence

# {things} is 'a dog and a banana', {place} is 'on the grass'. No verb agrees with the things, so every
# template but one fits one thing and several.
TEMPLATES = (
  'a photo of {things} {place}',
  'a picture of {things} {place}',
  'an image of {things} {place}',
  'a bright photo of {things} {place}',
  'a small picture of {things} {place}',
  'in this image, {things} {place}',
  'we see {things} {place}',
  'here, {things} {place}',
  'only {things} {place}',
  '{things} {place}',
  '{things} together {place}',
  '{place}, {things}',
)
_ONE_THING_TEMPLATES = tuple(t for t in TEMPLATES if 'together' not in t)

_PHRASES = {
  'sun': 'the sun',
  'moon': 'the moon',
  'unicorn': 'a unicorn',
  **{name: name for name in ('bread', 'broccoli', 'cherries', 'corn', 'glasses', 'grapes', 'jeans', 'scissors')},
}


def name_thing(name: str) -> str:
  """The noun phrase of a thing: 'a dog', 'an apple', 'the sun', 'scissors'."""
  article = 'an' if name[0] in 'aeiou' else 'a'
  return _PHRASES.get(name, f'{article} {name}')


def write_caption(things: Sequence[str], place: str, template: float) -> str:
  """A caption in lower case without a full stop.

  Args:
    things: names of the things, at least one; a repeated name occurs once.
    place: where they are, as in 'on the grass'.
    template: number in [0, 1) that picks the sentence.
  """
  phrases = [name_thing(name) for name in dict.fromkeys(things)]
  listed = ' and '.join(filter(None, (', '.join(phrases[:-1]), phrases[-1])))
  sentences = TEMPLATES if len(phrases) > 1 else _ONE_THING_TEMPLATES
  sentence = sentences[int(template * len(sentences))]
  return sentence.format(things=listed, place=place)
