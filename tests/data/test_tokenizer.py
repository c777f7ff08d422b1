"""Tests for the tokenizers: SentencePiece, CLIP's BPE, and the command that trains one."""

import gzip
import hashlib
import io
import json
import multiprocessing
import pickle
import random
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tokenizers

from groupvit_jax.data import tokenizer

WORDS = 'dog cat banana grass sky sand water brick snow apple tree car bus house pizza fox'.split()


def make_captions(count, seed=0):
  draw = random.Random(seed)
  pick = lambda: draw.choice(WORDS)  # noqa: E731
  return [f'a photo of a {pick()} and a {pick()} on the {pick()}' for _ in range(count)]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  path = tmp_path_factory.mktemp('sentencepiece') / 'tokenizer.model'
  return tokenizer.train_sentencepiece(make_captions(2000), path, 1000)


@pytest.fixture(scope='module')
def clip_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('clip')
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=1500,
    end_of_word_suffix='</w>',
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  learner = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix='</w>'))
  learner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  learner.train_from_iterator((' '.join(odd_captions(1000, 1)).lower().split()), trainer)
  write_clip_folder(folder, json.loads(learner.to_str())['model']['merges'])
  return folder


def write_clip_folder(folder, merges=()):
  """Files as the released models have them: bytes, bytes that end a word, merges, bos and eos."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes stand for themselves
  letters = [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]
  tokens = letters + [letter + '</w>' for letter in letters] + [''.join(m) for m in merges]
  tokens += ['<|startoftext|>', '<|endoftext|>']
  vocab = {token: i for i, token in enumerate(tokens)}
  (folder / 'vocab.json').write_text(json.dumps(vocab), encoding='utf-8')
  lines = ['#version: 0.2', *map(' '.join, merges)]
  (folder / 'merges.txt').write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')


def write_openai_file(folder, path):
  lines = (folder / 'merges.txt').read_text(encoding='utf-8').split('\n')
  lines[0] = '"bpe_simple_vocab_16e6.txt#version: 0.2'
  path.write_bytes(gzip.compress('\n'.join(lines).encode()))
  return path


def odd_captions(count, seed):
  """Captions with what the web has in them: entities, emoji, scripts, controls, lengths."""
  draw = random.Random(seed)
  odd = [
    *'🐶 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 🇩🇪 👍🏽 é e\u0301 ﬁ ½ ² ① İ ẞ ß Ǆ ſ Σς'.split(),
    *'猫 日本語 한국어 עברית العربية हिन्दी ไทย ٣'.split(),
    *'&amp; &lt;b&gt; &#39; &quot; &nbsp; &amp;amp; <br/> http://a.b/c?d=e&f=g #tag @name'.split(),
    *"don't it's we're I'd 'tis o'clock ''s dogs' ’s “quoted” — – … ... !!! ?! 12 3.5 2nd".split(),
    *'<|endoftext|> <|startoftext|> <|ENDOFTEXT|> <|endoftext </w> Ġ Ċ __x__ a_b'.split(),
    *map(chr, (0, 9, 10, 0x1F, 0x85, 0xA0, 0xAD, 0x200B, 0x200D, 0x2028, 0x3000, 0xFEFF, 0xFFFD)),
    *('\r\n', 'â€™', 'Ã©', '', ' ', '  '),
  ]

  def piece():
    kind = draw.random()
    if kind < 0.5:
      word = draw.choice(WORDS)
      return draw.choice([word, word.upper(), word.title(), word + 's'])
    if kind < 0.85:
      return draw.choice(odd)
    points = (draw.randrange(draw.choice([0x80, 0x800, 0x10000, 0x110000])) for _ in range(3))
    return ''.join(chr(p) for p in points if not 0xD800 <= p < 0xE000)

  def caption():
    size = draw.choice([0, 1, 3, 8, 8, 20, 200])
    text = draw.choice(['', ' ', ' ']).join(piece() for _ in range(size))
    return unicodedata.normalize(draw.choice(['NFC', 'NFD']), text) if draw.random() < 0.3 else text

  return [caption() for _ in range(count)] + ['', ' ', 'x' * 5000, '🐶' * 300, 'dog ' * 2000]


def encode_elsewhere(pickled, results):
  results.put(pickle.loads(pickled).encode(['a dog', '🐶'], 16))


def test_sentencepiece_keeps_frequent_words_whole(trained):
  pieces = sentencepiece.SentencePieceProcessor(model_proto=trained._files['tokenizer.model'])
  assert pieces.encode('A Photo of a dog', out_type=str) == ['▁a', '▁photo', '▁of', '▁a', '▁dog']


def test_sentencepiece_rows_are_text_eos_padding(trained):
  rows = trained.encode(['a dog', '', 'a dog on the grass'], 4)
  assert rows.dtype == np.int32 and rows.shape == (3, 4)
  a, dog = rows[0, :2]
  assert rows.tolist()[:2] == [[a, dog, 1, 0], [1, 0, 0, 0]]
  assert rows[2, :2].tolist() == [a, dog] and rows[2, 3] == 1
  assert (trained.bos_id, trained.eos_id, trained.pad_id) == (None, 1, 0)
  assert trained.encode([], 4).shape == (0, 4)


def test_no_text_holds_padding_eos_or_unknown_pieces(trained):
  texts = [text[:200] for text in odd_captions(300, 2)] + ['<pad> </s> <unk>', '</s>']
  for row in trained.encode(texts, 2048).tolist():
    ids = row[: row.index(trained.eos_id)]
    assert not {0, 1, 2} & set(ids) and max(ids, default=0) < trained.vocab_size
    assert row[len(ids) :] == [1] + [0] * (2047 - len(ids))


def test_training_is_a_function_of_the_captions(tmp_path):
  code = (
    'import random, sys; from groupvit_jax.data import tokenizer;'
    'words = [chr(97 + i % 26) * (i % 7 + 1) for i in range(99)]; random.seed(1);'
    'captions = [" ".join(random.choices(words, k=5)) for _ in range(3000)];'
    'tokenizer.train_sentencepiece(captions, sys.argv[1], 320, max_captions=int(sys.argv[2]))'
  )

  def digest(name, sample):
    command = [sys.executable, '-c', code, tmp_path / name, str(sample)]
    subprocess.run(command, check=True)
    return hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()

  first = digest('a', 500)
  assert digest('b', 500) == first
  assert digest('c', 3000) != first


def test_training_stops_at_what_the_captions_support(tmp_path):
  small = tokenizer.train_sentencepiece(make_captions(100), tmp_path / 'a', 300)
  assert small.vocab_size == 300
  large = tokenizer.train_sentencepiece(make_captions(100), tmp_path / 'b', 32_000)
  assert 300 < large.vocab_size < 600
  one = tokenizer.train_sentencepiece(['dog'], tmp_path / 'c', 32_000)
  assert one.encode(['dog'], 3).tolist()[0][1:] == [1, 0]


def test_training_takes_any_captions(tmp_path):
  captions = ['dog\ncat', 'a\tb', 'x' * 100_000, '\ud800 dog', 'a\0b', *odd_captions(50, 3)]
  assert tokenizer.train_sentencepiece(captions, tmp_path / 'a', 1000).vocab_size > 259
  long = tokenizer.train_sentencepiece(['dog 猫 ' * 50_000], tmp_path / 'b', 1000)
  assert len(long._text_ids('dog')) == 1


@pytest.mark.parametrize(
  'captions, vocab_size, message',
  [
    ([], 1000, 'there are no captions to train a tokenizer on'),
    (['', ' \n'], 1000, 'there are no captions to train a tokenizer on'),
    (['\u200b'], 1000, 'there are no captions to train a tokenizer on'),
    (['dog'], 100, 'vocab_size=100 is too small; use 263 or more'),
    (['dog'], 0, 'vocab_size=0 is too small; use 300 or more'),
  ],
)
def test_what_cannot_be_trained_is_said_and_nothing_is_written(captions, vocab_size, message, tmp_path):
  (tmp_path / 'model').write_text('mine')
  with pytest.raises(ValueError) as error:
    tokenizer.train_sentencepiece(captions, tmp_path / 'model', vocab_size)
  assert str(error.value) == message
  assert [p.read_text() for p in tmp_path.iterdir()] == ['mine']


def test_clip_ids_by_hand(tmp_path):
  # Ids: 'a' is the 65th printable character from '!', a letter that ends a word 256 more, merges
  # from 512 on in their order, then the two special tokens.
  write_clip_folder(tmp_path, [('d', 'o'), ('do', 'g</w>'), ('a', 't</w>')])
  clip = tokenizer.ClipTokenizer(tmp_path)
  a, c, s = (ord(letter) - ord('!') for letter in 'acs')
  assert (clip.bos_id, clip.eos_id, clip.pad_id, clip.vocab_size) == (515, 516, 516, 517)
  assert clip.encode(['A  dog', 'cat', ' ', 'dogs'], 6).tolist() == [
    [515, a + 256, 513, 516, 516, 516],
    [515, c, 514, 516, 516, 516],
    [515, 516, 516, 516, 516, 516],
    [515, 512, ord('g') - 33, s + 256, 516, 516],
  ]
  assert clip.encode(['a dog a cat'], 4).tolist() == [[515, a + 256, 513, 516]]


def test_clip_ids_are_those_of_transformers(clip_folder, tmp_path, transformers):
  theirs = transformers.CLIPTokenizer.from_pretrained(clip_folder)
  theirs.save_pretrained(tmp_path / 'saved')  # as tokenizer.json
  captions = odd_captions(1500, 0)
  expected = theirs(captions, padding='max_length', truncation=True, max_length=77).input_ids
  assert sum(len(set(row)) > 3 for row in expected) > 900
  for path in (clip_folder, tmp_path / 'saved'):
    clip = tokenizer.ClipTokenizer(path)
    np.testing.assert_array_equal(clip.encode(captions, 77), expected)
    assert clip.vocab_size == len(theirs)
    assert (clip.eos_id, clip.pad_id) == (theirs.eos_token_id, theirs.pad_token_id)


def test_clip_reads_older_tokenizer_files_and_openais(clip_folder, tmp_path, transformers):
  """Of the former merges are one text each."""
  transformers.CLIPTokenizer.from_pretrained(clip_folder).save_pretrained(tmp_path)
  content = json.loads((tmp_path / 'tokenizer.json').read_text())
  content['model']['merges'] = [' '.join(merge) for merge in content['model']['merges']]
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  captions, folder = odd_captions(500, 5), tokenizer.ClipTokenizer(clip_folder)
  for path in (tmp_path, write_openai_file(clip_folder, tmp_path / 'any_name.txt.gz')):
    ours = tokenizer.ClipTokenizer(path)
    assert ours.vocab_size == folder.vocab_size
    np.testing.assert_array_equal(ours.encode(captions, 77), folder.encode(captions, 77))


@pytest.mark.parametrize('kind', ['sentencepiece', 'clip', 'openai'])
def test_a_saved_tokenizer_loads_again_without_its_source(kind, trained, clip_folder, tmp_path):
  source = tmp_path / 'source'
  source.mkdir()
  if kind == 'sentencepiece':
    trained.save(source)
  else:
    shutil.copytree(clip_folder, source, dirs_exist_ok=True)
  path = write_openai_file(source, source / 'bpe.txt.gz') if kind == 'openai' else source
  first = tokenizer.build_tokenizer(path)
  shutil.rmtree(source)
  first.save(tmp_path / 'run' / 'tokenizer')
  again = tokenizer.build_tokenizer(tmp_path / 'run' / 'tokenizer')
  captions = odd_captions(50, 6)
  np.testing.assert_array_equal(again.encode(captions, 77), first.encode(captions, 77))
  assert type(again) is type(first) and again.vocab_size == first.vocab_size


def test_tokenizers_encode_in_a_spawned_process(trained, clip_folder):
  context = multiprocessing.get_context('spawn')
  for ours in (trained, tokenizer.build_tokenizer(clip_folder)):
    expected = ours.encode(['a dog', '🐶'], 16)
    pickled = pickle.dumps(ours)
    assert 'model' not in vars(pickle.loads(pickled))
    results = context.SimpleQueue()
    process = context.Process(target=encode_elsewhere, args=(pickled, results))
    process.start()
    np.testing.assert_array_equal(results.get(), expected)
    process.join()


def test_lone_surrogates_are_encoded(trained, clip_folder):
  for ours in (trained, tokenizer.build_tokenizer(clip_folder)):
    np.testing.assert_array_equal(ours.encode(['dog \ud83d'], 16), ours.encode(['dog ?'], 16))


def test_encode_refuses_what_has_no_meaning(trained, clip_folder):
  with pytest.raises(ValueError, match=r"a list of texts, not one: .* \['a dog'\]$"):
    trained.encode('a dog', 8)
  with pytest.raises(ValueError, match='length=1 leaves no room for text; use 2 or more'):
    trained.encode(['a dog'], 1)
  with pytest.raises(ValueError, match='length=2 leaves no room for text; use 3 or more'):
    tokenizer.build_tokenizer(clip_folder).encode(['a dog'], 2)


def without_eos(path, trained):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['a dog']),
    model_writer=model,
    vocab_size=20,
    hard_vocab_limit=False,
    eos_id=-1,
    minloglevel=2,
  )
  path.write_bytes(model.getvalue())


@pytest.mark.parametrize(
  'make, message',
  [
    (lambda path, _: None, 'there is no file {}'),
    (lambda path, _: path.write_bytes(b''), '{} is not a SentencePiece model'),
    (lambda path, _: path.write_bytes(b'junk' * 99), '{} is not a SentencePiece model'),
    (
      lambda path, trained: path.write_bytes(trained._files['tokenizer.model'][:5000]),
      '{} is not a SentencePiece model',
    ),
    (without_eos, '{} has no end-of-sentence piece; train it with an eos_id'),
    (
      lambda path, _: path.mkdir(),
      '{} holds no tokenizer.model (SentencePiece), and no tokenizer.json, or vocab.json and '
      'merges.txt, or bpe_simple_vocab_16e6.txt.gz (CLIP)',
    ),
  ],
)
def test_what_is_no_sentencepiece_model_is_said(make, message, tmp_path, trained):
  path = tmp_path / 'tokenizer'
  make(path, trained)
  with pytest.raises(ValueError) as error:
    tokenizer.build_tokenizer(path)
  assert str(error.value) == message.format(path)


@pytest.mark.parametrize(
  'name, content',
  [
    ('bpe.txt.gz', b'not gzip'),
    ('bpe.txt.gz', gzip.compress(b'v\na b\n', mtime=0)[:-5]),
    ('bpe.txt.gz', gzip.compress(b'v\none two three\n', mtime=0)),
    ('tokenizer.json', b'{"model": '),
    ('tokenizer.json', b'{"model": {"vocab": {"a": 0}, "merges": []}}'),
    ('tokenizer.json', b'{"model": {"vocab": [["a", 0.5]], "merges": []}}'),
    ('tokenizer.json', b'[]'),
    ('vocab.json', b'{"a": 0}'),
  ],
)
def test_what_is_no_clip_vocabulary_is_said(name, content, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError) as error:
    tokenizer.build_tokenizer(tmp_path / name)
  assert str(error.value) == f'{tmp_path / name} is not a CLIP vocabulary (BPE with <|endoftext|>)'


def test_a_folder_with_two_tokenizers_is_refused(trained, clip_folder, tmp_path):
  shutil.copytree(clip_folder, tmp_path, dirs_exist_ok=True)
  trained.save(tmp_path)
  with pytest.raises(ValueError, match='holds tokenizer.model and a CLIP vocabulary; keep one'):
    tokenizer.build_tokenizer(tmp_path)
