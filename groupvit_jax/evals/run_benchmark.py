"""What eval.py --benchmark does: score a run on labelled pictures, by a named protocol."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from etils import epath
import jax
import numpy as np

from groupvit_jax import board, distributed, sharding, trained_run
from groupvit_jax.evals import classified_sets, html_report, labelled_sets, picture_scores, plots, visualize, zero_shot
from groupvit_jax.evals.benchmarks import Benchmark
from groupvit_jax.evals.evaluator import Evaluator
from groupvit_jax.evals.output_folder import OutputFolder
from groupvit_jax.evals.picture_scores import PictureScore, PictureScores
from groupvit_jax.evals.result import Result
from groupvit_jax.evals.run_facts import choose_protocol, describe_run, run_facts, say_replaced
from groupvit_jax.evals.scene_eval import check_has_scenes, SceneEvaluator
from groupvit_jax.evals.segmenter import LabelMap
from groupvit_jax.evals.visualize import Row
from groupvit_jax.evals.window_encoder import EncodedPicture
from groupvit_jax.trained_run import TrainedRun

SCENES = 'scenes'
BENCHMARKS = (*labelled_sets.STORED_IN, labelled_sets.FOLDER, SCENES, zero_shot.IMAGENET)
_THREADS = 2
_GALLERY = 3  # pictures of each kind on a page
_PICTURES_PER_DEVICE = 64  # that are classified at a time


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked for, as it is written on the command line.

  Attributes:
    benchmark: one of `BENCHMARKS`.
    data_dir: see `labelled_sets.open_benchmark`; not looked at for 'scenes'.
    num_pictures: so many, spread evenly; 0 for all.
    protocol: its name; '' for that of the benchmark's first published figure, or the native one.
    changes: protocol parameters.
    thresholds: further background thresholds, see `parse_thresholds`.
    output: folder for results; None for the table alone.
    overwrite: see `OutputFolder`.
    masks: whether every picture's label map is written there.
    weights: as for `trained_run.open_run`.
    report: path of a page for people; None for none.
    checkpoint: 'newest', or 'best' for the one that scored best in training.
  """

  benchmark: str
  data_dir: str = ''
  num_pictures: int = 0
  protocol: str = ''
  changes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  thresholds: str = ''
  output: str | None = None
  overwrite: bool = False
  masks: bool = False
  report: str | None = None
  checkpoint: str = trained_run.NEWEST
  weights: trained_run.Weights = 'best'


def evaluate_benchmark(workdir: str, request: Request) -> int:
  """Scores a run on a benchmark and prints a table.

  With an output: results.json, table.txt, confusion.csv, pictures.json (each picture's mIoU), TensorBoard files,
  thresholds.png where thresholds were swept, and masks/KEY.png if asked for, which every host writes of its pictures.
  Figures stand beside everything that they depend on.

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
    return _classify(workdir, request)
  thresholds = parse_thresholds(request.thresholds)
  if request.masks and request.output is None:
    raise ValueError('--masks needs --output: the folder that label maps go to')
  folder = None if request.output is None else OutputFolder(request.output, overwrite=request.overwrite)
  page = None if request.report is None else _page_path(request)
  opened = open_pictures(request) if request.benchmark != SCENES else None
  run = trained_run.open_run(workdir, request.checkpoint, weights=request.weights)
  evaluator, name = _build(run, request, opened, thresholds)
  if folder:
    with distributed.first_process_first():  # whose check of the folder comes before another's masks
      if jax.process_index() == 0:
        folder.begin()
  scores = PictureScores(evaluator.source)
  painter = _Painter(folder, evaluator.benchmark) if request.masks else None

  def look(encoded: EncodedPicture, found: LabelMap) -> None:
    scores.note(encoded, found)
    if painter:
      painter.write(encoded, found)

  result = dataclasses.replace(evaluator, source=scores).evaluate(
      run.variables, on_picture=look if folder or page else None, provenance=run.provenance)
  pictures = scores.gather()
  gallery = _gallery(evaluator, run.variables, pictures) if page else {}
  if jax.process_index():
    return 0
  table = '\n'.join([result.table(), *_published(result), describe_run(run)])
  print(table)
  curve = plots.threshold_curve(result) if result.thresholds else None
  if page:
    _write_page(page, html_report.make_page(result, gallery, curve, table))
  if folder:
    say_replaced(folder)
    facts = result.to_json() | run_facts(run, result.protocol, name) | {'num_pictures_asked_for': request.num_pictures}
    _write(folder, result, facts, table, curve, pictures)
    print(f'written to {folder.path}')
  return 0


def _classify(workdir: str, request: Request) -> int:
  """Scores a run on ImageNet and prints top-1 and top-5 accuracy."""
  if request.masks or request.thresholds or request.report or request.protocol or set(request.changes) - {'templates'}:
    raise ValueError(f'--benchmark={zero_shot.IMAGENET} has neither label maps nor windows; of the parts of a '
                     'protocol it has --protocol.templates alone')
  if not request.data_dir:
    raise ValueError(f'--benchmark={zero_shot.IMAGENET} needs --data_dir: where its pictures are')
  folder = None if request.output is None else OutputFolder(request.output, overwrite=request.overwrite)
  source = labelled_sets.take(classified_sets.open_imagenet(request.data_dir), request.num_pictures)
  run = trained_run.open_run(workdir, request.checkpoint, weights=request.weights)
  evaluator = zero_shot.ZeroShotEvaluator(
      run.model, run.tokenizer, run.mesh, source, zero_shot.class_names(),
      request.changes.get('templates', zero_shot.TEMPLATES), _PICTURES_PER_DEVICE * sharding.batch_ways(run.mesh))
  if folder and jax.process_index() == 0:
    folder.begin()
  result = evaluator.evaluate(run.variables, provenance=run.provenance)
  if jax.process_index():
    return 0
  table = f'{result.table()}\n{describe_run(run)}'
  print(table)
  if folder:
    say_replaced(folder)
    facts = result.to_json() | {'checkpoint': {'step': run.step, 'damaged_newer_steps': list(run.skipped)},
                                'num_pictures_asked_for': request.num_pictures}
    folder.write_text('table.txt', table + '\n')
    _write_board(folder, result.scalars(), facts, {})
    folder.write_report(facts | {'config': json.loads(run.config.to_json())})
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
      # Rounded: a sweep's 0.15000000000000002 is 0.15.
      values = [round(first + i * step, 10) for i in range(int((last - first) / step + 1.0001))]
    else:
      values = [float(part) for part in text.split(',') if part.strip()]
  except (ValueError, ZeroDivisionError, OverflowError) as error:
    raise ValueError(f'--thresholds={text}: write FIRST:LAST:STEP or numbers between commas') from error
  if (text.strip() and not values) or any(not 0 <= value <= 1 for value in values):
    raise ValueError(f'--thresholds={text}: use values from 0 to 1, the first not above the last')
  return tuple(values)


def open_pictures(request: Request) -> tuple[Benchmark, Any]:
  """The benchmark of a request and its pictures.

  Raises:
    ValueError: there is no such benchmark, or no pictures of it.
  """
  if request.benchmark not in BENCHMARKS:
    raise ValueError(f'there is no benchmark {request.benchmark!r}; choose one of {", ".join(BENCHMARKS)}')
  if not request.data_dir:
    raise ValueError(f'--benchmark={request.benchmark} needs --data_dir: where its pictures are')
  return labelled_sets.open_benchmark(request.benchmark, request.data_dir, request.num_pictures)


def _build(
    run: TrainedRun, request: Request, opened: tuple[Benchmark, Any] | None, thresholds: tuple[float, ...]
) -> tuple[Evaluator, str]:
  """The evaluator of a request, and the name of its protocol."""
  if opened is None:
    check_has_scenes(run.config, run.workdir)
    with trained_run.complete_config(run.workdir):
      scenes = SceneEvaluator(run.config, run.model, run.tokenizer, run.mesh, split='test').evaluator
    opened, num_threads = (scenes.benchmark, labelled_sets.take(scenes.source, request.num_pictures)), 0
  else:
    num_threads = _THREADS
  benchmark, source = opened
  name = request.protocol or labelled_sets.default_protocol(benchmark)
  protocol = benchmark.fix_threshold(choose_protocol(run, name, request.changes))
  if thresholds and not benchmark.background:
    raise ValueError(f'{benchmark.name} has no background, so no threshold changes anything; leave out --thresholds')
  evaluator = Evaluator(run.model, run.tokenizer, run.mesh, source, benchmark, protocol, num_threads, thresholds)
  return evaluator, name


class _Painter:
  """Writes label maps as indexed PNGs in the benchmark's colours."""

  def __init__(self, folder: OutputFolder, benchmark: Benchmark):
    self._folder, self._palette = folder, benchmark.palette
    folder.make('masks')

  def write(self, encoded: EncodedPicture, found: LabelMap) -> None:
    name = encoded.picture.key.replace('/', '_')
    self._folder.write_picture(f'masks/{name}.png', visualize.mask_image(found.labels, self._palette))


def _page_path(request: Request) -> epath.Path:
  """Where the page goes. Raises ValueError if something else is there."""
  path = epath.Path(request.report)
  if path.suffix not in ('.html', '.htm'):
    raise ValueError(f'--report={path} is no name of a page; end it in .html')
  if path.exists() and not request.overwrite and html_report.MARK not in path.read_text()[:200]:
    raise ValueError(f'--report={path} is a file that eval.py did not write; name another, or add --overwrite')
  return path


def _gallery(
    evaluator: Evaluator, variables: dict, pictures: Sequence[PictureScore]
) -> dict[str, list[tuple[str, float, Row]]]:
  """The best, median and worst pictures, and what there is to see of each."""
  chosen = picture_scores.pick([picture.miou for picture in pictures], _GALLERY)
  places = [place for kind in chosen.values() for place in kind]
  rows = dict(zip(places, evaluator.rows(variables, places))) if places else {}
  return {kind: [(*pictures[place], rows[place]) for place in found] for kind, found in chosen.items()}


def _write_page(path: epath.Path, page: str) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
  except OSError as error:
    raise OSError(f'cannot write {path}: {error.strerror or error}; name another --report') from error
  print(f'a page for people: {path}')


def _published(result: Result) -> list[str]:
  """The papers' figures in percent, one a line, and whether this is their protocol."""
  same = not result.protocol.to_json()['changed'] or result.protocol.to_json()['changed'] == ['threshold']
  return [
      f'published ({row.protocol}, GroupViT-S/16 of {row.training_data}): mIoU {row.miou:.1f}'
      + ('' if row.protocol == result.protocol.name and same else '; another protocol')
      for row in result.benchmark.published]


def _write(
    folder: OutputFolder, result: Result, facts: Mapping[str, Any], table: str, curve: np.ndarray | None,
    pictures: Sequence[PictureScore]
) -> None:
  """Everything but masks."""
  folder.write_text('table.txt', table + '\n')
  folder.write_text('confusion.csv', result.confusion_csv())
  folder.write_json('pictures.json', {key: None if np.isnan(miou) else miou for key, miou in pictures})
  if curve is not None:
    folder.write_picture('thresholds.png', curve)
  _write_board(folder, result.scalars(), facts, {} if curve is None else {'thresholds': curve})
  folder.write_report(facts)


def _write_board(
    folder: OutputFolder, scalars: Mapping[str, float], facts: Mapping[str, Any], pictures: Mapping[str, np.ndarray]
) -> None:
  """TensorBoard's figures, and beside them what they depend on."""
  prefix = f'eval/{facts["benchmark"]}'
  named = lambda values: {f'{prefix}/{key}': value for key, value in values.items()}
  settings = json.dumps({key: value for key, value in facts.items() if key != 'config'}, indent=2)
  board.write_board(epath.Path(folder.path) / 'tensorboard', int(facts['checkpoint']['step']),
                      figures=named(scalars), texts={f'{prefix}/settings': settings}, pictures=named(pictures))
