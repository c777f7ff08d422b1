"""Tests for the words of captions and the prompts made from them."""

from collections import Counter
import concurrent.futures
import html
import random
import re
import sys

import ftfy
import numpy as np
import pytest
from textblob.en import lexicon
from textblob.en.taggers import PatternTagger

from groupvit_jax.data import prompts as text_ops

CAPTION = 'a photo of a dog and a banana on the grass'


@pytest.mark.parametrize(
  'messy, clean',
  [
    ('a dog that doesnâ€™t bark', "a dog that doesn't bark"),
    ('cafÃ© au lait', 'café au lait'),
    ('salt &amp; pepper', 'salt & pepper'),
    ('5 &amp;lt; 6 &amp;gt; 4', '5 < 6 > 4'),
    ('a&nbsp;b\t c\r\n\n d', 'a b c d'),
    ('“quoted” and ‘single’', '"quoted" and \'single\''),
    ('the ﬁrst ﬂight', 'the first flight'),
    ('\x1b[36;44mblue\x1b[0m text', 'blue text'),
    ('l&#39;&eacute;t&eacute; Ã\xa0 Paris', "l'été à Paris"),
    ('ＷＩＤＥ \u2028 line', 'WIDE line'),
    ('  plain\x0btext  ', 'plaintext'),
    ('zero\x00 and \x7f', 'zero and'),
  ],
)
def test_captions_are_cleaned_as_before_clips_bpe(messy, clean):
  assert text_ops.clean_caption(messy) == clean
  fixed = html.unescape(html.unescape(ftfy.fix_text(messy)))
  assert clean == re.sub(r'\s+', ' ', fixed.strip()).strip()


def test_ascii_that_needs_no_repair_is_what_the_slow_way_leaves():
  captions = [f'a{chr(code)}b' for code in range(128) if chr(code) != '&']
  fixed = [' '.join(html.unescape(html.unescape(ftfy.fix_text(caption))).split()) for caption in captions]
  assert [text_ops.clean_caption(caption) for caption in captions] == fixed


@pytest.mark.parametrize(
  'caption, words',
  [
    (CAPTION, ['photo', 'dog', 'banana', 'grass']),
    ('Two small dogs are running in Paris.', ['dogs', 'are', 'running', 'Paris']),
    ('a dog and a dog', ['dog', 'dog']),
    ("it isn't the dog's bone; we're here", ['is', 'dog', 'bone']),
    ('of the and 12, (3.5)!', []),
    ('🐶 — ♥ dog', ['dog']),
    ('the sky. A dog jumped over the wall', ['sky', 'dog', 'jumped', 'wall']),
    ('', []),
    (' \n\n\t ', []),
  ],
)
def test_nouns_are_the_tagged_words_in_order(caption, words):
  assert text_ops.nouns(caption) == words


def test_tags_are_those_of_textblobs_pattern_tagger():
  tagger = PatternTagger()
  draw = random.Random(0)
  known = sorted(lexicon)
  odd = ['🐶', "'s", "isn't", '&amp;', 'a/b', '<b>', ':-)', 'Blorping', '3.5', '...', '猫', '\n\n']
  for _ in range(2000):
    words = [draw.choice(odd if draw.random() < 0.3 else known) for _ in range(draw.randrange(12))]
    caption = ' '.join(words)
    ours = [(word, tag) for sentence in text_ops._tag(caption) for word, tag in sentence]
    theirs = [(w, t if text_ops._is_word(w) else '') for w, t in tagger.tag(caption)]
    assert ours == theirs


def test_prompts_hold_distinct_words_in_the_80_templates():
  made = {template.format(word): word for template in text_ops.template_set('full') for word in text_ops.nouns(CAPTION)}
  picked = Counter()
  for seed in range(200):
    prompts = text_ops.noun_prompts(CAPTION, 3, np.random.default_rng(seed)).texts
    words = [made[prompt] for prompt in prompts]
    assert len(set(words)) == 3
    picked.update(words)
  # 600 picks over four equally likely words: 150 each, standard deviation 6.
  assert set(picked) == set(text_ops.nouns(CAPTION))
  assert all(115 < count < 185 for count in picked.values())


def test_the_caption_fills_the_rest():
  dog, *rest = text_ops.noun_prompts('the dog', 3, np.random.default_rng(0)).texts
  assert dog != 'the dog' and 'dog' in dog
  assert rest == ['the dog', 'the dog']
  assert text_ops.noun_prompts('', 2, np.random.default_rng(0)).texts == ['', '']
  assert text_ops.noun_prompts(CAPTION, 0, np.random.default_rng(0)) == ([], [])


def test_a_repeated_word_is_picked_once_per_occurrence():
  prompts = text_ops.noun_prompts('a dog and a dog', 3, np.random.default_rng(0)).texts
  assert prompts[2] == 'a dog and a dog'
  assert all(p in {t.format('dog') for t in text_ops.template_set('full')} for p in prompts[:2])


def test_skipped_words_are_never_picked():
  made = text_ops.noun_prompts('a Photo of a dog', 2, np.random.default_rng(0), skipped_words=('photo',))
  assert made.words == ['dog', 'a Photo of a dog']


def test_capitals_make_no_nouns_in_lower_case():
  caption = 'A DIRTY WHITE TOILET AND A Small Rug'
  picked = lambda **options: set(text_ops.noun_prompts(caption, 7, np.random.default_rng(0), **options).words)
  assert picked() == {'DIRTY', 'WHITE', 'TOILET', 'Rug', caption}
  assert picked(lowercase=True) == {'toilet', 'rug', caption}


def test_equal_words_have_equal_ids_in_any_template():
  first, second = (
    text_ops.noun_prompts(caption, 2, np.random.default_rng(seed))
    for seed, caption in enumerate(('a dog with a Banana', 'the banana of a dog'))
  )
  assert set(first.texts).isdisjoint(second.texts) and first.words != second.words
  one, other = (text_ops.word_ids(sorted(made.words, key=str.lower)) for made in (first, second))
  assert one.dtype == np.int32 and one.shape == (2, 2)
  np.testing.assert_array_equal(one, other)
  assert (one[0] != one[1]).any()


def test_template_sets():
  full = text_ops.template_set('full')
  assert len(full) == len(set(full)) == 80
  assert full[0] == 'a bad photo of a {}.' and full[-1] == 'a tattoo of the {}.'
  assert all(template.count('{}') == 1 for template in full)
  assert len(text_ops.template_set('subset')) == 7
  assert set(text_ops.template_set('subset')) < set(full)
  assert text_ops.template_set('simple') == ('a photo of a {}.',)


def test_class_prompts():
  assert text_ops.class_prompts(['dog', '{cat}'], 'simple') == [['a photo of a dog.'], ['a photo of a {cat}.']]
  with pytest.raises(ValueError, match="no template set 'all'.* full, identity, simple, subset$"):
    text_ops.class_prompts(['dog'], 'all')


def test_a_very_long_caption_is_tagged_up_to_a_limit():
  limit = text_ops.LONGEST_CAPTION
  assert text_ops.nouns('!' * (limit - 4) + ' dog cat') == ['dog']


def test_threads_that_tag_first_see_the_whole_lexicon():
  text_ops._parse.cache_clear()
  interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-5)
  try:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      # 'of' is late in the lexicon; a word that is not in it is called a noun.
      tagged = list(pool.map(text_ops.nouns, ['young dog of the year'] * 200))
  finally:
    sys.setswitchinterval(interval)
  assert tagged == [['dog', 'year']] * 200
