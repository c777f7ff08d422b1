"""Mixture of sets of image-text records in one endless order.

The order is a function of (seed, position) alone. A position counts examples through the whole
run: batch b holds the positions b * B to (b + 1) * B - 1.

- Mixed by size (no weights): an epoch is N positions, N being the records of all sets together.
  Epoch e, the positions e * N to (e + 1) * N - 1, is a permutation of all records, drawn from (seed, e).
- Mixed by weights: every block of `BLOCK` positions holds the same number of records of each set, its share rounded to
  whole records, in an order drawn from (seed, block). Each set has epochs of its own, permutations of its records drawn
  from (seed, set, epoch), and a block takes the next records of these. The mixture as a whole has no epochs.

Positions do not depend on hosts and workers, so neither changes what is seen, nor when.
"""

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
from typing import Protocol

from grain.experimental import index_shuffle
import numpy as np

from groupvit_jax.data.prompts import clean_caption
from groupvit_jax.errors import UserError

BLOCK = 2**14  # positions over which weighted shares are exact


class Source(Protocol):
  """Random access to image-text records, pure in the index."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, object]:
    """Returns {'image': uint8 [H, W, 3] or encoded bytes, 'text': caption, 'key': name}."""
    ...


@dataclasses.dataclass(frozen=True)
class DataSet:
  """A set of a mixture."""

  name: str
  source: Source
  digest: str  # changes when the records do
  num_shards: int  # files; 0 for records made on demand
  weight: float  # its share of the examples relative to the other sets'; 0 for its share of the records
  clean: bool = False  # whether captions are cleaned: see `prompts.clean_caption`

  def read(self, index: int) -> dict[str, object]:
    """A record with its caption as it is trained on."""
    record = self.source[index]
    return record | {'text': clean_caption(record['text'])} if self.clean else record

  def describe(self, expected: int = 0) -> str:
    """Its size, for people, and the share of the records that it should have."""
    share = f' of {expected:,} expected ({len(self.source) / expected:.1%})' if expected else ''
    return f'{self.name}: {len(self.source):,} records{share} in {self.num_shards:,} shards'

  def caption_of(self, index: int) -> str:
    """A record's caption, without its image where the source allows that."""
    if not hasattr(self.source, 'caption_of'):
      return self.read(index)['text']
    caption = self.source.caption_of(index)
    return clean_caption(caption) if self.clean else caption


class Order:
  """Maps a position in a run to the record to read, counted through the sets."""

  def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int):
    """Sets up an order (see this module) of sets of some sizes; weights are of any sum, None mixes by size."""
    self._starts = _starts(sizes)
    if weights is None:
      later = int(np.random.SeedSequence(seed).generate_state(1)[0])
      self._permutations, self._shares = [_Permutations(int(sum(sizes)), seed, later)], None
      return
    self._shares = _whole_shares(weights)
    seeds = np.random.SeedSequence(seed).generate_state(len(sizes) + 1).tolist()
    self._slots = _Permutations(BLOCK, seeds[-1], seeds[-1])
    self._permutations = [_Permutations(size, own, own) for size, own in zip(sizes, seeds, strict=False)]
    self._share_starts = _starts(self._shares)

  def __getitem__(self, position: int) -> int:
    if self._shares is None:
      return self._permutations[0][position]
    slot = self._slots[position]
    chosen = int(np.searchsorted(self._share_starts, slot, side='right')) - 1
    drawn = position // BLOCK * self._shares[chosen] + slot - int(self._share_starts[chosen])
    return int(self._starts[chosen]) + self._permutations[chosen][drawn]


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Sets as one source: the records of the first, then those of the second, and so on."""

  sets: tuple[DataSet, ...]

  def __post_init__(self):
    for part in self.sets:
      if not len(part.source):
        raise UserError(f'data.sets.{part.name} has no records')
    unweighted = [part.name for part in self.sets if not part.weight]
    if any(part.weight < 0 for part in self.sets) or 0 < len(unweighted) < len(self.sets):
      raise UserError(
        'data.sets: weights are positive for all sets, or 0 for all to mix them by '
        f'size; {", ".join(f"{part.name} has {part.weight}" for part in self.sets)}'
      )

  def __reduce__(self):
    return type(self), (self.sets,)

  def __len__(self) -> int:
    return int(self._starts[-1]) + len(self.sets[-1].source)

  def __getitem__(self, index: int) -> dict[str, object]:
    """Reads a record; raises what its set raises."""
    part, start = self.set_of(index)
    return part.read(index - start)

  def caption_of(self, index: int) -> str:
    """Reads a caption, without the image where the set can."""
    part, start = self.set_of(index)
    return part.caption_of(index - start)

  def describe_size(self) -> str:
    """The number of records, for people."""
    return f'{len(self):,} records' if any(part.num_shards for part in self.sets) else 'records made on demand'

  def set_of(self, index: int) -> tuple[DataSet, int]:
    """The set of a record, and the index of that set's first record."""
    chosen = int(np.searchsorted(self._starts, index, side='right')) - 1
    return self.sets[chosen], int(self._starts[chosen])

  def order(self, seed: int) -> Order:
    """The order in which a run with this seed sees the records."""
    weights = [part.weight for part in self.sets]
    return Order([len(part.source) for part in self.sets], weights if all(weights) else None, seed)

  def metadata(self) -> dict[str, object]:
    """What the order and the records depend on besides the seed, as JSON for a run's manifest."""
    sets = {
      part.name: {'records': len(part.source), 'shards': part.num_shards, 'weight': part.weight, 'digest': part.digest}
      for part in self.sets
    }
    text = json.dumps([[name, part['records'], part['weight'], part['digest']] for name, part in sets.items()])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {'fingerprint': fingerprint, 'epochs': 'from (seed, epoch)', 'sets': sets}

  @functools.cached_property
  def _starts(self) -> np.ndarray:
    return _starts([len(part.source) for part in self.sets])


def _starts(sizes: Sequence[int]) -> np.ndarray:
  return np.cumsum([0, *sizes[:-1]])


class _Permutations:
  """0..size-1 shuffled with one seed, then with the seeds that follow `later`, and so on for ever.

  Where both are equal, as `grain.MapDataset.range(size).shuffle(seed).repeat()`, at a fifth of its cost.
  """

  def __init__(self, size: int, seed: int, later: int):
    self._size, self._seed, self._later = size, seed, later

  def __getitem__(self, position: int) -> int:
    epoch, index = divmod(position, self._size)
    seed = (self._later + epoch if epoch else self._seed) % 2**32
    return index_shuffle(index, max_index=self._size - 1, seed=seed, rounds=4)


def _whole_shares(weights: Sequence[float]) -> list[int]:
  """Shares of a block in whole records: rounded down, the rest to the largest remainders."""
  exact = np.array(weights) / np.sum(weights) * BLOCK
  shares = np.floor(exact).astype(int)
  shares[np.argsort(shares - exact, kind='stable')[: BLOCK - shares.sum()]] += 1
  if not shares.all():
    raise UserError(
      f'data.sets: weight {weights[int(np.argmin(shares))]} is too small beside '
      f'{max(weights)}; use at least 1/{BLOCK} of the sum'
    )
  return shares.tolist()
