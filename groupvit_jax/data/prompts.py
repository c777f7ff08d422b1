"""Words of a caption, and the prompts made from them.

The tagger is textblob's `PatternTagger` (a lexicon and suffix rules; nothing is downloaded). Its
one self-contained module is loaded by file: `import textblob` would pull in nltk, scipy and
scikit-learn, about a second and 150 MB in every worker process.
"""

from collections.abc import Callable, Collection, Sequence
import functools
import hashlib
import html
import importlib.util
import json
from pathlib import Path
import re
from typing import NamedTuple

import numpy as np

from groupvit_jax.errors import UserError

# What the multi-label loss picks from (paper section 3.3): these nouns, and every verb tag.
WORD_TAGS = frozenset({'NN', 'NNS', 'NNP', 'VB', 'VBD', 'VBG', 'VBN', 'VBP', 'VBZ'})

# The tagger's time is quadratic in a run of punctuation; nothing after this is tagged.
LONGEST_CAPTION = 10_000

# What the tagger leaves of "isn't", "we're", "they'll": it calls some of them nouns.
_FRAGMENTS = frozenset({'n', 't', 's', 'd', 'm', 'll', 're', 've'})

# Of ASCII what ftfy removes: terminal escapes and control characters, but no white space.
_CONTROLS = re.compile(r'[\x00-\x08\x0b\x0e-\x1f\x7f]')

_TEMPLATES = Path(__file__).with_name('templates.json')


def clean_caption(caption: str) -> str:
  """The caption as CLIP cleans it before its BPE, but for the case.

  Repairs mis-decoded characters ("doesnâ€™t"), unescapes HTML twice ("&amp;lt;"), and makes each run of white space a
  space.
  """
  if not caption.isascii() or '&' in caption or _CONTROLS.search(caption):
    import ftfy  # most captions do without

    caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
  return ' '.join(caption.split())


def nouns(caption: str) -> list[str]:
  """Returns the nouns and verbs of a caption, in order, as they are written there.

  A word that occurs twice is listed twice. Tokens without a letter and the remains of contractions, which the tagger
  calls nouns, are left out. Only the first `LONGEST_CAPTION` characters are read.
  """
  return [word for sentence in _tag(caption) for word, tag in sentence if tag in WORD_TAGS]


class Prompts(NamedTuple):
  """The M prompts of a caption, and what each was made of: a word, or the caption itself."""

  texts: list[str]
  words: list[str]


def noun_prompts(
  caption: str,
  count: int,
  rng: np.random.Generator,
  *,
  lowercase: bool = False,
  templates: str = 'full',
  skipped_words: Collection[str] = (),
) -> Prompts:
  """Returns a caption's prompts for the multi-label loss (paper section 3.3).

  Up to `count` words are picked without replacement, each in a template drawn from a set (in the
  paper the 80 of ImageNet); the caption fills the rest. Words are picked by occurrence: one that the caption
  holds twice is twice as likely and may be picked twice, in two templates.

  Args:
    caption: English text.
    count: M, the number of prompts; 0 for none.
    rng: decides the words and the templates; equal states give equal prompts.
    lowercase: picks from the caption in lower case: the tagger takes most words in capitals for nouns.
    templates: name of a template set, see `template_set`.
    skipped_words: never picked, whatever their case, such as 'photo'.
  """
  if count == 0:
    return Prompts([], [])
  found = nouns(caption.lower() if lowercase else caption)
  words = [w for w in found if w.lower() not in skipped_words]
  formats = template_set(templates)
  picked = rng.permutation(len(words))[:count]
  drawn = rng.integers(len(formats), size=len(picked))
  prompts = [formats[t].format(words[w]) for w, t in zip(picked, drawn, strict=True)]
  rest = [caption] * (count - len(prompts))
  return Prompts(prompts + rest, [words[w] for w in picked] + rest)


def word_ids(words: Sequence[str]) -> np.ndarray:
  """Ids of words, int32 [M, 2]: 64 bits of a digest, equal for equal words whatever their case."""
  digests = (hashlib.blake2b(word.lower().encode('utf-8', 'replace'), digest_size=8).digest() for word in words)
  return np.frombuffer(b''.join(digests), '<i4').reshape(-1, 2).astype(np.int32)


def class_prompts(names: Sequence[str], templates: str) -> list[list[str]]:
  """Returns C class names in the T templates of a set (see `template_set`), [C][T], for zero-shot evaluation."""
  return [[template.format(name) for template in template_set(templates)] for name in names]


@functools.cache
def template_set(name: str) -> tuple[str, ...]:
  """Returns the T templates of a set, each with one `{}` for the class name.

  Sets are 'full' (the 80 of ImageNet), 'subset' (7 of them), 'simple' and 'identity' (one each).
  """
  sets = json.loads(_TEMPLATES.read_text(encoding='utf-8'))
  if name not in sets:
    raise UserError(f'no template set {name!r}; the known sets are {", ".join(sorted(sets))}')
  return tuple(sets[name])


def _tag(caption: str) -> list[list[tuple[str, str]]]:
  """Returns the sentences of a caption as lists of (word, Penn Treebank tag)."""
  sentences = _parse()(caption[:LONGEST_CAPTION], chunks=False, split=True)
  return [[(word, tag if _is_word(word) else '') for word, tag in sentence] for sentence in sentences]


def _is_word(token: str) -> bool:
  return any(map(str.isalpha, token)) and token not in _FRAGMENTS


@functools.cache
def _parse() -> Callable[..., list]:
  """Returns the parser's function behind `PatternTagger`, loaded once per process."""
  folder = Path(importlib.util.find_spec('textblob').origin).parent
  spec = importlib.util.spec_from_file_location('_textblob_text', folder / '_text.py')
  text = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(text)
  lexicon = text.Lexicon(path=str(folder / 'en' / 'en-lexicon.txt'), language='en')
  lexicon.load()  # here, not at first use: another thread would see half of it
  return text.Parser(lexicon=lexicon, default=('NN', 'NNP', 'CD'), language='en').parse
