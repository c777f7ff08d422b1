"""Segments images into named classes: eval.py --images writes masks, overlays, groups and JSON."""

from collections.abc import Iterator, Mapping, Sequence
import glob
import os
import sys
from typing import Any

import jax

from groupvit_jax import cli
from groupvit_jax.commands.score import describe_run, run_metadata
from groupvit_jax.data.images import read_image
from groupvit_jax.errors import UserError
from groupvit_jax.eval.class_names import parse_class_names
from groupvit_jax.eval.draw import hex_colour
from groupvit_jax.eval.output_folder import OutputFolder
from groupvit_jax.prediction import file_name, Prediction
from groupvit_jax.predictor import Predictor
from groupvit_jax.train import restored_run


def segment_images(
  workdir: str,
  *,
  images: str,
  classes: str,
  output: str,
  overwrite: bool,
  protocol: str,
  changes: Mapping[str, str],
  checkpoint: str = restored_run.NEWEST,
  weights: restored_run.Weights = 'best',
  runtime: str | None = None,
) -> int:
  """Segments images into classes, and writes what was found in each.

  Of each image the files of `Prediction.save`; for all of them classes.json and results.json.

  Args:
    workdir: of the run.
    images: a path, or a pattern such as '*.png'.
    classes: class names between commas; 'dog|puppy' is one class. With a threshold in the protocol, pixels that fit
      no class are background.
    changes: parameters of the protocol as people write them.

  Returns:
    The exit code: `cli.EXIT_PARTIAL` if an image could not be read.
  """
  if jax.process_count() > 1:
    raise UserError('images are segmented by one process; start it alone, with --num_processes=1')
  class_names = [name.strip() for name in classes.split(',')] if classes.strip() else []
  parse_class_names(class_names)  # before anything that takes time
  paths = _find_images(images)
  folder = OutputFolder(output, overwrite=overwrite)
  run = restored_run.open_model(workdir, checkpoint, weights=weights, runtime=runtime)
  chosen = run.parse_protocol(protocol, changes)
  predictor = Predictor.of_run(run, protocol=chosen)
  names, failures, done = _unique_names(paths), {}, {}
  predictions = predictor.stream(_read_all(paths, failures), class_names, threshold=chosen.threshold)
  folder.begin()
  for prediction in predictions:
    prediction.save(folder.path, names[prediction.key])
    if not done:
      folder.write_json('classes.json', _class_table(prediction))
    done[prediction.key] = names[prediction.key]
    print(_summarize(prediction), flush=True)
  for reason in failures.values():
    print(f'not done: {reason}', file=sys.stderr)
  folder.write_report(
    {
      'pictures': [{'picture': path, 'files': name} for path, name in sorted(done.items())],
      'failures': [{'picture': path, 'reason': reason} for path, reason in failures.items()],
      'words': class_names,
      'protocol': chosen.to_json(),
      'provenance': dict(run.provenance),
      **run_metadata(run),
    }
  )
  print(f'{len(done)} of {len(paths)} images, written to {folder.path}; {describe_run(run)}')
  return cli.EXIT_PARTIAL if failures else 0


def _find_images(pattern: str) -> list[str]:
  """The files that a pattern or a path names, sorted. Raises ValueError if there are none."""
  # A name may hold brackets: an existing path is not a pattern.
  found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
  paths = sorted(path for path in found if os.path.isfile(path))
  if not paths:
    hint = f'; for a folder write {os.path.join(pattern, "*")}' if os.path.isdir(pattern) else ''
    raise UserError(f'no image matches --images={pattern}{hint}')
  return paths


def _unique_names(paths: Sequence[str]) -> dict[str, str]:
  """The name of each image's files: see `file_name`, numbered where two are equal."""
  names: dict[str, str] = {}
  used = {'classes', 'results'}  # .json: of all images
  for path in paths:
    stem = file_name(path)
    name, number = stem, 1
    while name.casefold() in used:
      number += 1
      name = f'{stem}_{number}'
    used.add(name.casefold())
    names[path] = name
  return names


def _read_all(paths: Sequence[str], failures: dict[str, str]) -> Iterator[tuple[str, Any]]:
  """Yields (path, pixels) of the images that can be read, and the reasons of the others into `failures`."""
  for path in paths:
    readable = os.fsencode(path).decode(errors='backslashreplace')
    try:
      if readable != path:
        raise UserError(f'the name of image {readable} is not UTF-8; rename it')
      yield path, read_image(path, path)
    except ValueError as error:
      failures[readable] = str(error)


def _class_table(prediction: Prediction) -> list[dict[str, Any]]:
  """The name and colour of each value of a mask."""
  return [
    {'label': label, 'name': name, 'colour': hex_colour(colour)}
    for label, (name, colour) in enumerate(zip(prediction.classes, prediction.palette))
  ]


def _summarize(prediction: Prediction) -> str:
  """The classes of an image, largest first."""
  rows = [row for row in prediction.to_json()['classes'] if row['pixels']]
  return f'{prediction.key}: ' + ', '.join(f'{row["name"]} {row["area"]:.0%}' for row in rows)
