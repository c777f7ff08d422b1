"""What a run was started on: the data it must go on with."""

from collections.abc import Mapping
import json

from etils import epath

from groupvit_jax import storage
from groupvit_jax.errors import UserError

_NAME = 'data.json'


def claim(workdir: epath.PathLike, facts: Mapping[str, object]) -> None:
  """Writes what a run's data are into its workdir, or checks them against what is written there.

  Args:
    workdir: of the run.
    facts: see `Mixture.facts`.

  Raises:
    ValueError: see `compare`.
  """
  compare(workdir, facts)
  path = epath.Path(workdir) / _NAME
  if not path.exists():
    storage.write_atomic(str(path), (json.dumps(facts, indent=2) + '\n').encode())


def compare(workdir: epath.PathLike, facts: Mapping[str, object]) -> None:
  """Checks data against those of the run in a workdir, if there is one.

  Where records lie and when they were written does not matter, only which they are, in what order.

  Raises:
    ValueError: the run was started on other data: its order of records would be another one.
  """
  path = epath.Path(workdir) / _NAME
  before = json.loads(path.read_text()) if path.exists() else facts
  if before['fingerprint'] == facts['fingerprint']:
    return
  old, new = before['sets'], facts['sets']
  changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
  raise UserError(
    f'the data changed since the run in {workdir} started: {", ".join(changed)} '
    f'({_sizes(old, changed)} records then, {_sizes(new, changed)} now); bring the old data back, use another '
    f'--workdir, or delete {path} to go on with another order of records'
  )


def _sizes(sets: Mapping[str, Mapping[str, object]], names: list[str]) -> str:
  return ' + '.join(f'{sets[name]["records"]:,}' if name in sets else '0' for name in names)
