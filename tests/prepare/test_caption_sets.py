"""TFDS data sets of image-text pairs from downloads as they are: records, faults, resuming, mistakes."""

import bz2
import json
import pathlib
import re
import sqlite3
import zipfile

import pytest

from groupvit_jax.data.sources import build_source
from groupvit_jax.data.tfds import open_tfds
from groupvit_jax.prepare import __main__ as build
from groupvit_jax.prepare import caption_layouts, caption_sets
from tests.tars import data_config, encode, samples, write_set, write_tar

HASHES = [f'{n % 3:02x}{n:030x}' for n in range(12)]


pytestmark = pytest.mark.usefixtures('own_cache')


def records(folder: pathlib.Path) -> dict[str, tuple[bytes, str]]:
  """Pictures and captions of a built set by key."""
  source = open_tfds(str(folder), 'train', 'image', 'caption', 'x')
  raw = source._records
  assert len(raw) == len(source)
  return {raw[n]['key'].decode(): (source[n]['image'], source[n]['text']) for n in range(len(source))}


def write_yfcc(folder: pathlib.Path, in_subset: range) -> None:
  """Zips by the hash's first digits, the metadata, and OpenAI's list."""
  folder.mkdir()
  for prefix in sorted({key[:2] for key in HASHES}):
    with zipfile.ZipFile(folder / f'0{prefix}.zip', 'w') as archive:
      for n, key in enumerate(HASHES):
        if key[:2] == prefix:
          archive.writestr(f'data/images/{key[:3]}/{key[3:6]}/{key}.jpg', encode(n))
      archive.writestr('data/readme.txt', 'no picture')
  described = [f'%3Cb%3Eon%3C%2Fb%3E+gr%C3%A4ss%0A{n}' if n != 3 else '' for n in range(len(HASHES))]
  rows = [[str(n), str(1000 + n), key, *'abcde', f'Dog+{n}', described[n], *['x'] * 15] for n, key in enumerate(HASHES)]
  (folder / 'yfcc100m_dataset.bz2').write_bytes(bz2.compress('\n'.join(map('\t'.join, rows)).encode() + b'\n'))
  (folder / 'yfcc100m_subset_data.tsv').write_text(''.join(f'{n}\t{1000 + n}\t{HASHES[n]}\n' for n in in_subset))


def write_redcaps(folder: pathlib.Path) -> None:
  (folder / 'annotations').mkdir(parents=True)
  for subreddit in ('cats', 'dogs'):
    captions = [f'{subreddit} number {n}' if n != 2 else ' ' for n in range(5)]
    listed = [
      dict(image_id=f'{subreddit}{n}', subreddit=subreddit, raw_caption='RAW', caption=caption)
      for n, caption in enumerate(captions)
    ]
    (folder / 'annotations' / f'{subreddit}_2019.json').write_text(json.dumps({'info': {}, 'annotations': listed}))
    (folder / 'images' / subreddit).mkdir(parents=True)
    for n in range(4):
      (folder / 'images' / subreddit / f'{subreddit}{n}.jpg').write_bytes(encode(n))


def test_tars_become_files_of_the_same_bytes_read_by_the_pipeline(tmp_path, capsys):
  write_set(tmp_path / 'tars', 20)
  write_tar(tmp_path / 'tars' / '0003.tar', samples(range(20, 24)) | {'00021.jpg': b'', '00022.txt': b' '})
  command = ['cc3m', f'--manual_dir={tmp_path}/tars', f'--data_dir={tmp_path}/tfds', '--workers=2']
  assert build.main(command) == 0
  folder = tmp_path / 'tfds' / 'cc3m' / '1.0.0'
  assert 'cc3m: 22 records (the paper: 2,891,445) in 4 files' in capsys.readouterr().out
  assert json.loads((folder / 'build.json').read_text())['left_out'] == {'image_missing': 1, 'caption_empty': 1}
  files = {f'cc3m-train.array_record-{n:05}-of-00004' for n in range(4)}
  files |= {'build.json', 'dataset_info.json', 'features.json', 'inputs.json'}
  assert {path.name for path in folder.iterdir()} == files
  built = records(folder)
  assert built.keys() == {f'tars/{n // 8 if n < 20 else 3:04}.tar/{n:05}' for n in range(24) if n not in (21, 22)}
  for key, (image, text) in built.items():
    number = int(key[-5:])
    assert image == encode(number) and text == f'a dog number {number}'
  described = dict(
    format='tfds', path=str(folder), split='train', image='image', caption='caption', weight=0.0, expected=22
  )
  source = build_source(data_config(a=described), (16, 16))
  assert len(source) == 22 and source.sets[0].num_shards == 4


def test_yfcc_is_the_subset_with_titles_and_descriptions(tmp_path):
  write_yfcc(tmp_path / 'yfcc', range(2, 9))
  folder = caption_sets.build('yfcc14m', str(tmp_path / 'yfcc'), str(tmp_path / 'tfds'), workers=0)
  built = records(folder)
  assert built.keys() == set(HASHES[2:9])
  assert built[HASHES[5]] == (encode(5), 'Dog 5. on gräss 5') and built[HASHES[3]] == (encode(3), 'Dog 3')
  titles = open_tfds(str(folder), 'train', 'image', 'title', 'x')
  assert sorted(titles[n]['text'] for n in range(7)) == [f'Dog {n}' for n in range(2, 9)]
  assert not (folder / 'captions').exists()
  (tmp_path / 'yfcc' / 'yfcc100m_subset_data.tsv').unlink()  # then the table is the subset
  folder = caption_sets.build('yfcc14m', str(tmp_path / 'yfcc'), str(tmp_path / 'whole'), workers=0)
  assert records(folder).keys() == set(HASHES)


def test_yfcc_from_the_metadata_that_are_offered(tmp_path):
  """An SQLite file without hashes."""
  write_yfcc(tmp_path / 'yfcc', range(2, 9))
  (tmp_path / 'yfcc' / 'yfcc100m_dataset.bz2').unlink()
  with sqlite3.connect(tmp_path / 'yfcc' / 'yfcc100m_dataset.sql') as database:
    database.execute('CREATE TABLE yfcc100m_dataset (photoid integer, title text, description text)')
    database.executemany(
      'INSERT INTO yfcc100m_dataset VALUES (?, ?, ?)', [(1000 + n, f'Cat+{n}', None) for n in reversed(range(12))]
    )
  folder = caption_sets.build('yfcc14m', str(tmp_path / 'yfcc'), str(tmp_path / 'tfds'), workers=0)
  assert records(folder) == {HASHES[n]: (encode(n), f'Cat {n}') for n in range(2, 9)}


def test_redcaps_is_what_was_fetched(tmp_path):
  write_redcaps(tmp_path / 'redcaps')
  folder = caption_sets.build('redcaps12m', str(tmp_path / 'redcaps'), str(tmp_path / 'tfds'), workers=0)
  assert records(folder) == {f'{s}/{s}{n}': (encode(n), f'{s} number {n}') for s in ('cats', 'dogs') for n in (0, 1, 3)}
  assert json.loads((folder / 'build.json').read_text()) == {
    'records': 6,
    'files': 2,
    'bytes': sum(p.stat().st_size for p in folder.glob('*record*')),
    'left_out': {'caption_empty': 2, 'image_missing': 2},
  }
  for path in (tmp_path / 'redcaps' / 'images' / 'cats').iterdir():
    path.unlink()
  folder = caption_sets.build('redcaps12m', str(tmp_path / 'redcaps'), str(tmp_path / 'dogs'), workers=0)
  assert records(folder).keys() == {f'dogs/dogs{n}' for n in (0, 1, 3)}  # a file without records is no obstacle


def test_goes_on_with_what_is_finished(tmp_path, monkeypatch):
  write_redcaps(tmp_path / 'redcaps')
  arguments = ('redcaps12m', str(tmp_path / 'redcaps'), str(tmp_path / 'tfds'), 0)
  read, seen = caption_layouts._read_redcaps, []

  def killed(path, images):
    seen.append(path.name)
    yield from read(path, images)
    if len(seen) == 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(caption_layouts, '_read_redcaps', killed)
  with pytest.raises(KeyboardInterrupt):
    caption_sets.build(*arguments)
  folder = tmp_path / 'tfds' / 'redcaps12m' / '1.0.0'
  with pytest.raises(ValueError, match='there is no TFDS dataset'):
    records(folder)
  caption_sets.build(*arguments)
  assert seen == ['cats_2019.json', 'dogs_2019.json', 'dogs_2019.json'] and len(records(folder)) == 6
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  caption_sets.build(*arguments)  # finished: nothing is touched
  assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before and len(seen) == 3


def test_goes_on_with_its_own_files_only(tmp_path, monkeypatch):
  write_redcaps(tmp_path / 'redcaps')
  with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
    context.setattr(caption_sets, '_finish', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    caption_sets.build('redcaps12m', str(tmp_path / 'redcaps'), str(tmp_path), 0)
  (tmp_path / 'redcaps' / 'annotations' / 'birds_2019.json').write_text('{"annotations": []}')
  with pytest.raises(ValueError, match='was begun from other files; bring those back'):
    caption_sets.build('redcaps12m', str(tmp_path / 'redcaps'), str(tmp_path), 0)


@pytest.mark.parametrize(
  'name, files, message',
  [
    ('cc12m', {'notes.txt': b''}, 'nothing matches'),
    ('cc12m', {'0000.tar': b'no tar'}, '0000.tar'),
    ('yfcc14m', {'x': b''}, 'no zips in .*fetch those of YFCC100M'),
    ('yfcc14m', {'000.zip': b''}, 'no .*yfcc100m_dataset.sql'),
    ('yfcc14m', {'000.zip': b'none', 'yfcc100m_dataset': b'\t'.join([b'0'] * 25)}, '000.zip is damaged'),
    ('yfcc14m', {'000.zip': b'', 'yfcc100m_dataset': b'1\t2\n'}, 'line 1 has 2 columns, not 10 or more'),
    ('yfcc14m', {'000.zip': b'', 'yfcc100m_dataset.sql': b''}, 'no hashes: fetch yfcc100m_subset_data.tsv'),
    (
      'yfcc14m',
      {'000.zip': b'', 'yfcc100m_dataset.sql': b'none' * 100, 'yfcc100m_subset_data.tsv': b'1\t2\t3'},
      'yfcc100m_dataset.sql is not the metadata of YFCC100M',
    ),
    ('redcaps12m', {'x': b''}, 'no annotations in'),
    ('redcaps12m', {'annotations/a.json': b'{}'}, 'no folder .*images'),
    ('redcaps12m', {'annotations/a.json': b'{}', 'images/x': b''}, 'a.json holds no annotations of RedCaps'),
  ],
)
def test_mistakes_take_one_line(name, files, message, tmp_path, capsys):
  for file, data in files.items():
    (tmp_path / 'in' / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'in' / file).write_bytes(data)
  command = [name, f'--manual_dir={tmp_path}/in', f'--data_dir={tmp_path}/tfds', '--workers=0']
  assert build.main(command) == 2
  err = capsys.readouterr().err.splitlines()[-1]
  assert err.startswith('error: ') and re.search(message, err), err


def test_where_not_to_build(tmp_path):
  with pytest.raises(ValueError, match='gs://bucket is remote; build on a disk'):
    caption_sets.build('cc3m', str(tmp_path), 'gs://bucket', 0)
  with pytest.raises(ValueError, match='there is no folder --manual_dir'):
    caption_sets.build('yfcc14m', str(tmp_path / 'none'), str(tmp_path), 0)
