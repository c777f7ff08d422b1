"""What eval.py does with labelled pictures, its own scenes among them: score a run, by a named protocol."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

from etils import epath
import jax
import ml_collections
import numpy as np

from groupvit_jax.commands import imagenet
from groupvit_jax.commands.request import BENCHMARKS, Request, SCENES
from groupvit_jax.commands.run_metadata import choose_protocol, describe_run, run_facts, say_replaced, write_board
from groupvit_jax.errors import ResourceError, UserError
from groupvit_jax.eval import draw, image_scores, labelled, plots, report, scenes, windows, zero_shot
from groupvit_jax.eval.benchmarks import Benchmark
from groupvit_jax.eval.draw import Row
from groupvit_jax.eval.evaluator import Evaluator
from groupvit_jax.eval.image_scores import PictureScore, PictureScores
from groupvit_jax.eval.labeller import LabelMap
from groupvit_jax.eval.output_folder import OutputFolder
from groupvit_jax.eval.result import Result, SCORES
from groupvit_jax.eval.window_encoder import EncodedPicture
from groupvit_jax.running import processes
from groupvit_jax.train import open_run
from groupvit_jax.train.open_run import TrainedRun

_SHOWN_SCENES = 6
_GALLERY = 3  # pictures of each kind on a page
_MOST_THRESHOLDS = 200  # each has a confusion matrix of its own on the devices


def evaluate_benchmark(workdir: str, request: Request) -> int:
  """Scores a run on a benchmark and prints a table.

  With an output: results.json, table.txt, confusion.csv, pictures.json (each picture's mIoU), TensorBoard files,
  thresholds.png where thresholds were swept, scenes.png of the run's own scenes, and masks/KEY.png if asked for, which
  every host writes of its pictures. Figures stand beside everything that they depend on.

  Args:
    workdir: of the run.
    request: what is asked for.

  Returns:
    The exit code.

  Raises:
    ValueError: the request has a mistake; nothing was written.
    OSError: the results cannot be written.
  """
  if request.benchmark == zero_shot.IMAGENET:
    return imagenet.evaluate_imagenet(workdir, request)
  thresholds = parse_thresholds(request.thresholds)
  if request.masks and request.output is None:
    raise UserError('--masks needs --output: the folder that label maps go to')
  folder = None if request.output is None else OutputFolder(request.output, overwrite=request.overwrite)
  page = None if request.report is None else _page_path(request)
  opened = open_pictures(request) if request.benchmark != SCENES else None
  run = open_run.open_run(workdir, request.checkpoint, weights=request.weights)
  evaluator = _build(run, request, opened, thresholds)
  if folder:
    with processes.first_process_first():  # whose check of the folder comes before another's masks
      if jax.process_index() == 0:
        folder.begin()
  scores = PictureScores(evaluator.source)
  painter = _Painter(folder, evaluator.benchmark) if request.masks else None

  def look(encoded: EncodedPicture, found: LabelMap) -> None:
    scores.note(encoded, found)
    if painter:
      painter.write(encoded, found)

  result = dataclasses.replace(evaluator, source=scores).evaluate(
    run.variables, on_picture=look if folder or page else None, provenance=run.provenance
  )
  pictures = scores.gather()
  gallery = _gallery(evaluator, run.variables, pictures) if page else {}
  more = compare(run, evaluator, result) if opened is None else Comparison((), {}, None)
  if jax.process_index():
    return 0
  table = '\n'.join([result.table(), *more.lines, *_published(result), describe_run(run)])
  print(table)
  curve = plots.threshold_curve(result) if result.thresholds else None
  if page:
    _write_page(page, report.make_page(result, gallery, curve, table))
  if folder:
    say_replaced(folder)
    facts = result.to_json() | more.facts | run_facts(run) | {'num_pictures_asked_for': request.num_pictures}
    if more.panel is not None:
      folder.write_picture('scenes.png', more.panel)
    _write(folder, result, facts, table, curve, pictures)
    print(f'written to {folder.path}')
  return 0


def parse_thresholds(text: str) -> tuple[float, ...]:
  """Thresholds of '0.05:0.95:0.05' (first, last, step) or '0.3,0.5'; none of ''.

  Raises:
    ValueError: it is neither, or a threshold is not between 0 and 1.
  """
  try:
    if ':' in text:
      first, last, step = map(float, text.split(':'))
      count = int((last - first) / step + 1.0001)
      # Rounded: a sweep's 0.15000000000000002 is 0.15.
      values = [round(first + i * step, 10) for i in range(min(count, _MOST_THRESHOLDS + 1))]
    else:
      values = [float(part) for part in text.split(',') if part.strip()]
  except (ValueError, ZeroDivisionError, OverflowError) as error:
    raise UserError(f'--thresholds={text}: write FIRST:LAST:STEP or numbers between commas') from error
  if (text.strip() and not values) or any(not 0 <= value <= 1 for value in values):
    raise UserError(f'--thresholds={text}: use values from 0 to 1, the first not above the last')
  if len(values) > _MOST_THRESHOLDS:
    raise UserError(f'--thresholds={text} are more than {_MOST_THRESHOLDS}; use a larger step')
  return tuple(values)


def open_pictures(request: Request) -> tuple[Benchmark, Any]:
  """The benchmark of a request and its pictures.

  Raises:
    ValueError: there is no such benchmark, or no pictures of it.
  """
  if request.benchmark not in BENCHMARKS:
    raise UserError(f'there is no benchmark {request.benchmark!r}; choose one of {", ".join(BENCHMARKS)}')
  if not request.data_dir:
    raise UserError(f'--benchmark={request.benchmark} needs --data_dir: where its pictures are')
  return labelled.open_benchmark(request.benchmark, request.data_dir, request.num_pictures)


def _build(
  run: TrainedRun, request: Request, opened: tuple[Benchmark, Any] | None, thresholds: tuple[float, ...]
) -> Evaluator:
  """The evaluator of a request."""
  if opened is None:
    check_has_scenes(run.config, run.workdir)
    with open_run.complete_config(run.workdir):
      benchmark, source = scenes.open_scenes(run.config, scenes.TEST)
    source, num_threads = labelled.take(source, request.num_pictures), 0
  else:
    benchmark, source = opened
    num_threads = windows.decode_threads()
  name = request.protocol or labelled.default_protocol(benchmark)
  protocol = benchmark.fix_threshold(choose_protocol(run, name, request.changes))
  if thresholds and not benchmark.background:
    raise UserError(f'{benchmark.name} has no background, so no threshold changes anything; leave out --thresholds')
  return Evaluator(run.model, run.tokenizer, run.mesh, source, benchmark, protocol, num_threads, thresholds)


class _Painter:
  """Writes label maps as indexed PNGs in the benchmark's colours."""

  def __init__(self, folder: OutputFolder, benchmark: Benchmark):
    self._folder, self._palette = folder, benchmark.palette
    folder.make('masks')

  def write(self, encoded: EncodedPicture, found: LabelMap) -> None:
    name = encoded.picture.key.replace('/', '_')
    self._folder.write_picture(f'masks/{name}.png', draw.mask_image(found.labels, self._palette))


def _page_path(request: Request) -> epath.Path:
  """Where the page goes. Raises ValueError if something else is there."""
  path = epath.Path(request.report)
  if path.suffix not in ('.html', '.htm'):
    raise UserError(f'--report={path} is no name of a page; end it in .html')
  if path.exists() and not request.overwrite and report.MARK not in path.read_text()[:200]:
    raise UserError(f'--report={path} is a file that eval.py did not write; name another, or add --overwrite')
  return path


def _gallery(
  evaluator: Evaluator, variables: dict, pictures: Sequence[PictureScore]
) -> dict[str, list[tuple[str, float, Row]]]:
  """The best, median and worst pictures, and what there is to see of each."""
  chosen = image_scores.pick([picture.miou for picture in pictures], _GALLERY)
  places = [place for kind in chosen.values() for place in kind]
  rows = dict(zip(places, evaluator.rows(variables, places))) if places else {}
  return {kind: [(*pictures[place], rows[place]) for place in found] for kind, found in chosen.items()}


def _write_page(path: epath.Path, page: str) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
  except OSError as error:
    raise ResourceError(f'cannot write {path}: {error.strerror or error}; name another --report') from error
  print(f'a page for people: {path}')


def _published(result: Result) -> list[str]:
  """The papers' figures in percent, one a line, and what keeps them from being comparable."""
  return [
    '; '.join(
      filter(
        None,
        [f'published ({row.protocol}, GroupViT-S/16 of {row.training_data}): mIoU {row.miou:.1f}', result.unlike(row)],
      )
    )
    for row in result.benchmark.published
  ]


def _write(
  folder: OutputFolder,
  result: Result,
  facts: Mapping[str, Any],
  table: str,
  curve: np.ndarray | None,
  pictures: Sequence[PictureScore],
) -> None:
  """Everything but masks."""
  folder.write_text('table.txt', table + '\n')
  folder.write_text('confusion.csv', result.confusion_csv())
  folder.write_json('pictures.json', {key: None if np.isnan(miou) else miou for key, miou in pictures})
  if curve is not None:
    folder.write_picture('thresholds.png', curve)
  write_board(folder, result.scalars(), facts, {} if curve is None else {'thresholds': curve})
  folder.write_report(facts)


class Comparison(NamedTuple):
  """What a score of scenes stands beside."""

  lines: tuple[str, ...]  # of the table
  facts: dict[str, Any]  # of the report
  panel: np.ndarray | None  # some scenes, uint8 [H, W, 3]


def compare(run: TrainedRun, evaluator: Evaluator, result: Result) -> Comparison:
  """A run's result on its test scenes beside what it has to beat: one class for everything, and the untrained model.

  The latter is left out where the weights that a run started from are gone.
  """
  scores = result.scalars()
  baselines = {'constant': {'class': result.constant[0]} | {name: scores[f'constant_{name}'] for name in SCORES}}
  try:
    variables = open_run.untrained_variables(run)
  except ValueError as error:
    line = f'the untrained model is left out: {error}'
  else:
    untrained = evaluator.evaluate(variables).scalars()
    baselines['untrained'] = {name: untrained[name] for name in (*SCORES, *(f'oracle_{name}' for name in SCORES))}
    line = f'the untrained model: mIoU {untrained["miou"]:.1%}, pixel accuracy {untrained["pixel_accuracy"]:.1%}'
  rows = evaluator.rows(run.variables, range(min(_SHOWN_SCENES, len(evaluator.source))))
  panel = draw.draw_panel(rows, evaluator.benchmark.palette, evaluator.benchmark.classes)
  return Comparison((line,), {'split': scenes.TEST, 'baselines': baselines}, panel)


def check_has_scenes(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
  """Raises ValueError for a run that was not trained on scenes, such as one of imported weights."""
  if 'source' not in config.data or config.data.source != 'scenes':
    raise UserError(
      f'the run in {workdir} has no held-out scenes; name pictures with --images, or labelled ones with '
      '--benchmark and --data_dir'
    )
