"""Tokenizers: SentencePiece, for training from scratch, and CLIP's BPE, for released weights."""

import abc
from collections.abc import Iterable, Sequence
import functools
import io
import os
import random
import re
from typing import Any

from etils import epath
import numpy as np
import sentencepiece
import tokenizers

from groupvit_jax import storage
from groupvit_jax.data import clip_bpe
from groupvit_jax.errors import UserError

SENTENCEPIECE_FILE = 'tokenizer.model'

# SentencePiece's trainer skips longer lines; captions are cut instead.
_LONGEST_CAPTION = 4096

_NO_CAPTIONS = 'there are no captions to train a tokenizer on'


class Tokenizer(abc.ABC):
  """Texts in, token ids out; pickled as its files, loaded once in each process that encodes.

  Attributes:
    vocab_size: ids lie in [0, vocab_size).
    bos_id: the first token of every text, or None.
    eos_id: the last token of every text; the text tower pools where it first occurs.
    pad_id: what follows it; never a token of a text, but may be `eos_id` itself (CLIP's is).
  """

  vocab_size: int
  bos_id: int | None
  eos_id: int
  pad_id: int

  def __init__(self, files: dict[str, bytes]):
    self._files = files

  def encode(self, texts: Sequence[str], length: int) -> np.ndarray:
    """Returns token ids, int32 [B, L], of B texts: bos if there is one, the text, eos, padding.

    A text too long for `length` (L) is cut so that eos is its last token.
    """
    if isinstance(texts, str):
      raise UserError(f'encode takes a list of texts, not one: put it in a list, [{texts[:40]!r}]')
    first = [] if self.bos_id is None else [self.bos_id]
    room = length - len(first) - 1
    if room < 1:
      raise UserError(f'length={length} leaves no room for text; use {len(first) + 2} or more')
    tokens = np.full((len(texts), length), self.pad_id, np.int32)
    for row, text in zip(tokens, texts, strict=True):
      ids = [*first, *self._text_ids(_encodable(text))[:room], self.eos_id]
      row[: len(ids)] = ids
    return tokens

  def save(self, folder: os.PathLike | str) -> None:
    """Writes the tokenizer's files to a folder, from which `build_tokenizer` loads it again."""
    for name, data in self._files.items():
      storage.write_atomic(str(epath.Path(folder) / name), data)

  @abc.abstractmethod
  def _text_ids(self, text: str) -> list[int]:
    """Returns the ids of a text alone."""

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in vars(self).items() if name != 'model'}


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model. Texts get no bos token: a causal tower with positions needs none."""

  bos_id = None

  def __init__(self, path: os.PathLike | str):
    """Reads a model file. Raises UserError where it is not a SentencePiece model with an eos piece."""
    super().__init__({SENTENCEPIECE_FILE: _read(epath.Path(path))})
    try:
      model = self.model
    except (RuntimeError, UnicodeDecodeError) as error:  # the second, where its message quotes damaged bytes
      raise UserError(f'{path} is not a SentencePiece model') from error
    if model.eos_id() < 0:
      raise UserError(f'{path} has no end-of-sentence piece; train it with an eos_id')
    self.vocab_size = model.get_piece_size()
    self.eos_id = model.eos_id()
    self.pad_id = model.pad_id() if model.pad_id() >= 0 else model.eos_id()

  @functools.cached_property
  def model(self) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model."""
    data = self._files[SENTENCEPIECE_FILE]
    if not data:
      raise RuntimeError('an empty file parses, as a model without pieces')
    return sentencepiece.SentencePieceProcessor(model_proto=data)

  def _text_ids(self, text: str) -> list[int]:
    # One text a call: a list costs ten times as much, in threads.
    return self.model.encode(text)


class ClipTokenizer(Tokenizer):
  """CLIP's lower-cased byte-level BPE; its ids and padding are those of `transformers`.

  Neither ftfy nor html.unescape runs first, as in `transformers` and unlike in OpenAI's code: data.clean_captions has
  captions cleaned before. A caption that spells out '<|endoftext|>' gets that token.
  """

  def __init__(self, path: os.PathLike | str):
    """Reads a vocabulary.

    Args:
      path: a Hugging Face tokenizer folder (`tokenizer.json`, or `vocab.json` and
        `merges.txt`), a `tokenizer.json`, or OpenAI's `bpe_simple_vocab_16e6.txt.gz`.
    """
    files = clip_bpe.find_files(epath.Path(path))
    super().__init__({name: _read(file) for name, file in files.items()})
    try:
      self.bos_id, self.eos_id = map(self.model.token_to_id, (clip_bpe.BOS, clip_bpe.EOS))
    except Exception as error:  # `tokenizers` raises no narrower type
      raise UserError(f'{path} is not a CLIP vocabulary (BPE with {clip_bpe.EOS})') from error
    self.vocab_size = self.model.get_vocab_size()
    self.pad_id = self.eos_id

  def bpe(self) -> clip_bpe.Bpe:
    """The vocabulary and the merges, best first."""
    return clip_bpe.read_bpe(self._files)

  @functools.cached_property
  def model(self) -> tokenizers.Tokenizer:
    """The pipeline of `tokenizers`, without bos and eos."""
    return clip_bpe.build_pipeline(*self.bpe())

  def _text_ids(self, text: str) -> list[int]:
    # One text a call: a batch starts threads, which do not survive a fork.
    return self.model.encode(text).ids


def build_tokenizer(path: os.PathLike | str) -> Tokenizer:
  """Returns the tokenizer at a path: a SentencePiece model, or a folder with one, or what `ClipTokenizer` takes.

  Raises:
    UserError: there is none, it is not readable, or there are two.
  """
  path = epath.Path(path)
  if not path.is_dir():
    is_clip = path.suffix in ('.gz', '.json')
    return ClipTokenizer(path) if is_clip else SentencePieceTokenizer(path)
  model = path / SENTENCEPIECE_FILE
  if not model.exists():
    return ClipTokenizer(path)
  if any((path / form[0]).exists() for form in clip_bpe.FORMS):
    raise UserError(f'{path} holds {SENTENCEPIECE_FILE} and a CLIP vocabulary; keep one of them')
  return SentencePieceTokenizer(model)


def train_sentencepiece(
  captions: Iterable[str], path: os.PathLike | str, vocab_size: int, *, max_captions: int = 2_000_000
) -> SentencePieceTokenizer:
  """Trains a SentencePiece model on captions, and writes it.

  BPE on case-folded NFKC text: over few captions it keeps whole words, where the unigram
  model keeps fragments. What no caption holds falls back to bytes, so that no text is unknown.
  Equal captions in equal order give an equal file.

  Args:
    captions: any number of them; blank ones are skipped.
    path: the model file to write.
    vocab_size: at most this many pieces, of which 259 are bytes and control pieces; fewer
      where the captions hold no more.
    max_captions: trains on a random sample of this many, which bounds memory.

  Raises:
    UserError: there are no captions, or `vocab_size` is below what their characters need.
  """
  if vocab_size < 1:
    raise UserError(f'vocab_size={vocab_size} is too small; use 300 or more')
  lines = (_encodable(' '.join(caption[:_LONGEST_CAPTION].split())) for caption in captions)
  lines = _sample(filter(None, lines), max_captions)
  if not lines:
    raise UserError(_NO_CAPTIONS)
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      model_type='bpe',
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      byte_fallback=True,
      normalization_rule_name='nmt_nfkc_cf',
      max_sentence_length=4 * _LONGEST_CAPTION,  # in bytes of UTF-8
      pad_id=0,
      eos_id=1,  # not 2: `transformers` then pools at the largest id, for the sake of old configs
      unk_id=2,
      bos_id=-1,
      num_threads=8,  # part of the file, so not this machine's
      minloglevel=2,
    )
  except RuntimeError as error:
    raise _training_error(str(error), vocab_size) from error
  storage.write_atomic(str(path), model.getvalue())
  return SentencePieceTokenizer(path)


def _encodable(text: str) -> str:
  """Replaces lone surrogates, which JSON captions can hold and neither library takes."""
  return text.encode('utf-8', 'replace').decode('utf-8')


def _sample(lines: Iterable[str], count: int) -> list[str]:
  """Returns a uniform sample in one pass; SentencePiece's own cannot be seeded."""
  draw = random.Random(0)
  kept = []
  for seen, line in enumerate(lines):
    if seen < count:
      kept.append(line)
    elif (slot := draw.randrange(seen + 1)) < count:
      kept[slot] = line
  return kept


def _training_error(message: str, vocab_size: int) -> ValueError:
  """Returns the trainer's message as one line, with the fix where it is a known one."""
  if needed := re.search(r'smaller than required_chars\. \d+ vs (\d+)', message):
    return ValueError(f'vocab_size={vocab_size} is too small; use {needed[1]} or more')
  if 'all_chars_count' in message:  # zero-width characters and the like
    return ValueError(_NO_CAPTIONS)
  return ValueError(f'no tokenizer can be trained on these captions: {" ".join(message.split())}')


def _read(path: epath.Path) -> bytes:
  try:
    return path.read_bytes()
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
    raise UserError(f'there is no file {path}') from error
