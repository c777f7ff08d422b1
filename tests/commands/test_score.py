"""eval.py --benchmark: official layouts in, tables, JSON, TensorBoard files, curves and masks out."""

import json
import pathlib

import numpy as np
from PIL import Image
import pytest

from groupvit_jax.commands import score, score_all
from groupvit_jax.commands.score import Request
from groupvit_jax.eval import labelled, protocols, window_encoder
from groupvit_jax.eval import report as html_report
from groupvit_jax.model import metrics
from groupvit_jax.prepare import __main__ as build
from groupvit_jax.train import restored_run
from tests import official_layouts as layouts
from tests.board import read_board
from tests.runs import run_command
from tests.trained import trained_workdir

SMALL = dict(short_side='32', max_long_side='128', window='32', stride='16')  # the tiny model's size


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory) -> pathlib.Path:
  """All data sets, built from official layouts."""
  data_dir = tmp_path_factory.mktemp('data')
  for name in build.SEGMENTATION_SETS:
    if name in labelled.STORED_IN.values():
      folder = tmp_path_factory.mktemp(name)
      getattr(layouts, name)(folder)
      build.build(name, folder, data_dir)
  return data_dir


def evaluate(benchmark, data_dir, output, **options):
  options = dict(changes=SMALL) | options
  request = Request(benchmark, str(data_dir), output=str(output), **options)
  assert score.evaluate_benchmark(str(trained_workdir()), request) == 0
  return json.loads((output / 'results.json').read_text())


def run_eval(*flags):
  """eval.py on the tiny run by a tiny protocol; what it prints."""
  protocol = [f'--protocol.{key}={value}' for key, value in SMALL.items()]
  done = run_command('eval.py', f'--workdir={trained_workdir()}', *protocol, *flags)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_a_benchmark_by_its_published_protocol(data_dir, tmp_path, capsys):
  report, table = evaluate('voc21', data_dir, tmp_path, masks=True), capsys.readouterr().out
  assert report['complete'] and report['num_images'] == 3 and report['benchmark'] == 'voc21'
  assert report['protocol']['name'] == 'groupvit' and report['protocol']['changed'] == list(SMALL)
  assert report['protocol']['threshold'] == 0.95 and report['background']
  _, source = labelled.open_benchmark('voc21', data_dir)
  counts = 0
  for record in map(source.__getitem__, range(3)):
    mask = Image.open(tmp_path / 'masks' / f'{record["key"]}.png')
    assert mask.mode == 'P' and mask.size == record['label'].shape[::-1]
    counts += metrics.ConfusionMatrix.from_labels(record['label'], np.asarray(mask), len(source.classes)).counts()
  assert report['miou'] == pytest.approx(metrics.scores_from_counts(counts).miou)
  assert table == (tmp_path / 'table.txt').read_text() + f'written to {tmp_path}\n'
  assert table.startswith('voc21, 3 of 1,449 images, protocol groupvit with short_side=32, ')
  assert 'published (GroupViT-S/16 of gcc_yfcc, protocol groupvit): mIoU 52.3' in table
  assert f'; changed here: {", ".join(SMALL)}; here 3 of 1,449 images' in table


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  """A folder of one's own through the front door, with a sweep."""
  data, output = tmp_path_factory.mktemp('mine'), tmp_path_factory.mktemp('out') / 'new'
  layouts.folder(data)
  table = run_eval(
    '--benchmark=folder',
    f'--data_dir={data}',
    '--protocol=groupvit',
    '--protocol.threshold=0.3',
    '--thresholds=0.1:0.9:0.2',
    '--masks',
    f'--output={output}',
    f'--report={output}/report.html',
  )
  return output, data, table


def test_every_result_names_what_it_depends_on(swept):
  output, data, table = swept
  report = json.loads((output / 'results.json').read_text())
  board = read_board(output / 'tensorboard')
  prefix = f'eval/{data.name}'
  _, text = board[f'{prefix}/settings/text_summary']
  step, value = board[f'{prefix}/miou']
  assert value == pytest.approx(report['miou']) and step == report['checkpoint']['step'] == 6
  expected = protocols.override(protocols.GROUPVIT, {key: int(value) for key, value in SMALL.items()})
  expected = protocols.override(expected, {'threshold': 0.3}).to_json()
  provenance = {
    'workdir': str(trained_workdir()),
    'step': '6',
    'weights': 'trained',
    'code': restored_run.code_version(),
    'precision': 'float32, matmul precision default on cpu',
  }
  for found in (report, json.loads(text.removeprefix('<pre>').removesuffix('</pre>'))):
    assert found['protocol'] == json.loads(json.dumps(expected)) and found['provenance'] == provenance
    assert found['templates'] == ['a photo of a {}.'] and found['class_names'] == ['dog', 'grass']
    assert found['num_images'] == 3 and found['benchmark'] == data.name
  lines, page = table.splitlines(), (output / 'report.html').read_text()
  assert lines[0] == f'{data.name}, 3 images, protocol groupvit with ' + ', '.join(
    f'{key}={value}' for key, value in (SMALL | {'threshold': 0.3}).items()
  )
  assert lines[1] == '(' + ', '.join(f'{key}={expected[key]}' for key in protocols.PARAMETERS) + ')'
  assert (
    f'checkpoint {provenance["workdir"]} step 6, weights trained, code {provenance["code"]}, {provenance["precision"]}'
  ) in lines
  assert f'protocol <b>{lines[0].partition("protocol ")[2]}</b>' in page
  assert all(f'{key} {value}' in page for key, value in provenance.items())


def test_a_sweep_is_counted_along_and_drawn(swept):
  output, data, _ = swept
  report = json.loads((output / 'results.json').read_text())
  rows = {row['threshold']: row['miou'] for row in report['threshold_miou']}
  assert list(rows) == [0.1, 0.3, 0.5, 0.7, 0.9]
  assert rows[0.3] == report['miou']  # which is counted apart
  curve = np.asarray(Image.open(output / 'thresholds.png'))
  assert curve.shape == (480, 840, 3) and (curve == (0, 119, 221)).all(-1).sum() > 200  # the line


def test_a_page_for_people(swept, tmp_path):
  output, _, table = swept
  page = (output / 'report.html').read_text()
  assert html_report.MARK in page and f'a page for people: {output}/report.html' in table
  for title in ('Best images', 'Median images', 'Worst images', 'Background threshold', 'Worst confusions'):
    assert f'<h2>{title}</h2>' in page, title
  assert [page.count(f'<p>{key}: mIoU') for key in ('a', 'b', 'c.d')] == [1, 1, 1]
  assert page.count('data:image/webp;base64,') == 1 + 3 * 4  # the tiny model has one grouping stage
  (tmp_path / 'mine.html').write_text('mine')
  for path, message in (('mine.html', 'did not write'), ('report.pdf', 'end it in .html')):
    with pytest.raises(ValueError, match=message):
      score.evaluate_benchmark(str(trained_workdir()), Request('ade20k', str(tmp_path), report=str(tmp_path / path)))


def test_pictures_are_scored_one_by_one(swept):
  output, data, _ = swept
  _, source = labelled.open_benchmark('folder', data)
  found = json.loads((output / 'pictures.json').read_text())
  assert list(found) == ['a', 'b', 'c.d']
  for record in map(source.__getitem__, range(3)):
    labels = np.asarray(Image.open(output / 'masks' / f'{record["key"]}.png'))
    counted = record['label'] != 255
    iou = [
      np.sum((labels == c) & (record['label'] == c)) / union
      for c in range(3)
      if (union := np.sum(((labels == c) | (record['label'] == c)) & counted))
    ]
    assert found[record['key']] == pytest.approx(np.mean(iou))


@pytest.mark.parametrize(
  'request_, message',
  [
    (dict(benchmark='voc'), "no benchmark 'voc'; choose one of voc21, .* folder, scenes"),
    (dict(data_dir=''), 'needs --data_dir'),
    (dict(thresholds='0.1:0.9'), 'write FIRST:LAST:STEP'),
    (dict(thresholds='0.1:0.9:0'), 'write FIRST:LAST:STEP'),
    (dict(thresholds='0.9:0.1:0.1'), 'use values from 0 to 1'),
    (dict(thresholds='1.5'), 'use values from 0 to 1'),
    (dict(thresholds='0:1:1e-6'), '1e-6 are more than 200; use a larger step'),
    (dict(changes={'templates': 'imagenet'}), "no template set 'imagenet'"),
    (dict(changes={'short_side': '32'}), 'short_side=32 is less than window=448'),
    (dict(benchmark='ade20k', thresholds='0.5'), 'ade20k has no background'),
    (dict(protocol='plan'), "no protocol 'plan'"),
    (dict(protocol='native'), 'no threshold under protocol .native.; set protocol.threshold'),
    (dict(output=None, masks=True), '--masks needs --output'),
    (dict(num_pictures=-1), 'of 3 images -1 cannot be taken'),
  ],
)
def test_mistakes_write_nothing(request_, message, data_dir, tmp_path):
  options = dict(benchmark='voc21', data_dir=str(data_dir), output=str(tmp_path / 'out'), changes=SMALL) | request_
  with pytest.raises(ValueError, match=message):
    score.evaluate_benchmark(str(trained_workdir()), Request(**options))
  assert not (tmp_path / 'out').exists()


def test_best_median_and_worst_pictures():
  miou = np.array([0.5, np.nan, 0.9, 0.1, 0.7, 0.3, 0.2])
  assert html_report.pick_images(miou, 1) == {'best': [2], 'median': [0], 'worst': [3]}
  assert html_report.pick_images(miou, 5) == {'best': [2, 4], 'median': [0, 5], 'worst': [3, 6]}
  assert html_report.pick_images(miou[:2], 2) == {'best': [0], 'median': [], 'worst': []}
  assert html_report.pick_images([1.0, 0.9, 0.1], 1)['best'] == [1]  # a single class, all right: little to see


def score_all_of(data_dir, output, **options):
  request = Request(**(dict(benchmark='all', data_dir=str(data_dir), output=str(output), changes=SMALL) | options))
  assert score_all.score_all(str(trained_workdir()), request) == 0
  return json.loads((output / 'results.json').read_text())


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
  """Windows in each batch that is encoded; not those of the run's own evaluations."""
  trained_workdir()
  found, encode = [], window_encoder.encode_windows

  def count(variables, windows, mask, **options):
    found.append(int(mask.sum()))
    return encode(variables, windows, mask, **options)

  monkeypatch.setattr(window_encoder, 'encode_windows', count)
  return found


def test_all_benchmarks_in_one_table_and_what_is_done_is_kept(data_dir, tmp_path, encoded, capsys):
  output, some = tmp_path / 'all', tmp_path / 'some'
  some.mkdir()
  for name in ('voc2012', 'pascal_context_459', 'ade20k'):
    (some / name).symlink_to(data_dir / name)
  report = score_all_of(some, output, protocol='tcl')
  others = ['pascal_context', 'coco_stuff', 'ade20k_full', 'cityscapes_fine', 'imagenet2012']
  assert report['complete'] and report['not_found'] == others
  windows = sum(encoded)
  (ours,) = [row for row in report['rows'] if row['kind'] == 'ours']
  assert list(ours['scores']) == ['voc21', 'voc20', 'context459', 'ade20k']
  # Each of the three sets once, though four benchmarks use them; all have images of the same sizes.
  for name in ('voc21', 'context459'):
    encoded.clear()
    alone = evaluate(name, data_dir, tmp_path / name, protocol='tcl')
    assert ours['scores'][name] == pytest.approx(100 * alone['miou'], abs=1e-4), name
    assert windows == 3 * sum(encoded)
  table = (output / 'table.md').read_text()
  assert '| GroupViT-S/16 of gcc_redcaps (as Cha et al., CVPR 2023, report it) | tcl |  | unknown |  | 79.7 |' in table
  assert 'Images: voc21 3 of 1,449, ' in table and f'Not found: {", ".join(others)}.' in table
  # Of a killed run: one score is missing, one is of other weights, and the table is incomplete.
  for name, change in (('ade20k', None), ('context459', '[1'), ('voc20', {'provenance': {'step': '5'}})):
    path = output / 'scores' / name / 'tcl' / 'benchmark.json'
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | (change or {})))
    if change is None:
      path.unlink()
  (output / 'results.json').write_text(json.dumps({'made_by': report['made_by'], 'complete': False}))
  encoded.clear()
  assert score_all_of(some, output, protocol='tcl')['rows'] == report['rows']
  assert 0 < sum(encoded) <= 3 * 3 * 7
  encoded.clear()
  score_all_of(some, output, protocol='tcl')
  assert not encoded
  evaluate('voc21', data_dir, output)  # one benchmark into the same folder leaves nothing of the table
  assert not [*output.glob('scores/*/*/*'), *output.glob('table.md')]


def test_several_names_and_protocols_in_one_pass(data_dir, tmp_path, encoded):
  """As people type it: with the spread over names, and a page."""
  flags = '--benchmark=voc21', f'--data_dir={data_dir}', '--protocol=tcl,plain'
  page = tmp_path / 'page.html'
  run_eval(*flags, '--class_names=benchmark,synonyms', f'--output={tmp_path / "out"}', f'--report={page}')
  report = json.loads((tmp_path / 'out' / 'results.json').read_text())
  rows = {tuple(row['texts'][1:3]): row['scores'].get('voc21') for row in report['rows'] if row['kind'] != 'published'}
  assert [name for _, name in rows] == ['benchmark', 'synonyms', 'highest - lowest of 2'] * 2
  values = list(rows.values())
  assert values[2] == pytest.approx(abs(values[0] - values[1]))
  found = json.loads((tmp_path / 'out' / 'scores' / 'voc21' / 'tcl' / 'synonyms.json').read_text())
  assert 'television|tv|monitor|screen' in found['class_names'] and 'sky' in found['background_phrases']
  assert found['pooling'].startswith('synonyms: mean of their embeddings')
  assert found['miou'] == pytest.approx(values[1] / 100)
  text = page.read_text()
  assert html_report.MARK in text and '<tr class="spread"><td>spread</td><td>tcl with ' in text
  assert '<td>TCL (Cha et al., CVPR 2023, as quoted elsewhere)</td><td>tcl+pamr</td><td></td><td>pamr</td>' in text


@pytest.mark.parametrize(
  'request_, message',
  [
    (dict(masks=True), '--masks and --thresholds are of one benchmark'),
    (dict(data_dir='nowhere'), '--data_dir=nowhere holds none of voc2012, pascal_context, .*imagenet2012; make them'),
    (dict(data_dir=''), '--benchmark=all needs --data_dir'),
    (
      dict(class_names='benchmark,mine'),
      "class_names='mine': there is no text file mine; choose benchmark, groupvit, synonyms",
    ),
    (dict(benchmark='imagenet', protocol='tcl,plain'), 'neither label maps nor windows'),
  ],
)
def test_mistakes_about_tables_write_nothing(request_, message, data_dir, tmp_path):
  options = dict(benchmark='all', data_dir=str(data_dir), output=str(tmp_path / 'out'), changes=SMALL) | request_
  with pytest.raises(ValueError, match=message):
    score_all.score_all(str(trained_workdir()), Request(**options))
  assert not (tmp_path / 'out').exists()
