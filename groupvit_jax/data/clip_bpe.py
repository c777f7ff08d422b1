"""CLIP's byte-level BPE: from its files to ids, as `transformers`' CLIPTokenizer does it."""

from collections.abc import Mapping
import gzip
import json

from etils import epath
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from groupvit_jax.errors import UserError

BOS, EOS = '<|startoftext|>', '<|endoftext|>'

OPENAI_FILE = 'bpe_simple_vocab_16e6.txt.gz'
# In a folder, the first form that is whole is read: transformers' order, then OpenAI's.
FORMS = (('tokenizer.json',), ('vocab.json', 'merges.txt'), (OPENAI_FILE,))

# OpenAI's file lists more merges than CLIP's vocabulary takes: bytes, bytes that end a word,
# merges and two special tokens make 49,408.
OPENAI_MERGES = 49408 - 2 * 256 - 2

# Special tokens, English contractions, runs of letters, single digits, runs of anything else.
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

Bpe = tuple[dict[str, int], list[tuple[str, str]]]


def find_files(path: epath.Path) -> dict[str, epath.Path]:
  """Returns the files of one whole form of `FORMS`, by their names there.

  `path` is a folder, a `tokenizer.json`, or OpenAI's file under any name that ends in `.gz`.
  """
  if not path.is_dir():
    return {OPENAI_FILE if path.suffix == '.gz' else 'tokenizer.json': path}
  for form in FORMS:
    if all((path / name).exists() for name in form):
      return {name: path / name for name in form}
  forms = ', or '.join(' and '.join(form) for form in FORMS)
  raise UserError(f'{path} holds no tokenizer.model (SentencePiece), and no {forms} (CLIP)')


def read_bpe(files: Mapping[str, bytes]) -> Bpe:
  """Returns the vocabulary (token to id) and the merges, best first, of the contents of one form's files.

  Raises any exception where a file is not what its name says.
  """
  if OPENAI_FILE in files:
    return _read_openai(files[OPENAI_FILE])
  if 'tokenizer.json' in files:
    model = json.loads(files['tokenizer.json'])['model']
    # Files of older releases hold 'a b' for what newer ones write as ['a', 'b'].
    merges = [tuple(m.split(' ') if isinstance(m, str) else m) for m in model['merges']]
    return model['vocab'], merges
  lines = files['merges.txt'].decode().split('\n')
  merges = [tuple(line.split(' ')) for line in lines if line and not line.startswith('#version')]
  return json.loads(files['vocab.json']), merges


def build_pipeline(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
  """Returns what turns a text into ids, without bos and eos: NFC and lower case, words, bytes, BPE.

  Raises any exception where these are no CLIP vocabulary.
  """
  if not {BOS, EOS} <= vocab.keys():
    raise UserError(f'{BOS} or {EOS} is missing')
  if sorted(vocab.values()) != list(range(len(vocab))):
    raise UserError('its ids are not 0, 1, 2 and so on')
  pipeline = tokenizers.Tokenizer(models.BPE(vocab, merges, end_of_word_suffix='</w>'))
  pipeline.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
  words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior='removed', invert=True)
  bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
  pipeline.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_])
  pipeline.add_special_tokens([BOS, EOS])
  return pipeline


def _read_openai(data: bytes) -> Bpe:
  """Reads OpenAI's merges; the vocabulary follows from them."""
  _, *lines = gzip.decompress(data).decode().split('\n')
  merges = [tuple(line.split()) for line in lines[:OPENAI_MERGES] if line]
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  # The characters that stand for the 256 bytes, in CLIP's order of ids.
  letters = [*map(chr, printable), *(chr(0x100 + i) for i in range(0x100 - len(printable)))]
  tokens = [*letters, *(letter + '</w>' for letter in letters), *map(''.join, merges), BOS, EOS]
  return {token: i for i, token in enumerate(tokens)}, merges
