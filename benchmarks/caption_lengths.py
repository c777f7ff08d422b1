"""Token counts of CC12M's captions and prompts, and what each text layout computes for them.

Captions have 20.2 +- 16.3 words, by the data set's paper (Changpinyo et al. 2021, arXiv 2102.08981, basic statistics).
COCO's are shorter: 11.6 +- 2.6 words and punctuation marks, counted in 600. Assumed, not measured: lengths are
log-normal; CLIP's BPE makes 1.2 tokens of a word; two words of five are nouns or verbs. Each of up to three of them
fills one of the 80 templates of ImageNet, whose words are a token each; the caption takes the prompts that are left, as
in training.
"""

import jax
import numpy as np

from groupvit_jax.data import prompts as text_ops
from groupvit_jax.model.text_packing import pack

WORDS_MEAN, WORDS_STD = 20.2, 16.3
TOKENS_A_WORD, TAGGED_SHARE = 1.2, 0.4
NOUN_TOKENS = (0.75, 0.2, 0.05)  # share of nouns of one, two and three tokens

# Seeds of a training benchmark's batches. Of so many batches of 8 images one needs more than 64 tokens an image, as one
# in seven does of a thousand.
BATCHES = 8


def draw_lengths(images: int, prompts: int, context_length: int, seed: int = 0) -> np.ndarray:
  """Tokens of each text with its start and its end, int [images, 1 + prompts], at most `context_length`."""
  rng = np.random.default_rng(seed)
  spread = np.sqrt(np.log1p((WORDS_STD / WORDS_MEAN) ** 2))
  words = np.maximum(rng.lognormal(np.log(WORDS_MEAN) - spread**2 / 2, spread, (images, 1)), 1)
  captions = 2 + np.ceil(TOKENS_A_WORD * words)
  templates = np.array(
    [len(text.replace('{}', '').replace('.', ' .').split()) for text in text_ops.template_set('full')]
  )
  nouns = 1 + rng.choice(len(NOUN_TOKENS), (images, prompts), p=NOUN_TOKENS)
  prompted = 2 + templates[rng.integers(len(templates), size=(images, prompts))] + nouns
  has_noun = np.arange(prompts)[None] < np.floor(TAGGED_SHARE * words)
  lengths = np.concatenate([captions, np.where(has_noun, prompted, captions)], axis=1)
  return np.minimum(lengths, context_length).astype(int)


def draw_tokens(images: int, prompts: int, context_length: int, vocab_size: int, seed: int = 0) -> np.ndarray:
  """Padded texts int32 [images, 1 + prompts, context_length] of random words; 0 starts, 1 ends and pads them."""
  lengths = draw_lengths(images, prompts, context_length, seed)
  words = np.random.default_rng(seed).integers(2, vocab_size, (*lengths.shape, context_length), np.int32)
  words[..., 0] = 0
  return np.where(np.arange(context_length) < lengths[..., None] - 1, words, 1).astype(np.int32)


def main() -> None:
  """Prints the tokens that each layout computes for an image, over a hundred batches."""
  prompts, context, images, batches = 3, 77, 256, 100
  lengths = draw_lengths(images * batches, prompts, context)
  longest = (1 + prompts) * lengths.reshape(batches, -1).max(axis=1)
  print('| layout | tokens computed an image | at most |\n|:--|--:|--:|')
  print(f'| no padding at all | {lengths.sum(axis=1).mean():.1f} | {lengths.sum(axis=1).max()} |')
  print(f'| padded | {(1 + prompts) * context} | |')
  print(f'| padded to the longest of {images} images | {longest.mean():.1f} | {longest.max()} |')
  rows_of = jax.jit(lambda tokens, row: pack(tokens, 1, row).num_rows, static_argnums=1)
  tokens = draw_tokens(images * batches, prompts, context, 99).reshape(batches, -1, context)
  for row in (77, 128, 256):
    computed = np.asarray(rows_of(tokens, row)) * row / images
    print(f'| rows of {row} over {images} images | {computed.mean():.1f} | {computed.max():.1f} |')
