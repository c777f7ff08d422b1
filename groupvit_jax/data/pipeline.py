"""Batches of image-text pairs in one global order, exact to the sample on any number of hosts and workers."""

from collections.abc import Iterator, Sequence
import concurrent.futures
import dataclasses
import functools
import itertools
from typing import NamedTuple

import cv2
import grain
import jax
import ml_collections
import numpy as np

from groupvit_jax.data import augment as image_ops
from groupvit_jax.data import bad_records, workers
from groupvit_jax.data import prompts as text_ops
from groupvit_jax.data.mixture import Mixture
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.running import sharding

# Streams of randomness of an example: a word of the generator's counter, so that none overlap.
_WORDS, _AUGMENT = range(2)
_AT_ONCE = 16  # examples that a thread makes together
_READ_AHEAD = 2  # batches being made in each process: the second fills in while the first one ends


class Example(NamedTuple):
  """An example before its texts are encoded."""

  image: np.ndarray  # uint8 [H, W, 3], as the model sees it
  caption: str
  key: str  # of the record
  position: int
  bad_records: np.ndarray  # int32 [causes], records that this one replaces, by cause


@dataclasses.dataclass(frozen=True)
class Examples:
  """What one host sees of a run: example j is row j % b of batch `first_batch + j // b`, b rows being this host's.

  Everything random about an example is drawn from (seed, position), the position counting through global batches; so
  neither workers nor hosts nor a restart change what a batch holds. A record that cannot be used is replaced by a
  neighbour in its set, which is a function of that record alone.
  """

  source: Mixture
  augment: image_ops.Augment | None  # None where the source's images have the model's size
  tokenizer: Tokenizer
  seed: int
  batch_size: int  # global
  num_prompts: int  # M
  text_length: int  # L
  first_batch: int
  num_batches: int  # where the run ends
  rows: Sequence[int]  # of a global batch that are made here
  lowercase_prompts: bool = False  # they are made of the caption in lower case
  prompt_templates: str = 'full'  # name of a template set
  skipped_words: Sequence[str] = ()  # that no prompt is made of
  word_ids: bool = False  # whether examples hold ids of the prompts' words

  def __post_init__(self):
    check_batch_size(self.source, self.batch_size)
    object.__setattr__(self, '_order', self.source.order(self.seed))

  def __len__(self) -> int:
    return max(self.num_batches - self.first_batch, 0) * len(self.rows)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Makes an example; see `make_some`."""
    return self.make_some((index,))[0]

  def make_some(self, indices: Sequence[int]) -> list[dict[str, np.ndarray]]:
    """Makes examples, all images before all texts.

    Alternating, images would drive the tables of tagger and tokenizer out of the processor's caches each time.

    Returns:
      Of each 'image' uint8 [H, W, 3], 'tokens' int32 [T, L], 'bad_records' int32 [causes]; 'words' int32 [M, 2] if
      `word_ids`.

    Raises:
      TooManyBadRecords: neither a record nor any neighbour can be used.
      OSError: a shard cannot be read.
    """
    rows = []
    for loaded in [self.load(index) for index in indices]:
      prompts = self._prompts(loaded.caption, loaded.position)
      tokens = self.tokenizer.encode([loaded.caption, *prompts.texts], self.text_length)
      words = {'words': text_ops.word_ids(prompts.words)} if self.word_ids else {}
      rows.append({'image': loaded.image, 'tokens': tokens, 'bad_records': loaded.bad_records} | words)
    return rows

  def texts(self, caption: str, position: int) -> list[str]:
    """A caption and the M prompts that it has at a position."""
    return [caption, *self._prompts(caption, position).texts]

  def load(self, index: int) -> Example:
    """The record to use, and its image; see `make_some`."""
    batch, row = divmod(index, len(self.rows))
    position = (self.first_batch + batch) * self.batch_size + self.rows[row]
    drawn = self._order[position]
    part, start = self.source.set_of(drawn)
    bad = []
    for candidate in bad_records.replacement_order(drawn, start, len(part.source)):
      try:
        record = self.source[candidate]
        return Example(self.image(record, position), record['text'], record['key'], position, bad_records.count(bad))
      except bad_records.BadRecord as error:
        bad_records.report(error)
        bad.append(error)
    raise bad_records.TooManyBadRecords(
      f'data.sets.{part.name}: {len(bad)} neighbours cannot be used, among them '
      f'{bad[0]}; look at the set with python -m groupvit_jax.data.audit'
    )

  def image(self, record: dict[str, object], position: int) -> np.ndarray:
    """The image of a record as seen at a position, uint8 [H, W, 3]. Raises BadRecord."""
    if not record['text'].strip():
      raise bad_records.BadRecord('caption_empty', record['key'])
    if self.augment is None:
      return record['image']
    return self.augment(record['image'], self._rng(position, _AUGMENT), record['key'])

  def _prompts(self, caption: str, position: int) -> text_ops.Prompts:
    return text_ops.noun_prompts(
      caption,
      self.num_prompts,
      self._rng(position, _WORDS),
      lowercase=self.lowercase_prompts,
      templates=self.prompt_templates,
      skipped_words=self.skipped_words,
    )

  def _rng(self, position: int, stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=(self.seed, position), counter=(0, 0, 0, stream)))


class Batches:
  """Examples stacked into one host's batches, each made by many threads at once.

  Each thread waits for one read at a time, so with remote shards their number is the number of requests in flight.
  """

  def __init__(self, examples: Examples, num_threads: int):
    """Batches this host's examples by `num_threads` in each process; 0 makes them in the caller."""
    self._examples, self._num_threads = examples, num_threads
    # An example is one thread's work: OpenCV's own threads would fight these over the cores.
    cv2.setNumThreads(0)

  def __reduce__(self):
    return type(self), (self._examples, self._num_threads)  # threads do not travel

  def __len__(self) -> int:
    return len(self._examples) // len(self._examples.rows)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Makes batch `first_batch + index`: what `Examples` returns, stacked."""
    count = len(self._examples.rows)
    numbers = range(index * count, (index + 1) * count)
    size = min(_AT_ONCE, -(-len(numbers) // max(self._num_threads, 1)))
    make = self._pool.map if self._num_threads else map
    parts = make(self._examples.make_some, [numbers[i : i + size] for i in range(0, len(numbers), size)])
    rows = itertools.chain.from_iterable(parts)
    batch: dict[str, np.ndarray] = {}
    for i, row in enumerate(rows):  # as they come: copied while the cache still holds them
      for name, value in row.items():
        if not i:
          batch[name] = np.empty((len(numbers), *value.shape), value.dtype)
        batch[name][i] = value
    return batch

  @functools.cached_property
  def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(self._num_threads, 'examples')


def check_batch_size(source: Mixture, batch_size: int) -> None:
  """Raises UserError unless the data fill a batch."""
  if len(source) < batch_size:
    raise UserError(
      f'the data have {len(source)} records, fewer than batch_size={batch_size}; add data, or lower --config.batch_size'
    )


def build_examples(
  config: ml_collections.ConfigDict,
  source: Mixture,
  tokenizer: Tokenizer,
  *,
  first_batch: int,
  rows: Sequence[int] | None = None,
) -> Examples:
  """Builds the examples of a run that has consumed `first_batch` batches; `rows` of each global batch, None for all."""
  augment = image_ops.build_augment(config.data.augment, tuple(config.model.vision.image_size))
  return Examples(
    source,
    augment,
    tokenizer,
    seed=config.seed,
    batch_size=config.batch_size,
    num_prompts=config.data.num_prompts,
    text_length=config.model.text.context_length,
    first_batch=first_batch,
    num_batches=config.total_steps,
    rows=range(config.batch_size) if rows is None else rows,
    lowercase_prompts=config.data.lowercase_prompts,
    prompt_templates=config.data.prompt_templates,
    skipped_words=tuple(config.data.skipped_words),
    word_ids=config.data.num_prompts > 0 and config.multi_label_loss != 'pooled',
  )


def iterate(
  examples: Examples, *, num_threads: int, num_workers: int, prefetch_batches: int
) -> Iterator[dict[str, np.ndarray]]:
  """This host's part of each batch, in order. Close it, or drop it, to end its threads and processes.

  Memory is bounded: about 2 * (`prefetch_batches` + the number of processes) batches.

  Args:
    examples: of the run.
    num_threads: threads that make examples, in each process; 0 makes them in the caller.
    num_workers: processes that do so; 0 for none but this one.
    prefetch_batches: how many batches are kept ready, in all processes together.

  Yields:
    {'image': uint8 [b, H, W, 3], 'tokens': int32 [b, T, L], 'bad_records': int32 [b, causes]} with b the host's rows,
    and 'words' int32 [b, M, 2] where examples hold them.
  """
  batches = grain.MapDataset.source(Batches(examples, num_threads))
  if not num_threads and not num_workers:
    yield from map(batches.__getitem__, range(len(batches)))
    return
  ahead = 1 if num_workers else max(prefetch_batches, 1)
  dataset = batches.to_iter_dataset(grain.ReadOptions(min(_READ_AHEAD, ahead), ahead))
  yield from workers.run(dataset, num_workers, -(-prefetch_batches // max(num_workers, 1)))


def to_devices(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Assembles the rows that each process has into global arrays, sharded over the batch."""
  return {name: sharding.make_global_array(rows, mesh) for name, rows in batch.items()}
