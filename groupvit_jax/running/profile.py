"""Profiles of a few training steps, for TensorBoard or Perfetto."""

from collections.abc import Callable, Iterator
import contextlib
import pathlib
import tempfile

from etils import epath
import jax

# The first steps compile and warm up.
SKIPPED, TRACED = 3, 3


class StepTrace:
  """Traces the steps 4 to 6 after a start or resume, in process 0, into `workdir`/profile.

  The profiler writes to a local disk; the trace is copied from there. An error is logged and does not end the run.
  """

  def __init__(self, workdir: epath.PathLike, first_step: int, enabled: bool, log: Callable[[str], None]):
    self._folder, self._log = epath.Path(workdir) / 'profile', log
    self._start, self._enabled = first_step + SKIPPED + 1, enabled and jax.process_index() == 0
    self._local: tempfile.TemporaryDirectory | None = None  # while it traces

  @contextlib.contextmanager
  def step(self, step: int) -> Iterator[None]:
    """The context in which a step is dispatched."""
    if self._enabled and step == self._start:
      with self._log_errors():
        local = tempfile.TemporaryDirectory(prefix='groupvit-profile-')
        jax.profiler.start_trace(local.name, create_perfetto_trace=True)
        self._local = local
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      yield

  def stop_after(self, step: int, results: object) -> None:
    """Ends the trace once its last step's results are there."""
    if step >= self._start + TRACED - 1:
      self.close(results)

  def close(self, results: object) -> None:
    """Ends the trace, if there is one, and copies it to the workdir."""
    if self._local is None:
      return
    jax.block_until_ready(results)
    local, self._local = self._local, None
    with self._log_errors(), local:
      jax.profiler.stop_trace()
      for path in filter(pathlib.Path.is_file, pathlib.Path(local.name).rglob('*')):
        target = self._folder / path.relative_to(local.name).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
      self._log(f'wrote a trace of {TRACED} steps to {self._folder}')

  @contextlib.contextmanager
  def _log_errors(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # of a profiler, its converters, a disk or a bucket
      self._log(f'no trace: {" ".join(str(error).split())[:300]}')
