"""Scores a run on every benchmark found, by several protocols and class names: one table beside published results."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any, NamedTuple

import jax

from groupvit_jax.commands import score
from groupvit_jax.commands.score import Request
from groupvit_jax.data import prompts
from groupvit_jax.errors import UserError
from groupvit_jax.eval import labelled, protocols, report, zero_shot
from groupvit_jax.eval.benchmarks import Benchmark, find_benchmark, load_published
from groupvit_jax.eval.class_names import find_names, NameSet, POOLING
from groupvit_jax.eval.evaluator import build_scoring, evaluate, windows_per_batch
from groupvit_jax.eval.output_folder import OutputFolder
from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.running import processes
from groupvit_jax.train import restored_run
from groupvit_jax.train.restored_run import RestoredRun

ALL = 'all'
PROTOCOLS = ('groupvit', 'tcl', 'tcl+pamr')  # of ALL by default: their windows are the same
_SCORES = 'scores'  # in the output folder: a file per entry


@dataclasses.dataclass(frozen=True)
class Entry:
  """A number of the table.

  Attributes:
    benchmark: its name.
    settings: everything that the number depends on, as its file has it.
    scored: classes, protocol and names; None of ImageNet.
  """

  benchmark: str
  settings: dict[str, Any]
  scored: tuple[Benchmark, Protocol, NameSet] | None

  @property
  def path(self) -> str:
    """Its file in the output folder."""
    if self.scored is None:
      return f'{_SCORES}/{self.benchmark}.json'
    _, protocol, names = self.scored
    return f'{_SCORES}/{self.benchmark}/{protocol.name}/{score.mask_name(names.name)}.json'

  def is_of(self, found: object) -> bool:
    """Whether a file's content is this entry's result."""
    return isinstance(found, dict) and all(found.get(key) == value for key, value in self.settings.items())


class Unit(NamedTuple):
  """Entries that share images and their encodings."""

  source: labelled.LabelledSource
  entries: list[Entry]


def score_all(workdir: str, request: Request) -> int:
  """Scores a run by every protocol and set of names asked for, and prints a table in Markdown.

  With an output: table.md, results.json, and scores/BENCHMARK/PROTOCOL/NAMES.json, written when the images are done.
  A further call into the same output scores only what is not there, or was scored otherwise.

  Args:
    workdir: of the run.
    request: the flags. `benchmark` may be `ALL`: every one whose images are in `data_dir`. `protocol` and `class_names`
      may name several, between commas.

  Returns:
    The exit code.

  Raises:
    ValueError: the request has a mistake; nothing was written.
    OSError: the results cannot be written.
  """
  if request.masks or request.thresholds:
    raise UserError('--masks and --thresholds are of one benchmark, protocol and set of names; leave them out')
  folder = None if request.output is None else OutputFolder(request.output, overwrite=request.overwrite)
  page = None if request.report is None else score.page_path(request)
  run = restored_run.open_model(workdir, request.checkpoint, weights=request.weights, runtime=request.runtime)
  units, absent = _find_units(run, request)
  entries = [entry for unit in units for entry in unit.entries]
  done = processes.all_gather_objects(_read_done(folder, entries) if folder and not jax.process_index() else {})[0]
  if folder and jax.process_index() == 0:
    folder.begin(keep=list(done))
  for unit in units:
    todo = [entry for entry in unit.entries if entry.path not in done]
    for entry, found in zip(todo, _score(run, request, unit.source, todo) if todo else (), strict=True):
      done[entry.path] = found | entry.settings
      if folder and jax.process_index() == 0:
        folder.make(entry.path.rpartition('/')[0])
        folder.write_json(entry.path, done[entry.path])
  if jax.process_index():
    return 0
  columns = list(dict.fromkeys(entry.benchmark for entry in entries))
  rows = [*_own_rows(entries, done), *_published_rows(columns)]
  notes = [*_notes(entries, absent), score.describe_run(run)]
  text = '\n'.join([*_markdown(columns, rows), '', *(f'{note}\n' for note in notes)])
  print(text)
  if page:
    cells = [(row.kind, row.texts, [_percent(row.scores.get(column)) for column in columns]) for row in rows]
    score.write_page(page, report.make_table_page(_TITLE, (*_HEADER, *columns), cells, notes))
  if folder:
    folder.write_text('table.md', text)
    metadata = {'benchmark': request.benchmark, 'rows': [row._asdict() for row in rows], 'not_found': absent}
    folder.write_report(metadata | score.run_metadata(run) | {'num_pictures_asked_for': request.num_pictures})
    print(f'written to {folder.path}')
  return 0


def _find_units(run: RestoredRun, request: Request) -> tuple[list[Unit], list[str]]:
  """What to score, images that are cut alike together; and the data sets that are not there."""
  if request.benchmark == labelled.IMAGENET:
    raise UserError(zero_shot.NO_PROTOCOL)
  if request.benchmark != ALL:
    opened = score.open_scenes(run, request) if request.benchmark == labelled.SCENES else score.open_images(request)
    benchmark, source = opened
    return _split(run, request, source, [(benchmark, (labelled.default_protocol(benchmark),))]), []
  score.check_data_dir(request)
  units, absent = [], []
  for stored in dict.fromkeys(labelled.STORED_IN.values()):
    benchmarks = [find_benchmark(name) for name, place in labelled.STORED_IN.items() if place == stored]
    if labelled.is_stored(stored, request.data_dir):
      source = labelled.take(labelled.open_prepared(benchmarks[0], request.data_dir), request.num_pictures)
      units += _split(run, request, source, [(benchmark, PROTOCOLS) for benchmark in benchmarks])
    else:
      absent.append(stored)
  if labelled.is_stored(labelled.IMAGENET_STORED_IN, request.data_dir):
    units.append(_imagenet(run, request))
  else:
    absent.append(labelled.IMAGENET_STORED_IN)
  if not units:
    raise UserError(
      f'--data_dir={request.data_dir} holds none of {", ".join(absent)}; make them with python -m groupvit_jax.prepare'
    )
  return units, absent


def _split(
  run: RestoredRun,
  request: Request,
  source: labelled.LabelledSource,
  benchmarks: Sequence[tuple[Benchmark, Sequence[str]]],
) -> list[Unit]:
  """The entries of benchmarks, which come with their protocols by default, in units of one way to cut images."""
  units: dict[tuple, Unit] = {}
  for benchmark, default in benchmarks:
    for name in _listed(request.protocol) or default:
      protocol = run.parse_protocol(name, request.changes)
      for names in _listed(request.class_names) or [protocol.class_names]:
        chosen = benchmark.fix_threshold(protocols.override(protocol, {'class_names': names}))
        found = find_names(benchmark, names)
        settings = {'protocol': json.loads(json.dumps(chosen.to_json())), **found.to_json()}
        entry = _make_entry(run, request, benchmark.name, source, settings, (benchmark, chosen, found))
        units.setdefault(chosen.cut, Unit(source, [])).entries.append(entry)
  return list(units.values())


def _imagenet(run: RestoredRun, request: Request) -> Unit:
  source = labelled.take(labelled.open_imagenet(request.data_dir), request.num_pictures)
  templates = {'templates': list(prompts.template_set(_templates(request)))}
  return Unit(source, [_make_entry(run, request, labelled.IMAGENET, source, templates, None)])


def _templates(request: Request) -> str:
  """The name of ImageNet's set of templates."""
  return request.changes.get('templates', zero_shot.TEMPLATES)


def _listed(text: str) -> list[str]:
  return [part.strip() for part in text.split(',') if part.strip()]


def _make_entry(
  run: RestoredRun,
  request: Request,
  benchmark: str,
  source: labelled.LabelledSource,
  settings: dict[str, Any],
  scored: tuple[Benchmark, Protocol, NameSet] | None,
) -> Entry:
  asked = {'data_dir': request.data_dir, 'num_images': len(source), 'provenance': dict(run.provenance)}
  return Entry(benchmark, {'benchmark': benchmark, **settings, **asked}, scored)


def _read_done(folder: OutputFolder, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
  """The finished entries in a folder, by path."""
  found = {entry.path: folder.read_json(entry.path) for entry in entries}
  return {entry.path: found[entry.path] for entry in entries if entry.is_of(found[entry.path])}


def _score(
  run: RestoredRun, request: Request, source: labelled.LabelledSource, entries: Sequence[Entry]
) -> list[dict[str, Any]]:
  """The results of entries, all in one pass over the images."""
  if entries[0].scored is None:
    evaluator = zero_shot.build_evaluator(run.model, run.tokenizer, run.mesh, source, _templates(request))
    return [evaluator.evaluate(run.variables, provenance=run.provenance).to_json()]
  scorings = []
  for benchmark, protocol, _ in (entry.scored for entry in entries):
    raw = {} if source.classes else {'train_labels': benchmark.train_labels}
    scorings.append(build_scoring(run.model, run.variables, run.tokenizer, benchmark, protocol, **raw))
  batch_size = windows_per_batch(run.mesh, scorings[0].protocol.window)
  options = dict(batch_size=batch_size, mesh=run.mesh, num_threads=labelled.decode_threads(), provenance=run.provenance)
  return [result.to_json() for result in evaluate(run.model, run.variables, source, scorings, **options)]


_TITLE = 'Zero-shot results'
_HEADER = ('model', 'protocol', 'class names', 'refinement')


class Row(NamedTuple):
  """A row of the table."""

  kind: str  # 'ours', 'spread' or 'published'
  texts: tuple[str, ...]  # as `_HEADER` names them
  scores: Mapping[str, float]  # benchmark -> percent


def _own_rows(entries: Sequence[Entry], results: Mapping[str, Mapping[str, Any]]) -> list[Row]:
  """A row for each protocol and set of names; after those of a protocol their spread. ImageNet is in the first one."""
  by_protocol: dict[str, dict[str, dict[str, float]]] = {}
  refinements: dict[str, str] = {}
  for entry in entries:
    if entry.scored is not None and results[entry.path]['miou'] is not None:
      _, protocol, names = entry.scored
      # Names have a column of their own.
      changed = tuple(key for key in protocol.changed if key != 'class_names')
      title = dataclasses.replace(protocol, changed=changed).title
      scores = by_protocol.setdefault(title, {}).setdefault(names.name, {})
      scores[entry.benchmark] = 100 * results[entry.path]['miou']
      refinements[title] = protocol.refine or 'none'
  rows: list[Row] = []
  for title, by_names in by_protocol.items():
    rows += [Row('ours', ('this run', title, name, refinements[title]), scores) for name, scores in by_names.items()]
    if len(by_names) > 1:
      shared = [name for name in next(iter(by_names.values())) if all(name in found for found in by_names.values())]
      columns = {name: [found[name] for found in by_names.values()] for name in shared}
      spread = {name: max(values) - min(values) for name, values in columns.items()}
      text = f'highest - lowest of {len(by_names)}'
      rows.append(Row('spread', ('spread', title, text, refinements[title]), spread))
  top1 = {entry.benchmark: 100 * results[entry.path]['top1'] for entry in entries if entry.scored is None}
  first = rows[0] if rows else Row('ours', ('this run', '', '', ''), {})
  return [first._replace(scores=first.scores | top1), *rows[1:]]


def _published_rows(columns: Sequence[str]) -> list[Row]:
  """Published results, those of models on a frozen foundation model last."""
  rows = []
  for row in sorted(load_published(), key=lambda row: row.frozen):
    scores = {name: row.scores[name] for name in columns if name in row.scores}
    if scores:
      frozen = 'on a frozen foundation model: ' * row.frozen
      data = f' of {row.training_data}' if row.training_data else ''
      rows.append(Row('published', (f'{frozen}{row.model}{data} ({row.source})', row.protocol, '', row.refine), scores))
  return rows


def _notes(entries: Sequence[Entry], absent: Sequence[str]) -> list[str]:
  """What the table does not say itself."""
  whole = {name: find_benchmark(name).num_images for name in labelled.STORED_IN}
  whole |= {labelled.IMAGENET: zero_shot.NUM_IMAGES}
  counted = {entry.benchmark: entry.settings['num_images'] for entry in entries}
  images = ', '.join(
    f'{name} {count:,}' + (f' of {whole[name]:,}' if whole.get(name, count) != count else '')
    for name, count in counted.items()
  )
  missing = dict.fromkeys(f'{row.model} ({row.source})' for row in load_published() if not row.scores)
  notes = ['mIoU in percent, of ImageNet top-1 accuracy; published rows as far as they are recorded here.']
  notes += [f'Images: {images}.', f'Pooling of names: {POOLING}.']
  notes += [f'Not found: {", ".join(absent)}.'] * bool(absent)
  return [*notes, f'No published figure is recorded here of {", ".join(missing)}.']


def _markdown(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
  lines = [[*_HEADER, *columns], [':--'] * len(_HEADER) + ['--:'] * len(columns)]
  lines += [[*row.texts, *(_percent(row.scores.get(name)) for name in columns)] for row in rows]
  return [f'| {" | ".join(cells)} |' for cells in lines]


def _percent(value: float | None) -> str:
  return '' if value is None else f'{value:.1f}'
