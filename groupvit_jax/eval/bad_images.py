"""Pictures of a set that cannot be used: they end an evaluation on all hosts alike, so that none waits for another."""

from collections.abc import Callable
from typing import TypeVar

import jax

from groupvit_jax.errors import UserError
from groupvit_jax.running import processes

R = TypeVar('R')


class PictureFault(UserError):
  """A picture cannot be read, or does not fit its label map. A benchmark leaves no picture out."""


class PictureFaults:
  """What is wrong with the pictures of this host."""

  def __init__(self):
    self._found: list[str] = []

  def guard(self, make: Callable[[int], R]) -> Callable[[int], R | None]:
    """What makes something of a picture, given its index, made to return None where that fails.

    Among several processes that is noted for `check`: the others, in the midst of a collective, could not be told. A
    process that is alone raises PictureFault at once.
    """

    def guarded(index: int) -> R | None:
      try:
        return make(index)
      except (ValueError, OSError, RuntimeError) as error:  # the last is what ArrayRecord raises
        line = ' '.join(str(error).split())
        if jax.process_count() == 1:
          raise PictureFault(line) from error
        self._found.append(line)
        return None

    return guarded

  def check(self) -> None:
    """Raises PictureFault on every host if any has met a fault; all of them must ask."""
    found = [line for host in processes.all_gather_objects(self._found) for line in host]
    if found:
      others = f' ({len(found)} pictures in all)' if len(found) > 1 else ''
      raise PictureFault(f'{found[0]}{others}')
