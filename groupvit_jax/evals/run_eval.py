"""What eval.py does: score a run on its held-out scenes, or segment anyone's pictures."""

from collections.abc import Iterator, Mapping, Sequence
import glob
import os
from pathlib import Path
import sys
from typing import Any

import jax

from groupvit_jax import cli, trained_run
from groupvit_jax.data.pictures import read_picture
from groupvit_jax.evals.output_folder import OutputFolder
from groupvit_jax.evals.run_facts import choose_protocol, describe_run, run_facts, say_replaced
from groupvit_jax.evals.scene_eval import check_has_scenes, SceneEvaluator
from groupvit_jax.predictor import parse_words, Prediction, Predictor

_SCENES_SHOWN = 6


def evaluate_scenes(
  workdir: str,
  *,
  output: str | None,
  overwrite: bool,
  protocol: str,
  changes: Mapping[str, str],
  weights: trained_run.Weights = 'best',
) -> int:
  """Scores a run on its held-out scenes, beside two baselines, and prints a table.

  Args:
    workdir: of the run.
    output: folder for results.json, table.txt and scenes.png; None for the table alone.
    overwrite: see `OutputFolder`.
    protocol: name of the protocol.
    changes: protocol parameters as people write them.
    weights: as for `trained_run.open_run`.

  Returns:
    The exit code.

  Raises:
    ValueError: the request has a mistake; nothing was written.
    OSError: the results cannot be written.
  """
  folder = None if output is None else OutputFolder(output, overwrite=overwrite)
  run = trained_run.open_run(workdir, weights=weights)
  check_has_scenes(run.config, workdir)
  chosen = choose_protocol(run, protocol, changes)
  with trained_run.complete_config(workdir):
    evaluator = SceneEvaluator(
      run.config, run.model, run.tokenizer, run.mesh, split='test', protocol=chosen
    )
  first = jax.process_index() == 0
  if folder and first:
    folder.begin()
  result = evaluator.evaluate(run.variables, provenance=run.provenance)
  untrained, beside = _score_untrained(evaluator, run)
  pictures = evaluator.pictures(run.variables, _SCENES_SHOWN)
  if not first:
    return 0
  table = '\n'.join([
    result.table(),
    beside,
    describe_run(run),
  ])
  print(table)
  if folder:
    say_replaced(folder)
    report = result.to_json()
    report['baselines'] = _baselines(report, untrained)
    folder.write_text('table.txt', table + '\n')
    folder.write_picture('scenes.png', pictures)
    folder.write_report({'split': evaluator.split, **report, **run_facts(run, chosen, protocol)})
    print(f'written to {folder.path}')
  return 0


def label_pictures(
  workdir: str,
  *,
  images: str,
  classes: str,
  output: str,
  overwrite: bool,
  protocol: str,
  changes: Mapping[str, str],
  weights: trained_run.Weights = 'best',
) -> int:
  """Segments pictures into words, and writes for each what was found.

  Of a picture NAME: NAME.mask.png (indexed, label values), NAME.overlay.png, NAME.final_groups.png,
  NAME.first_groups.png and NAME.json (areas and scores); for all of them classes.json and results.json.

  Args:
    workdir: of the run.
    images: a path, or a pattern such as '*.png'.
    classes: words between commas; 'dog|puppy' is one class. With a threshold in the protocol what fits
      no word is background.
    output: folder.
    overwrite: see `OutputFolder`.
    protocol: name of the protocol.
    changes: protocol parameters as people write them.
    weights: as for `trained_run.open_run`.

  Returns:
    The exit code: `cli.EXIT_PARTIAL` if a picture could not be read.

  Raises:
    ValueError: the request has a mistake; nothing was written.
    OSError: the results cannot be written.
  """
  if jax.process_count() > 1:
    raise ValueError('pictures are segmented by one process; start it alone, with --num_processes=1')
  words = classes.split(',') if classes.strip() else []
  parse_words(words)  # before anything that takes time
  paths = _find_pictures(images)
  folder = OutputFolder(output, overwrite=overwrite)
  run = trained_run.open_run(workdir, weights=weights)
  chosen = choose_protocol(run, protocol, changes)
  predictor = Predictor.from_run(run, protocol=chosen)
  folder.begin()
  say_replaced(folder)
  names, failures, done = _unique_names(paths), {}, {}
  found = predictor.stream(_read_all(paths, failures), words, threshold=chosen.threshold)
  for prediction in found:
    _write_prediction(folder, names[prediction.key], prediction)
    if not done:
      folder.write_json('classes.json', _class_table(prediction))
    done[prediction.key] = names[prediction.key]
    print(_summarize(prediction), flush=True)
  for reason in failures.values():
    print(f'not done: {reason}', file=sys.stderr)
  folder.write_report({
    'pictures': [{'picture': path, 'files': name} for path, name in sorted(done.items())],
    'failures': [{'picture': path, 'reason': reason} for path, reason in failures.items()],
    'words': words,
    'protocol': chosen.to_json(),
    'provenance': dict(run.provenance),
    **run_facts(run, chosen, protocol),
  })
  print(f'{len(done)} of {len(paths)} pictures, written to {folder.path}; {describe_run(run)}')
  return cli.EXIT_PARTIAL if failures else 0


def _score_untrained(evaluator: SceneEvaluator, run: trained_run.TrainedRun) -> tuple[dict[str, Any] | None, str]:
  """The model before training: its results, None where its weights are gone, and a line about them."""
  try:
    variables = trained_run.untrained_variables(run)
  except ValueError as error:
    return None, f'the untrained model is left out: {error}'
  found = evaluator.evaluate(variables).to_json()
  return found, f'the untrained model: mIoU {found["miou"]:.1%}, pixel accuracy {found["pixel_accuracy"]:.1%}'


def _baselines(report: Mapping[str, Any], untrained: Mapping[str, Any] | None) -> dict[str, Any]:
  """What the run has to beat: one class for everything, and the model before training, unless its weights are gone."""
  names = ('miou', 'pixel_accuracy', 'mean_accuracy')
  constant = {'class': report['constant_class']} | {n: report[f'constant_{n}'] for n in names}
  if untrained is None:
    return {'constant': constant}
  names += tuple(f'oracle_{name}' for name in names)
  return {'constant': constant, 'untrained': {name: untrained[name] for name in names}}


def _find_pictures(pattern: str) -> list[str]:
  """The files that a pattern, or a path, stands for, sorted.

  Raises:
    ValueError: there are none.
  """
  # A name may hold brackets: what exists is not a pattern.
  found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
  paths = sorted(path for path in found if os.path.isfile(path))
  if not paths:
    hint = f'; for a folder write {os.path.join(pattern, "*")}' if os.path.isdir(pattern) else ''
    raise ValueError(f'no picture matches --images={pattern}{hint}')
  return paths


def _unique_names(paths: Sequence[str]) -> dict[str, str]:
  """What each picture's files are called: its name without the ending, numbered where two are equal."""
  names: dict[str, str] = {}
  taken: set[str] = set()
  for path in paths:
    name, number = Path(path).stem, 1
    while name.casefold() in taken:
      number += 1
      name = f'{Path(path).stem}_{number}'
    taken.add(name.casefold())
    names[path] = name
  return names


def _read_all(paths: Sequence[str], failures: dict[str, str]) -> Iterator[tuple[str, Any]]:
  """Yields (path, pixels) of the pictures that can be read, and notes the others."""
  for path in paths:
    try:
      yield path, read_picture(path, path)
    except ValueError as error:
      failures[path] = str(error)


def _write_prediction(folder: OutputFolder, name: str, prediction: Prediction) -> None:
  folder.write_picture(f'{name}.mask.png', prediction.mask())
  folder.write_picture(f'{name}.overlay.png', prediction.overlay())
  folder.write_picture(f'{name}.final_groups.png', prediction.group_overlay(-1))
  folder.write_picture(f'{name}.first_groups.png', prediction.group_overlay(0))
  folder.write_json(f'{name}.json', prediction.to_json())


def _class_table(prediction: Prediction) -> list[dict[str, Any]]:
  """What the values of a mask stand for."""
  return [
    {'label': label, 'name': name, 'colour': '#{:02x}{:02x}{:02x}'.format(*colour)}
    for label, (name, colour) in enumerate(zip(prediction.classes, prediction.palette))
  ]


def _summarize(prediction: Prediction) -> str:
  """The classes of a picture, largest first."""
  rows = [row for row in prediction.to_json()['classes'] if row['pixels']]
  return f'{prediction.key}: ' + ', '.join(f'{row["name"]} {row["area"]:.0%}' for row in rows)
