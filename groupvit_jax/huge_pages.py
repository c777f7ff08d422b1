"""Memory in pages of 2 MiB instead of 4 KiB, for commands that compute on CPUs.

A step's temporaries are one array, of GiB on a CPU, which XLA allocates and frees anew each step: the system maps its
pages, clears them and is interrupted at the first touch of each. Of huge pages there are 512 times fewer, and the
processor finds them faster. Where Linux gives them on request, glibc (2.35 or newer) asks for them when an
environment variable says so as a program starts.
"""

import contextlib
import os
import pathlib
import platform
import sys

_SYSTEM = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')  # such as 'always [madvise] never'
_TUNABLE = 'glibc.malloc.hugetlb'


def environment() -> dict[str, str]:
  """Variables that make a program ask for huge pages.

  None where that changes nothing, because the system always or never gives them or there is no such glibc, and none
  where the caller's environment decides it already.
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if _TUNABLE in tunables or not _on_request():
    return {}
  return {'GLIBC_TUNABLES': ':'.join(filter(None, [tunables, f'{_TUNABLE}=1']))}


def restart() -> None:
  """Starts this process's program again with that environment; returns where there is no need to.

  Call it first. The process stays the same, with its number, its files and its place among others.
  """
  variables = environment()
  if variables and _is_command():
    with contextlib.suppress(OSError):  # slower, not wrong
      os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | variables)


def _on_request() -> bool:
  library, version = platform.libc_ver()
  return (
    library == 'glibc'
    and tuple(map(int, version.split('.')[:2])) >= (2, 35)
    and _SYSTEM.exists()
    and '[madvise]' in _SYSTEM.read_text()
  )


def _is_command() -> bool:
  """Whether what runs is what the process was started for, and not a guest in a notebook or a debugger."""
  module = sys.modules['__main__'].__spec__
  name = module.name.removesuffix('.__main__') if module else sys.argv[0]
  return sys.gettrace() is None and sys.orig_argv[-len(sys.argv) :] == [name, *sys.argv[1:]]
