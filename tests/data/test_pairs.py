"""One's own pairs: a folder, a table or tars, and the run over them."""

import csv
import json
import pathlib
import shutil

import pyarrow
from pyarrow import parquet
import pytest

from configs import own_pairs
from groupvit_jax.data import pairs
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.sources import build_source
from groupvit_jax.errors import UserError
from groupvit_jax.train import dry_run, loop, optim, workdir
from tests.runs import logged
from tests.tars import encode, write_set

COUNT = 24


def caption(n: int) -> str:
  return f'a dog, number {n}, "on" the grass'


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> pathlib.Path:
  """Images in two folders with captions beside them, and tables of all."""
  folder = tmp_path_factory.mktemp('pairs')
  paths = [f'{"ab"[n % 2]}/{n:02}.jpg' for n in range(COUNT)]
  for n, path in enumerate(paths):
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / path).write_bytes(encode(n))
    (folder / path).with_suffix('.txt').write_text(caption(n) + '\n')
  rows = [{'path': path, 'caption': caption(n), 'more': n} for n, path in enumerate(paths)]
  with (folder / 'all.csv').open('w', newline='') as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
  (folder / 'all.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  parquet.write_table(pyarrow.Table.from_pylist(rows), folder / 'all.parquet')
  return folder


@pytest.mark.parametrize('name', ['', 'all.csv', 'all.jsonl', 'all.parquet'])
def test_every_form_holds_the_same_pairs(name, folder):
  source = pairs.open_pairs(str(folder / name), 'data.path')
  found = {source[n]['key']: source[n] for n in range(len(source))}
  assert len(found) == COUNT
  for n in range(COUNT):
    record = found[f'{"ab"[n % 2]}/{n:02}.jpg']
    assert (record['image'], record['text']) == (encode(n), caption(n))
  assert {source.caption_of(n) for n in range(COUNT)} == set(map(caption, range(COUNT)))
  with pytest.raises(IndexError):
    source[COUNT]


def test_a_bad_pair_is_a_bad_record(folder, tmp_path):
  for name in ('x', 'y', 'z'):
    (tmp_path / f'{name}.PNG').write_bytes(encode(1))
  (tmp_path / 'x.txt').write_text('fine')
  (tmp_path / 'y.txt').write_bytes(b'\xff')
  source = pairs.open_pairs(str(tmp_path), 'data.path')
  assert source[0]['text'] == 'fine'
  for n, cause in ((1, 'caption_unreadable'), (2, 'caption_missing')):
    with pytest.raises(BadRecord, match=cause):
      source[n]
  (tmp_path / 'rows.jsonl').write_text('{"path": "x.PNG", "caption": "\\ud800"}\n{"path": "no.png", "caption": "b"}\n')
  source = pairs.open_pairs(str(tmp_path / 'rows.jsonl'), 'data.path')
  for n, cause in ((0, 'caption_unreadable'), (1, 'image_missing')):
    with pytest.raises(BadRecord, match=cause):
      source[n]
  assert source.digest != pairs.open_pairs(str(tmp_path), 'data.path').digest


@pytest.mark.parametrize(
  'name, text, message',
  [
    ('a.csv', 'path,text\nx.jpg,hello\n', "cannot be read .no column 'caption'.; it is a table with columns path"),
    ('a.csv', 'path,caption\nx.jpg\n', 'row 1 has no path or no caption that is text'),
    ('a.csv', 'path,caption\n', 'has no rows'),
    ('a.csv', 'path,caption\nx.jpg,a dog\n', 'there is no .*x.jpg; paths are relative to the folder of the table'),
    ('a.jsonl', '{"path": "x.jpg", "caption": 5}\n', 'row 1 has no path or no caption'),
    ('a.jsonl', '[]\n', 'cannot be read'),
    ('a.jsonl', '{', 'cannot be read'),
    ('a.parquet', 'PAR1', 'cannot be read'),
    ('b.csv', None, 'there is no such file'),
    ('', None, 'holds no image of jpeg, jpg, png, webp; for tars name a pattern'),
  ],
)
def test_mistakes_take_one_line(name, text, message, tmp_path):
  (tmp_path / 'a.tar').touch()
  if text is not None:
    (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=message) as caught:
    pairs.open_pairs(str(tmp_path / name), 'data.path')
  assert str(caught.value).startswith("data.path='") and '\n' not in str(caught.value)


def test_images_without_captions_are_refused(tmp_path):
  (tmp_path / 'a.jpg').write_bytes(encode(1))
  with pytest.raises(UserError, match='a.jpg has no caption beside it; write it into a .txt'):
    pairs.open_pairs(str(tmp_path), 'data.path')


def small(variant: str = 'tiny'):
  config = own_pairs.get_config(variant)
  config.batch_size, config.log_every, config.data.num_prompts = 8, 1, 1
  config.data.num_threads, config.tokenizer.vocab_size, config.eval.every_steps = 0, 300, 0
  config.model.update(embed_dim=8, projector_dim=16)
  config.model.vision.update(image_size=(32, 32), width=16, num_heads=2)
  config.model.text.update(context_length=8, width=16, num_heads=2)
  return config


def test_the_path_may_name_tars_or_nothing(tmp_path):
  config = small()
  with pytest.raises(UserError, match="data.path is empty; name tars as in --config.data.path='pairs/..tar', a folder"):
    build_source(config.data, (32, 32))
  config.data.path = str(tmp_path / 'pears')
  with pytest.raises(UserError, match='there is no folder .*/pears, and it names no table and no tars'):
    build_source(config.data, (32, 32))
  write_set(tmp_path / 'set', 20)
  config.data.path, config.data.index_dir = f'{tmp_path}/set/*.tar', str(tmp_path / 'index')
  source = build_source(config.data, (32, 32))
  assert (len(source), source[3]['text'], source.describe_size()) == (20, 'a dog number 3', '20 records')


def test_steps_follow_from_the_pairs():
  config = optim.steps_from_pairs(own_pairs.get_config(), 1_024_000)
  assert (config.total_steps, config.optim.warmup_steps) == (30_000, 2000)
  config.total_steps, config.optim.warmup_steps = 150, -1
  assert optim.steps_from_pairs(config, 10).optim.warmup_steps == 10


@pytest.mark.usefixtures('one_device')
def test_a_run_trains_and_goes_on(folder, tmp_path, capsys):
  config, run = small(), tmp_path / 'run'
  config.data.path, config.data.epochs, config.checkpoint.every_steps = str(folder), 1.0, 1
  assert loop.train(config, run) == 0
  recorded = workdir.read_config(run)
  assert (recorded.total_steps, recorded.optim.warmup_steps) == (3, 0)
  lines = dry_run._data_lines(dry_run._set_up(config, run))
  assert lines[1].startswith('data       3 steps of 8 pairs: 1 epochs of 24 records; ')
  before = logged(run)
  shutil.rmtree(run / 'checkpoints' / '3')
  assert loop.train(config, run) == 0
  assert logged(run) == before
  assert 'resumes after step 2' in (said := capsys.readouterr().err)
  assert said.splitlines()[-1].startswith('the run is done, at step 3; next: python -m groupvit_jax eval')
