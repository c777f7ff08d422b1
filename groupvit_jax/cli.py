"""What the commands share: flags from a config file, one line for a user's mistake, exit codes."""

import _thread
from collections.abc import Callable, Sequence
import errno
import os
import pathlib
import re
import sys
import threading

from absl import app, flags, logging

from groupvit_jax.errors import Unavailable, UserError

EXIT_USAGE = 2  # nothing was done: the request has a mistake
EXIT_PARTIAL = 3  # done, but for what was listed
EXIT_PEER_LOST = 69  # another process of the run is gone or never came (BSD's EX_UNAVAILABLE)
EXIT_UNAVAILABLE = 74  # a service failed however often it was asked; the same command may go on later (EX_IOERR)
EXIT_PREEMPTED = 75  # stopped by SIGTERM with everything saved; the same command goes on (BSD's EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # Ctrl-C, with nothing saved (as of a shell)

# Several CPU devices in one process share a pool of as many threads as there are cores, and each collective that a
# device waits in takes one: with few cores they wait for ever. XLA takes the size of the pool from NPROC.
_THREADS_PER_CPU_DEVICE = 8

_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE}


def run(main: Callable[[], int | None]) -> None:
  """Parses flags, runs `main` and exits with its code; a user's mistake ends in one line and code 2.

  That is a `UserError`, or the refusal of a full disk or a missing permission. Anything else is a defect: it keeps
  its traceback, and Python exits with 1.
  """
  devices = int(os.environ.get('JAX_NUM_CPU_DEVICES', 1))
  if devices > 1:
    os.environ.setdefault('NPROC', str(_THREADS_PER_CPU_DEVICE * devices))

  def guarded(_: Sequence[str]) -> int | None:
    logging.set_verbosity(logging.WARNING)
    try:
      return main()
    except (UserError, OSError) as error:
      if not is_mistake(error):
        raise
      return fail(error)
    except KeyboardInterrupt:
      fail('interrupted')
      return EXIT_INTERRUPTED

  _repeat_lost_interrupts()
  app.run(guarded, flags_parser=_parse_flags)


def _repeat_lost_interrupts() -> None:
  """Interrupts again where Ctrl-C came while Python called a destructor or the like, whose errors it drops."""
  previous = sys.unraisablehook

  def repeat_interrupt(unraisable: object) -> None:
    if unraisable.exc_type is not KeyboardInterrupt:
      return previous(unraisable)
    threading.Timer(0.1, _thread.interrupt_main).start()

  sys.unraisablehook = repeat_interrupt


def is_mistake(error: BaseException) -> bool:
  """Whether an error is the user's or the machine's, and its message says all that there is to say."""
  return isinstance(error, UserError) or isinstance(error, OSError) and error.errno in _OF_THE_MACHINE


def fail(reason: str | Exception) -> int:
  """Prints one line to stderr; returns the exit code for it."""
  print('error: ' + ' '.join(str(reason).split()), file=sys.stderr)
  return EXIT_UNAVAILABLE if isinstance(reason, Unavailable) else EXIT_USAGE


def _parse_flags(args: Sequence[str]) -> list[str]:
  """absl's parser, but a mistake (unknown flag, unknown config key, missing config file) takes one line.

  --help prints the command's own flags alone, and a config may be given by its name.
  """
  if {'--help', '-h', '-help'} & set(args):
    print(f'{sys.modules["__main__"].__doc__}\n{flags.FLAGS.main_module_help()}')
    sys.exit(0)
  try:
    sys.path.append(str(_configs_folder().parent))  # so that a user's config may import one of ours
    args = [_name_config(argument) for argument in args]
    rest = flags.FLAGS(args)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    reason = str(error).strip()
    if 'Traceback' in reason:  # of a config file, as ml_collections quotes it
      reason = f'--config: {reason.splitlines()[-1].partition(": ")[2] or reason.splitlines()[-1]}'
    if missing := re.match(r'flag --(\w+)=None: .* must have a value', reason):
      reason = f'--{missing[1]} is missing; see --help'
    sys.exit(fail(_unknown_entry(error, args) or reason))
  try:
    if 'config' in flags.FLAGS:
      getattr(flags.FLAGS['config'].value, 'to_dict', None)  # here ml_collections says that it could not read the file
  except OSError as error:
    sys.exit(fail(f'--config: {str(error).splitlines()[-1].strip()}; configs/ holds those that come along'))
  if len(rest) > 1:
    sys.exit(fail(f'unexpected argument {rest[1]!r}; options look like --name=value'))
  return rest


def _configs_folder() -> pathlib.Path:
  """The folder of the configs that come along: in an installed package, or in a checkout."""
  package = pathlib.Path(__file__).parent
  installed = package / 'share' / 'configs'
  return installed if installed.exists() else package.parent / 'configs'


def _name_config(argument: str) -> str:
  """An argument in which the name of a config, --config=quickstart or --config=quickstart:24things, is its path."""
  found = re.fullmatch(r'--?config=(\w+)(:.*)?', argument)
  if found is None:
    return argument
  path = _configs_folder() / f'{found[1]}.py'
  if not path.exists():
    names = sorted(file.stem for file in path.parent.glob('[!_]*.py'))
    raise UserError(f'{argument}: there is no such config; name the path of one, or {", ".join(names)}')
  return f'--config={path}{found[2] or ""}'


def _unknown_entry(error: Exception, args: Sequence[str]) -> str | None:
  """What to say of an override that a config has no entry for; of it ml_collections says but the last name."""
  reason = error
  while isinstance(reason, Exception):  # one may hold another
    reason = reason.args[0] if reason.args else ''
  name, _, hint = str(reason).partition('\n')
  name = name.strip('\'"')
  override = re.compile(rf'--config\.([\w.]+\.)?{re.escape(name)}([.=]|$)')
  found = next(filter(override.match, args), None) if isinstance(error, KeyError | AttributeError) else None
  if found and found.startswith('--config.data.sets.'):
    hint = 'Add the set in a copy of its file; for one set of your own take --config=own_pairs --config.data.path=PATH.'
  return found and f'{found}: the config has no such entry. {hint or "Its file lists all that there are."}'
