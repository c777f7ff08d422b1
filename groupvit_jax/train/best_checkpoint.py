"""The checkpoint of a run that scored best, beside the newest ones."""

from collections.abc import Mapping
import json
import math

from etils import epath
import jax
import ml_collections

from groupvit_jax import storage
from groupvit_jax.errors import UserError
from groupvit_jax.train.checkpoint import Checkpoints
from groupvit_jax.train.state import TrainState

FOLDER = 'best'  # of the checkpoint, in the workdir; best.json beside it says which and why


class BestCheckpoint:
  """Keeps the state with the highest value of one figure."""

  def __init__(self, workdir: epath.PathLike, metric: str):
    """Reads what an interrupted run kept.

    Args:
      workdir: of the run.
      metric: name of the figure as it is logged; '' keeps nothing.
    """
    self._metric, self._path = metric, epath.Path(workdir) / 'best.json'
    self._checkpoints = Checkpoints(workdir, keep=1, folder=FOLDER) if metric else None
    self.value, self.step = -math.inf, 0
    if metric and self._path.exists():
      kept = json.loads(self._path.read_text())
      if kept['metric'] == metric and kept['step'] in self._checkpoints.steps():
        self.value, self.step = kept['value'], kept['step']

  def offer(
    self,
    figures: Mapping[str, float],
    state: TrainState,
    config: ml_collections.ConfigDict,
    settings: Mapping[str, object],
  ) -> bool:
    """Keeps a state if its figure is among these and higher than ever.

    Args:
      figures: just measured, the same on every host.
      state: that they were measured of.
      config: of the run.
      settings: what the figures depend on, for best.json.

    Returns:
      Whether it is kept.

    Raises:
      ValueError: an evaluation of that name ran, and has no such figure.
      OSError: it could not be saved.
    """
    prefix = self._metric.rpartition('/')[0]
    if not self._metric or not any(name.startswith(f'{prefix}/') for name in figures):
      return False
    if self._metric not in figures:
      raise UserError(f'checkpoint.best={self._metric!r} is not measured; there are {", ".join(figures)}')
    value = float(figures[self._metric])
    if not value > self.value:  # nan is never best
      return False
    self.value, self.step = value, int(state.step)
    self._checkpoints.save(state, config)
    self._checkpoints.wait()  # the line below must not speak of what is not there
    if jax.process_index() == 0:
      kept = {'metric': self._metric, 'value': value, 'step': self.step, 'settings': dict(settings)}
      storage.write_atomic(str(self._path), (json.dumps(kept, indent=2) + '\n').encode())
    return True

  def close(self) -> None:
    """Ends the background threads."""
    if self._checkpoints is not None:
      self._checkpoints.close()
