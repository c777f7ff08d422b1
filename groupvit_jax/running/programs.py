"""Keeps a run's compiled programs, so that a restart need not compile them again."""

import os

from etils import epath
import jax
from jax.experimental.compilation_cache import compilation_cache


def keep_in(folder: epath.PathLike) -> None:
  """From now on programs that take a second to compile are kept, and those that are there already are used.

  JAX finds a program by what it computes, the versions of JAX and its compiler, and the kind and number of devices. The
  folder is made when the first program is compiled. Where JAX_COMPILATION_CACHE_DIR names another, that is used.
  """
  if os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    return
  jax.config.update('jax_compilation_cache_dir', str(epath.Path(folder)))
  compilation_cache.reset_cache()  # JAX asks once, and may have done so before
