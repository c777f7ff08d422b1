"""Batches of image-text pairs in one global order, exact to the sample on any number of hosts and workers."""

from collections.abc import Iterator
import dataclasses
from typing import Protocol

import grain
import jax
import numpy as np

from groupvit_jax import sharding
from groupvit_jax.data import text_ops
from groupvit_jax.data.tokenizer import Tokenizer


class Source(Protocol):
  """Random access to image-text records, pure in the index."""

  def __len__(self) -> int:
    ...

  def __getitem__(self, index: int) -> dict[str, object]:
    """Returns {'image': uint8 [H, W, 3], 'text': caption, 'key': name}."""
    ...


class Order:
  """The position in a run -> the record to read: a seeded permutation per epoch, for ever."""

  def __init__(self, num_records: int, seed: int):
    self._order = grain.MapDataset.range(num_records).shuffle(seed=seed).repeat()

  def __getitem__(self, position: int) -> int:
    return self._order[position]


@dataclasses.dataclass(frozen=True)
class Examples:
  """What one host sees of a run: example j is row j % b of batch `first_batch + j // b`, b rows being this host's.

  Everything random about an example is drawn from (seed, position), the position counting through global batches; so
  neither workers nor hosts nor a restart change what a batch holds.
  """

  source: Source
  tokenizer: Tokenizer
  seed: int
  batch_size: int  # global
  num_prompts: int  # M
  text_length: int  # L
  first_batch: int
  num_batches: int  # where the run ends
  host: int
  num_hosts: int

  def __post_init__(self):
    object.__setattr__(self, '_order', Order(len(self.source), self.seed))

  @property
  def rows(self) -> int:
    """Rows of a global batch that this host reads."""
    return self.batch_size // self.num_hosts

  def __len__(self) -> int:
    return max(self.num_batches - self.first_batch, 0) * self.rows

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    batch, row = divmod(index, self.rows)
    position = (self.first_batch + batch) * self.batch_size + self.host * self.rows + row
    record = self.source[self._order[position]]
    rng = np.random.Generator(np.random.Philox(key=(self.seed, position)))
    prompts = text_ops.noun_prompts(record['text'], self.num_prompts, rng)
    return {'image': record['image'], 'tokens': self.tokenizer.encode([record['text'], *prompts], self.text_length)}


def iterate(examples: Examples, *, num_threads: int, num_workers: int, prefetch_batches: int,
            ) -> Iterator[dict[str, np.ndarray]]:
  """This host's part of each batch, in order.

  Args:
    examples: the run's examples.
    num_threads: threads that make examples, in each process; 0 makes them in the caller.
    num_workers: processes that do so; 0 for none but this one.
    prefetch_batches: how many batches are kept ready.

  Yields:
    {'image': uint8 [b, H, W, 3], 'tokens': int32 [b, T, L]} with b the host's rows.
  """
  dataset = grain.MapDataset.source(examples).batch(examples.rows)
  dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads, prefetch_batches if num_threads else 0))
  if num_workers:
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers, prefetch_batches))
  return iter(dataset)


def to_devices(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Assembles the hosts' rows into global arrays, sharded over the batch."""
  place = sharding.batch_sharding(mesh)
  return {name: jax.make_array_from_process_local_data(place, rows) for name, rows in batch.items()}
