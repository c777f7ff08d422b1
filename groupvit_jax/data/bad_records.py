"""Bad records: their causes, their replacement, counts and log."""

from collections.abc import Iterator
import logging
import threading

import numpy as np

from groupvit_jax.errors import UserError

# Order of the counts in a batch's 'bad_records'.
CAUSES = (
  'image_missing',  # no image, or an empty file
  'image_corrupt',  # not an image, or damaged
  'image_truncated',  # ends early
  'image_tiny',  # fewer pixels on a side than the config asks for
  'image_huge',  # more pixels than the config allows: a decompression bomb
  'caption_missing',  # no caption
  'caption_empty',  # nothing but blanks
  'caption_unreadable',  # not UTF-8, or not the JSON it should be
)

_TRIES, _NEAR = 32, 16  # neighbours tried, and how many of them lie side by side
_LINES = 20  # records written out by each process, so that a bad set does not flood the terminal
_log = logging.getLogger(__name__)
_lock = threading.Lock()
_written = 0


class BadRecord(Exception):
  """A record that cannot be used: its cause, of `CAUSES`, and its key, which names the shard."""

  def __init__(self, cause: str, key: str):
    super().__init__(cause, key)
    self.cause, self.key = cause, key

  def __str__(self) -> str:
    return f'{self.key}: {self.cause}'


class TooManyBadRecords(UserError):
  """No usable record in reach, or more replaced than the config allows."""


def replacement_order(index: int, start: int, size: int) -> Iterator[int]:
  """Yields a record, then those that may replace it, all of its set of `size` records from `start`.

  First those that follow it; then the distance doubles, so that a few more steps leave even a shard that is damaged as
  a whole.
  """
  for k in range(min(_TRIES, size)):
    distance = k if k < _NEAR else 2 ** (k - _NEAR + 4)
    yield start + (index - start + distance) % size


def count(records: list[BadRecord]) -> np.ndarray:
  """Counts records by cause: int32 [causes]."""
  causes = [record.cause for record in records]
  return np.array([causes.count(cause) for cause in CAUSES], np.int32)


def report(record: BadRecord) -> None:
  """Logs a bad record with shard and key; after some, this process only counts them."""
  global _written
  with _lock:
    _written += 1
    written = _written
  if written <= _LINES:
    _log.warning('replaced a record: %s', record)
  if written == _LINES:
    _log.warning('further records that this process replaces are only counted; the audit lists them')
