"""A profile of a few training steps, for TensorBoard or Perfetto."""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import tempfile

from etils import epath
import jax

# The first steps compile and warm up; three are enough to tell what repeats.
SKIPPED, TRACED = 3, 3


class StepTrace:
  """Traces a run's steps 4 to 6, counted from where it starts or goes on, in the first process; or none of them.

  The profiler writes to a local disk, and from there the trace goes to the workdir. A trace that cannot be made costs a
  line, not the run.
  """

  def __init__(self, workdir: epath.PathLike, first_step: int, enabled: bool, say: Callable[[str], None]):
    """Does nothing yet.

    Args:
      workdir: of the run.
      first_step: that it goes on after.
      enabled: whether to trace at all.
      say: is given a line about what became of it.
    """
    self._folder, self._say = epath.Path(workdir) / 'profile', say
    self._start, self._enabled = first_step + SKIPPED + 1, enabled and jax.process_index() == 0
    self._local: tempfile.TemporaryDirectory | None = None  # while it traces

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """The context in which a step is dispatched."""
    if self._enabled and step == self._start:
      with self._explained():
        local = tempfile.TemporaryDirectory(prefix='groupvit-profile-')
        jax.profiler.start_trace(local.name, create_perfetto_trace=True)
        self._local = local
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      yield

  def stop_after(self, step: int, results: object) -> None:
    """Ends the trace once its last step's results are there."""
    if self._local is not None and step >= self._start + TRACED - 1:
      self.close(results)

  def close(self, results: object) -> None:
    """Ends the trace, if there is one, and brings it to the workdir."""
    if self._local is None:
      return
    jax.block_until_ready(results)
    local, self._local = self._local, None
    with self._explained(), local:
      jax.profiler.stop_trace()
      for path in pathlib.Path(local.name).rglob('*'):
        if path.is_file():
          target = self._folder / path.relative_to(local.name).as_posix()
          target.parent.mkdir(parents=True, exist_ok=True)
          target.write_bytes(path.read_bytes())
      self._say(f'wrote a trace of {TRACED} steps to {self._folder}')

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # of a profiler, its converters, a disk or a bucket
      self._say(f'no trace: {" ".join(str(error).split())[:300]}')
