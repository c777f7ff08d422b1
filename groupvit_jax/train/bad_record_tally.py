"""Counts bad records over all processes and restarts, and ends a run that has too many."""

import json

from etils import epath
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from groupvit_jax import storage
from groupvit_jax.data import bad_records
from groupvit_jax.data.pipeline import to_devices
from groupvit_jax.running import sharding

_FEWEST = 1000  # examples a share is taken of: a single bad record in a small batch means nothing
_KEPT = 20  # checkpoints whose counts are kept


class BadRecordTally:
  """Bad records by cause since step 0, over all processes and restarts.

  The counts are saved with each checkpoint, so they are a function of the batches consumed.
  """

  def __init__(self, workdir: epath.PathLike, step: int, *, batch_size: int, max_share: float, mesh: Mesh):
    """Restores the counts of a step; a larger share of bad records than `max_share` ends the run."""
    self._path, self._mesh = epath.Path(workdir) / 'faults.json', mesh
    self._batch_size, self._max_share = batch_size, max_share
    self._saved = json.loads(self._path.read_text()) if self._path.exists() else {}
    known = self._saved.get(str(step), {})
    self._before = np.array([known.get(cause, 0) for cause in bad_records.CAUSES])
    # Since then; by row, so that it is laid out over processes as a batch is.
    self._rows = np.zeros((len(sharding.process_local_rows(batch_size, mesh)), len(bad_records.CAUSES)), np.int32)
    self._checked = step, int(self._before.sum())  # when the share was checked last, and the count then
    self._sum = jax.jit(lambda rows: rows.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))

  def add(self, rows: np.ndarray) -> None:
    """Counts this process's part of a batch's 'bad_records', int32 [b, causes]."""
    self._rows = self._rows + rows

  def total(self) -> jax.Array:
    """Bad records by cause since this process started, over all processes, int32 [causes]; does not wait."""
    total = self._sum(to_devices({'bad_records': self._rows}, self._mesh)['bad_records'])
    sharding.synchronize(total, self._mesh)
    return total

  def counts(self, total: jax.Array) -> dict[str, int]:
    """Fetches a total: bad records since step 0 by cause, without zeros."""
    values = (self._before + np.asarray(total)).tolist()
    return {cause: n for cause, n in zip(bad_records.CAUSES, values, strict=True) if n}

  def check(self, step: int, counts: dict[str, int]) -> None:
    """Raises TooManyBadRecords when the share since the last check is too large; `counts` were taken at `step`."""
    since, before = self._checked
    examples = (step - since) * self._batch_size
    if examples < _FEWEST:
      return
    found = sum(counts.values()) - before
    self._checked = step, sum(counts.values())
    if found > self._max_share * examples:
      listed = ', '.join(f'{cause} {n:,}' for cause, n in counts.items())
      raise bad_records.TooManyBadRecords(
        f'{found / examples:.1%} of the {examples:,} records since step {since} could not be used, more than '
        f'data.max_fault_share={self._max_share} (since step 0: {listed}); look at the data with '
        'python -m groupvit_jax.data.audit, or raise the share'
      )

  def save(self, step: int) -> None:
    """Saves the counts at the step of a checkpoint; all processes must call, process 0 writes."""
    counts = self.counts(self.total())
    if jax.process_index():
      return
    self._saved[str(step)] = counts
    self._saved = dict(sorted(self._saved.items(), key=lambda item: int(item[0]))[-_KEPT:])
    storage.write_atomic(str(self._path), (json.dumps(self._saved, indent=2) + '\n').encode())
