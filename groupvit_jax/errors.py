"""Errors that commands answer with one line instead of a traceback. Everything else is a defect and keeps its own.

Each message names the value that is wrong and what to do about it.
"""


class UserError(ValueError):
  """What the user gave is wrong: a flag, a config entry, a file. Commands exit with code 2.

  try:
    predictor('missing.png', ['dog'])
  except UserError as error:
    print(error)  # there is no image missing.png
  """


class ResourceError(UserError, OSError):
  """The machine does not give what a command needs: a full disk, a missing permission. Commands exit with code 2."""


class Unavailable(ResourceError):
  """A remote service failed after all retries. Commands exit with code 74: the same command may work later."""
