"""Scores a run on labelled images: eval.py --benchmark, for benchmarks, ImageNet and the run's held-out scenes."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any, NamedTuple

from etils import epath
import jax
import ml_collections
import numpy as np

from groupvit_jax import storage
from groupvit_jax.errors import UserError
from groupvit_jax.eval import draw, labelled, protocols, report, zero_shot
from groupvit_jax.eval.benchmarks import Benchmark
from groupvit_jax.eval.class_names import find_names
from groupvit_jax.eval.draw import Row
from groupvit_jax.eval.evaluator import Evaluator, image_miou
from groupvit_jax.eval.labeller import LabelMap
from groupvit_jax.eval.output_folder import OutputFolder
from groupvit_jax.eval.result import Result, SCORES
from groupvit_jax.eval.window_encoder import EncodedWindows
from groupvit_jax.running import processes
from groupvit_jax.train import restored_run
from groupvit_jax.train.restored_run import RestoredRun

BENCHMARKS = (*labelled.STORED_IN, labelled.FOLDER, labelled.SCENES, labelled.IMAGENET)
_SHOWN_SCENES = 6
_GALLERY = 3  # images of each kind on a page
_MAX_THRESHOLDS = 200  # each has a confusion matrix of its own on the devices


@dataclasses.dataclass(frozen=True)
class Request:
  """The flags of eval.py about labelled images.

  Attributes:
    benchmark: one of `BENCHMARKS`; 'scenes' are those that the run itself holds out for testing.
    data_dir: where TFDS data sets are kept, of 'folder' the folder itself, of 'imagenet' perhaps a pattern of tars; see
      `labelled.open_benchmark` and `labelled.open_imagenet`. 'scenes' have none.
    num_pictures: so many images, spread evenly; 0 for all.
    protocol: its name; '' for `labelled.default_protocol`. Of 'imagenet' always ''.
    class_names: see `class_names.find_names`; '' for those of the protocol. Of 'imagenet' always ''.
    changes: protocol parameters as people write them; of 'imagenet' `templates` alone.
    thresholds: further background thresholds, see `parse_thresholds`; not of 'imagenet'.
    output: folder for results; None for the table alone.
    overwrite: see `OutputFolder`; also whether `report` may replace a file that is no such page.
    masks: whether every image's label map is written to `output`; not of 'imagenet'.
    report: path of an HTML page; None for none; not of 'imagenet'.
    checkpoint: as for `restored_run.restore`.
    weights: likewise.
    runtime: likewise.
  """

  benchmark: str
  data_dir: str = ''
  num_pictures: int = 0
  protocol: str = ''
  class_names: str = ''
  changes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  thresholds: str = ''
  output: str | None = None
  overwrite: bool = False
  masks: bool = False
  report: str | None = None
  checkpoint: str = restored_run.NEWEST
  weights: restored_run.Weights = 'best'
  runtime: str | None = None


def evaluate_benchmark(workdir: str, request: Request) -> int:
  """Scores a run on a benchmark and prints a table.

  With an output: results.json, table.txt, confusion.csv, pictures.json (each image's mIoU), TensorBoard files,
  thresholds.png where thresholds were swept, scenes.png of the run's own scenes, and masks/KEY.png if asked for, which
  every process writes of its images. Metrics stand beside everything that they depend on.

  Args:
    workdir: of the run.
    request: the flags.

  Returns:
    The exit code.

  Raises:
    ValueError: the request has a mistake; nothing was written.
    OSError: the results cannot be written.
  """
  if request.benchmark == labelled.IMAGENET:
    return evaluate_imagenet(workdir, request)
  thresholds = parse_thresholds(request.thresholds)
  if request.masks and request.output is None:
    raise UserError('--masks needs --output: the folder that label maps go to')
  folder = None if request.output is None else OutputFolder(request.output, overwrite=request.overwrite)
  page = None if request.report is None else page_path(request)
  opened = open_images(request) if request.benchmark != labelled.SCENES else None
  run = restored_run.open_model(workdir, request.checkpoint, weights=request.weights, runtime=request.runtime)
  evaluator = _build(run, request, opened, thresholds)
  if folder:
    with processes.first_process_first():  # whose check of the folder comes before another's masks
      if jax.process_index() == 0:
        folder.begin()
      if request.masks:
        folder.make('masks')
  scores: list[tuple[int, str, float]] = []  # index, key and mIoU of this process's images

  def keep(encoded: EncodedWindows, label_map: LabelMap) -> None:
    image = encoded.image
    scores.append((image.index, image.key, image_miou(image.label, label_map.labels, evaluator.benchmark.num_classes)))
    if request.masks:
      mask = draw.mask_image(label_map.labels, evaluator.benchmark.palette)
      folder.write_image(f'masks/{mask_name(image.key)}.png', mask)

  result = evaluator.evaluate(run.variables, on_image=keep if folder or page else None, provenance=run.provenance)
  scored = [
    (key, miou) for _, key, miou in sorted(row for rows in processes.all_gather_objects(scores) for row in rows)
  ]
  gallery = _gallery(evaluator, run.variables, scored) if page else {}
  baselines = compare(run, evaluator, result) if opened is None else Comparison((), {}, None)
  if jax.process_index():
    return 0
  table = '\n'.join([result.table(), *baselines.lines, *_published(result), describe_run(run)])
  print(table)
  curve = report.threshold_curve(result) if result.thresholds else None
  if page:
    write_page(page, report.make_page(result, gallery, curve, table))
  if folder:
    metadata = result.to_json() | baselines.metadata
    folder.write_text('confusion.csv', result.confusion_csv())
    folder.write_json('pictures.json', {key: None if np.isnan(miou) else miou for key, miou in scored})
    images = {'scenes': baselines.panel, 'thresholds': curve}
    for name, image in images.items():
      if image is not None:
        folder.write_image(f'{name}.png', image)
    _write_results(folder, run, request, result, metadata, table, {} if curve is None else {'thresholds': curve})
  return 0


def evaluate_imagenet(workdir: str, request: Request) -> int:
  """Scores a run on ImageNet and prints top-1 and top-5 accuracy; see `evaluate_benchmark`."""
  flags = request.masks, request.thresholds, request.report, request.protocol, request.class_names
  if any(flags) or set(request.changes) - {'templates'}:
    raise UserError(zero_shot.NO_PROTOCOL)
  check_data_dir(request)
  folder = None if request.output is None else OutputFolder(request.output, overwrite=request.overwrite)
  source = labelled.take(labelled.open_imagenet(request.data_dir), request.num_pictures)
  run = restored_run.open_model(workdir, request.checkpoint, weights=request.weights, runtime=request.runtime)
  templates = request.changes.get('templates', zero_shot.TEMPLATES)
  evaluator = zero_shot.build_evaluator(run.model, run.tokenizer, run.mesh, source, templates)
  if folder and jax.process_index() == 0:
    folder.begin()
  result = evaluator.evaluate(run.variables, provenance=run.provenance)
  if jax.process_index():
    return 0
  table = f'{result.table()}\n{describe_run(run)}'
  print(table)
  if folder:
    _write_results(folder, run, request, result, result.to_json(), table, {})
  return 0


def run_metadata(run: RestoredRun) -> dict[str, Any]:
  """The checkpoint and the config of a run, for reports."""
  return {
    'checkpoint': {'step': run.step, 'damaged_newer_steps': list(run.skipped)},
    'config': json.loads(run.config.to_json()),
  }


def describe_run(run: RestoredRun) -> str:
  """The checkpoint, the code and the precision, in a line."""
  provenance = run.provenance
  line = (
    f'checkpoint {provenance["workdir"]} step {provenance["step"]}, weights {provenance["weights"]}, '
    f'code {provenance["code"]}, {provenance["precision"]}'
  )
  damaged = ', '.join(map(str, run.skipped))
  return f'{line}; step {damaged} is newer but damaged' if damaged else line


def mask_name(key: str) -> str:
  """The name of an image's mask, another one for each image: 'a/b' is 'a%2Fb'."""
  return key.replace('%', '%25').replace('/', '%2F')


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
      values = [round(first + i * step, 10) for i in range(min(count, _MAX_THRESHOLDS + 1))]
    else:
      values = [float(part) for part in text.split(',') if part.strip()]
  except (ValueError, ZeroDivisionError, OverflowError) as error:
    raise UserError(f'--thresholds={text}: write FIRST:LAST:STEP or numbers between commas') from error
  if (text.strip() and not values) or any(not 0 <= value <= 1 for value in values):
    raise UserError(f'--thresholds={text}: use values from 0 to 1, the first not above the last')
  if len(values) > _MAX_THRESHOLDS:
    raise UserError(f'--thresholds={text} are more than {_MAX_THRESHOLDS}; use a larger step')
  return tuple(values)


def open_images(request: Request) -> tuple[Benchmark, labelled.LabelledSource]:
  """The benchmark of a request and its images. Raises ValueError if there is no such benchmark, or no images of it."""
  if request.benchmark not in BENCHMARKS:
    raise UserError(f'there is no benchmark {request.benchmark!r}; choose one of {", ".join(BENCHMARKS)}')
  check_data_dir(request)
  return labelled.open_benchmark(request.benchmark, request.data_dir, request.num_pictures)


def check_data_dir(request: Request) -> None:
  if not request.data_dir:
    raise UserError(f'--benchmark={request.benchmark} needs --data_dir: where its images are')


def _build(
  run: RestoredRun,
  request: Request,
  opened: tuple[Benchmark, labelled.LabelledSource] | None,
  thresholds: tuple[float, ...],
) -> Evaluator:
  """The evaluator of a request; `opened` is None for the run's own scenes."""
  if opened is None:
    (benchmark, source), num_threads = open_scenes(run, request), 0
  else:
    benchmark, source = opened
    num_threads = labelled.decode_threads()
  protocol = run.parse_protocol(request.protocol or labelled.default_protocol(benchmark), request.changes)
  if request.class_names:
    protocol = protocols.override(protocol, {'class_names': request.class_names})
  protocol = benchmark.fix_threshold(protocol)
  find_names(benchmark, protocol.class_names)  # before anything is written
  if thresholds and not benchmark.background:
    raise UserError(f'{benchmark.name} has no background, so no threshold changes anything; leave out --thresholds')
  return Evaluator(run.model, run.tokenizer, run.mesh, source, benchmark, protocol, num_threads, thresholds)


def open_scenes(run: RestoredRun, request: Request) -> tuple[Benchmark, labelled.LabelledSource]:
  """The test scenes of a run. Raises ValueError if it has none."""
  check_has_scenes(run.config, run.workdir)
  with restored_run.complete_config(run.workdir):
    benchmark, source = labelled.open_scenes(run.config, labelled.TEST)
  return benchmark, labelled.take(source, request.num_pictures)


def page_path(request: Request) -> epath.Path:
  """The path of the HTML page. Raises ValueError if another file is there."""
  path = epath.Path(request.report)
  if path.suffix not in ('.html', '.htm'):
    raise UserError(f'--report={path} is no name of a page; end it in .html')
  if path.exists() and not request.overwrite and report.MARK not in path.read_text()[:200]:
    raise UserError(f'--report={path} is a file that eval.py did not write; name another, or add --overwrite')
  return path


def _gallery(
  evaluator: Evaluator, variables: dict, scored: Sequence[tuple[str, float]]
) -> dict[str, list[tuple[str, float, Row]]]:
  """Key, mIoU and row of tiles of the best, median and worst images."""
  chosen = report.pick_images([miou for _, miou in scored], _GALLERY)
  indices = [index for kind in chosen.values() for index in kind]
  rows = dict(zip(indices, evaluator.rows(variables, indices))) if indices else {}
  return {kind: [(*scored[index], rows[index]) for index in found] for kind, found in chosen.items()}


def write_page(path: epath.Path, page: str) -> None:
  with storage.writing(path, 'name another --report'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)
  print(f'a page for people: {path}')


def _published(result: Result) -> list[str]:
  """The published results in percent, one a line, and how they differ from this one."""
  lines = []
  for row in result.benchmark.published:
    line = f'published ({row.title}): mIoU {row.scores[result.benchmark.name]:.1f}'
    lines.append('; '.join(filter(None, [line, result.unlike(row)])))
  return lines


def _write_results(
  folder: OutputFolder,
  run: RestoredRun,
  request: Request,
  result: Result | zero_shot.Result,
  metadata: Mapping[str, Any],
  table: str,
  images: Mapping[str, np.ndarray],
) -> None:
  """Writes the table, TensorBoard's files and, last of all, the report."""
  metadata = {**metadata, **run_metadata(run), 'num_pictures_asked_for': request.num_pictures}
  folder.write_text('table.txt', table + '\n')
  named = lambda values: {f'eval/{metadata["benchmark"]}/{key}': value for key, value in values.items()}
  settings = json.dumps({key: value for key, value in metadata.items() if key != 'config'}, indent=2)
  folder.write_board(run.step, named(result.scalars()), named({'settings': settings}), named(images))
  folder.write_report(metadata)
  print(f'written to {folder.path}')


class Comparison(NamedTuple):
  """Baselines of a score of scenes."""

  lines: tuple[str, ...]  # of the table
  metadata: dict[str, Any]  # of the report
  panel: np.ndarray | None  # some scenes, uint8 [H, W, 3]


def compare(run: RestoredRun, evaluator: Evaluator, result: Result) -> Comparison:
  """The baselines of a run's result on its test scenes: one class for everything, and the untrained model.

  The latter is left out where the weights that a run started from are gone.
  """
  scores = result.scalars()
  baselines = {'constant': {'class': result.constant[0]} | {name: scores[f'constant_{name}'] for name in SCORES}}
  try:
    variables = restored_run.untrained_variables(run)
  except ValueError as error:
    line = f'the untrained model is left out: {error}'
  else:
    untrained = evaluator.evaluate(variables).scalars()
    baselines['untrained'] = {name: untrained[name] for name in (*SCORES, *(f'oracle_{name}' for name in SCORES))}
    line = f'the untrained model: mIoU {untrained["miou"]:.1%}, pixel accuracy {untrained["pixel_accuracy"]:.1%}'
  rows = evaluator.rows(run.variables, range(min(_SHOWN_SCENES, len(evaluator.source))))
  panel = draw.draw_panel(rows, evaluator.benchmark.palette, evaluator.benchmark.classes)
  return Comparison((line,), {'split': labelled.TEST, 'baselines': baselines}, panel)


def check_has_scenes(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
  """Raises ValueError for a run that was not trained on scenes, such as one of imported weights."""
  if 'source' not in config.data or config.data.source != 'scenes':
    raise UserError(
      f'the run in {workdir} has no held-out scenes; name images with --images, or labelled ones with '
      '--benchmark and --data_dir'
    )
