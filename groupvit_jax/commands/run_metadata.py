"""What a report says of the run and the request it was made for, whatever was evaluated."""

import ast
from collections.abc import Mapping
import json
import sys
from typing import Any

import numpy as np

from groupvit_jax.eval import protocols
from groupvit_jax.eval.output_folder import OutputFolder
from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.train.open_run import TrainedRun


def choose_protocol(run: TrainedRun, name: str, changes: Mapping[str, str]) -> Protocol:
  """The named protocol with parameters as they were written on the command line.

  Raises:
    ValueError: there is no such protocol or parameter, or it cannot have that value.
  """
  protocol = protocols.find_protocol(name, tuple(run.config.model.vision.image_size))
  return protocols.override(protocol, {key: _parse(text) for key, text in changes.items()})


def run_facts(run: TrainedRun) -> dict[str, Any]:
  """The checkpoint and the config."""
  return {
    'checkpoint': {'step': run.step, 'damaged_newer_steps': list(run.skipped)},
    'config': json.loads(run.config.to_json()),
  }


def describe_run(run: TrainedRun) -> str:
  """The checkpoint, the code and the arithmetic, in a line."""
  facts = run.provenance
  line = (
    f'checkpoint {facts["workdir"]} step {facts["step"]}, weights {facts["weights"]}, code {facts["code"]}, '
    f'{facts["precision"]}'
  )
  damaged = ', '.join(map(str, run.skipped))
  return f'{line}; step {damaged} is newer but damaged' if damaged else line


def say_replaced(folder: OutputFolder) -> None:
  """Warns of files that are about to be replaced."""
  if folder.replaces:
    print(f'{folder.path}: files of the same names are replaced', file=sys.stderr)


def write_board(
  folder: OutputFolder, scalars: Mapping[str, float], facts: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
) -> None:
  """Writes TensorBoard's figures, and beside them what they depend on."""
  named = lambda values: {f'eval/{facts["benchmark"]}/{key}': value for key, value in values.items()}
  settings = json.dumps({key: value for key, value in facts.items() if key != 'config'}, indent=2)
  folder.write_board(int(facts['checkpoint']['step']), named(scalars), named({'settings': settings}), named(pictures))


def _parse(text: str) -> object:
  """A number, True, False or None (in any case); else the text."""
  try:
    return ast.literal_eval(text.title() if text.isalpha() else text)
  except (ValueError, SyntaxError):
    return text
