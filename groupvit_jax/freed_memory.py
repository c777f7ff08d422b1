"""What a program frees and soon asks for again, kept instead of given back to the system."""

import ctypes
import sys

# Of <malloc.h>; the last one since glibc 2.10.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
  """Makes glibc's `free` keep memory for the next `malloc`; call it before large arrays are made.

  On CPUs a step's temporaries are one array, of GiB, which XLA allocates and frees anew each step. glibc would map and
  unmap it: the system clears each of its pages again, and again is interrupted at the first touch of each. XLA
  allocates in threads of its own, whose arenas hold no more than 64 MiB and map what is larger whatever they are told;
  so all threads share the one arena that can grow.

  Returns:
    Whether there is a glibc to tell.
  """
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
  settings = (_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)
  return mallopt is not None and all(mallopt(*setting) for setting in settings)
