"""A profile of a few training steps, for TensorBoard or Perfetto."""

from collections.abc import Iterator
import contextlib

from etils import epath
import jax

# The first steps compile and warm up; three are enough to tell what repeats.
SKIPPED, TRACED = 3, 3


class StepTrace:
  """Traces a run's steps 4 to 6, counted from where it starts or goes on; or none of them."""

  def __init__(self, workdir: epath.PathLike, first_step: int, enabled: bool):
    self._folder = str(epath.Path(workdir) / 'profile')
    self._start, self._enabled, self._running = first_step + SKIPPED + 1, enabled, False

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """The context in which a step is dispatched."""
    if self._enabled and step == self._start:
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._running = True
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      yield

  def stop_after(self, step: int, results: object) -> bool:
    """Ends the trace once its last step's results are there; returns whether it did."""
    if not self._running or step < self._start + TRACED - 1:
      return False
    return self._stop(results)

  def close(self, results: object) -> None:
    """Ends a trace that the run was too short for."""
    if self._running:
      self._stop(results)

  def _stop(self, results: object) -> bool:
    jax.block_until_ready(results)
    jax.profiler.stop_trace()
    self._running = False
    return True
