"""Webdataset tars: what is found in them, where, and what is said of those that do not fit."""

import os
import pathlib
import pickle
import tarfile

import numpy as np
import pytest

from groupvit_jax import storage
from groupvit_jax.data import tars
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.tars import tar_members
from groupvit_jax.storage import expand_braces, find_shards
from tests.tars import encode, samples, write_set, write_tar

pytestmark = pytest.mark.usefixtures('own_cache')


@pytest.fixture
def reads(monkeypatch):
  """The (path, start, size) of every read."""
  made = []
  read = storage.read_range
  monkeypatch.setattr(storage, 'read_range', lambda *args: made.append(args) or read(*args))
  return made


def open_set(*patterns: str, caption: str = 'txt', index_dir: str = '') -> tars.WebDataset:
  return tars.open_webdataset(patterns, caption, index_dir, 'data.sets.x')


@pytest.mark.parametrize(
  'pattern, paths',
  [
    ('a.tar', ['a.tar']),
    ('{0008..0011}.tar', ['0008.tar', '0009.tar', '0010.tar', '0011.tar']),
    ('{8..11}', ['8', '9', '10', '11']),
    ('{08..11}', ['08', '09', '10', '11']),
    ('{a,b}-{0..1}', ['a-0', 'a-1', 'b-0', 'b-1']),
    ('{0..0}{,.gz}', ['0', '0.gz']),
  ],
)
def test_braces_expand_as_in_bash(pattern, paths):
  assert expand_braces(pattern) == paths


@pytest.mark.parametrize(
  'pattern, message',
  [
    ('{0..3', 'missing its partner'),
    ('0..3}', 'missing its partner'),
    ('{3..0}', 'counts down; write .0..3.'),
    ('{}', 'neither'),
    ('{a}', 'neither'),
    ('{000..999999999}.tar', 'stands for 1,000,000,000 paths; use 1,000,000 or fewer'),
    ('{0..9999}/{0..9999}.tar', 'stands for 100,000,000 paths'),
    ('{000000..999999}{0..999999}{0..999999}', 'stands for 1,000,000,000,000,000,000 paths'),  # more than fit anywhere
  ],
)
def test_braces_that_mean_nothing(pattern, message):
  with pytest.raises(ValueError, match=message):
    expand_braces(pattern)


@pytest.mark.parametrize('tar_format', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize('window', [1, 700, 2**20])
def test_members_are_those_of_tarfile(tmp_path, tar_format, window):
  """Long names, names that are not ASCII, empty files, folders and links included."""
  names = 'a.txt', 'b.jpg', 'ä/猫.jpg', 'c.txt', 'd' * 60 + '/' + 'e' * 80 + '.jpg', 'last.txt'
  path = write_tar(tmp_path / 'a.tar', dict(zip(names, map(bytes, (0, 511, 512, 513, 1025, 0)))), tar_format)
  with tarfile.open(path, 'a', format=tar_format) as tar:
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.REGTYPE):
      info = tarfile.TarInfo('odd.jpg')
      info.type, info.linkname, info.size = kind, 'b.jpg', 100 * (kind != tarfile.REGTYPE)  # that nothing follows
      tar.addfile(info)
  with tarfile.open(path) as tar:
    theirs = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
  data = pathlib.Path(path).read_bytes()
  ours = tar_members(lambda start, size: data[start : start + size], len(data), window)
  assert [(name, block * 512, size) for name, block, size in ours] == theirs and len(theirs) == 7


def test_sizes_beyond_octal_and_tars_written_one_after_the_other(tmp_path):
  path = tmp_path / 'a.tar'
  with tarfile.open(path, 'w', format=tarfile.GNU_FORMAT) as tar:
    info = tarfile.TarInfo('big.jpg')
    info.size = 9 * 2**30
    tar.fileobj.write(info.tobuf(tarfile.GNU_FORMAT))
    start = tar.fileobj.tell()
  with open(path, 'r+b') as file:  # sparse: nine gigabytes that take no room
    file.truncate(start + info.size)
    file.seek(0, 2)
    file.write(pathlib.Path(write_tar(tmp_path / 'b.tar', {'b.txt': b'b'})).read_bytes())
  found = list(tar_members(lambda *args: storage.read_range(str(path), *args), path.stat().st_size, 512))
  assert found == [('big.jpg', 1, 9 * 2**30), ('b.txt', 2 + 9 * 2**21, 1)]


def test_damage_between_two_files_is_found_where_it_is(tmp_path):
  path = pathlib.Path(write_tar(tmp_path / 'a.tar', samples(range(3))))
  data = path.read_bytes()
  at = tarfile.open(path).getmember('00001.jpg').offset
  for damage in (b'x' * 512, data[at : at + 148] + b'0000000' + data[at + 155 : at + 512]):
    path.write_bytes(data[:at] + damage + data[at + 512 :])
    with pytest.raises(ValueError, match=f'is damaged: byte {at} starts no header'):
      open_set(str(path))


def test_samples_are_read_as_they_are(tmp_path):
  source = open_set(write_set(tmp_path / 'set', 20))
  assert len(source) == 20
  for copy in (source, pickle.loads(pickle.dumps(source))):
    for n in (0, 7, 8, 19):
      assert copy[n] == {'image': encode(n), 'text': f'a dog number {n}', 'key': f'set/{n // 8:04}.tar/{n:05}'}
      assert copy.caption_of(n) == f'a dog number {n}'
  with pytest.raises(IndexError):
    source[20]


def test_a_sample_takes_one_read(tmp_path, reads):
  source = open_set(write_set(tmp_path / 'set', 8))
  reads.clear()
  source[3]
  assert len(reads) == 1 and reads[0][2] < 4096


@pytest.mark.parametrize('caption, text', [('txt', 'a dog'), ('json:caption', 'Ein Hund'), ('cls', '7')])
def test_captions_come_from_where_the_config_says(tmp_path, caption, text):
  path = write_tar(
    tmp_path / 'a.tar',
    {
      'd/0.JPEG': encode(0),
      'd/0.seg.png': b'no',
      'd/0.cls': b'7',
      'd/0.txt': b' a dog\n',
      'd/0.json': b'{"caption": "Ein Hund", "n": 3}',
      'readme.md': b'',
      'd/1.webp': encode(1),
    },
  )
  source = open_set(path, caption=caption)
  assert source[0] == {'image': encode(0), 'text': text, 'key': f'{tmp_path.name}/a.tar/d/0'}
  assert len(source) == 2


def test_what_is_wrong_with_a_caption_or_a_missing_part(tmp_path):
  path = write_tar(
    tmp_path / 'a.tar',
    {
      'latin.jpg': encode(0),
      'latin.txt': b'caf\xe9',
      'none.jpg': encode(0),
      'blind.txt': b'no picture',
      'empty.jpg': b'',
      'empty.txt': b'empty file',
      'bomb.jpg': encode(0),
      'bomb.txt': b'x' * (2**20 + 1),
      'fine.jpg': encode(0),
      'fine.txt': b'',
    },
  )
  source, found = open_set(path), {}
  for n in range(len(source)):
    with pytest.raises(BadRecord) as fault:
      source[n]
    found[fault.value.key.split('/')[-1]] = fault.value.cause
  assert found == {
    'latin': 'caption_unreadable',
    'none': 'caption_missing',
    'blind': 'image_missing',
    'empty': 'image_missing',
    'bomb': 'caption_unreadable',
    'fine': 'caption_missing',
  }


@pytest.mark.parametrize('data', [b'{"caption": 3}', b'["caption"]', b'{"caption": "cut', b'\xff'])
def test_json_that_holds_no_caption(tmp_path, data):
  source = open_set(write_tar(tmp_path / 'a.tar', {'0.jpg': encode(0), '0.json': data}), caption='json:caption')
  with pytest.raises(BadRecord, match='caption_unreadable'):
    source[0]


def test_index_is_built_once_per_shard_and_for_what_changed(tmp_path, reads):
  pattern = write_set(tmp_path / 'set', 24)
  open_set(pattern)
  assert {path for path, _, _ in reads} == set(expand_braces(pattern))
  reads.clear()
  first = open_set(pattern)
  assert not reads
  open_set(expand_braces(pattern)[1])  # another set of the same shards
  assert not reads
  changed = write_tar(tmp_path / 'set' / '0001.tar', samples(range(100, 105)))
  second = open_set(pattern)
  assert {path for path, _, _ in reads} == {changed}
  assert len(second) == 21 and second[8]['text'] == 'a dog number 100' and second[13]['text'] == 'a dog number 16'
  assert first.index.digest != second.index.digest
  write_tar(tmp_path / 'set' / '0001.tar', dict(reversed(samples(range(100, 105)).items())))  # of the same size
  os.utime(changed, ns=(0, 0))
  assert open_set(pattern)[8]['text'] == 'a dog number 104'


def test_digest_knows_neither_place_nor_time(tmp_path):
  one = open_set(write_set(tmp_path / 'one', 10))
  other = open_set(write_set(tmp_path / 'other', 10), index_dir=str(tmp_path / 'index'))
  assert one.index.digest == other.index.digest
  assert one.index.digest != open_set(write_set(tmp_path / 'one', 11)).index.digest


def test_index_files_that_do_not_fit(tmp_path):
  path = write_tar(tmp_path / 'a.tar', samples(range(5)))
  source = open_set(path)
  (merged,) = (tmp_path / 'cache').rglob('*.npy')
  (beside,) = (tmp_path / '.index').iterdir()
  rows = np.load(merged)
  merged.unlink()  # replaced, not overwritten: `source` has it mapped
  np.save(merged, rows[:3])
  with pytest.raises(ValueError, match=f'{merged} holds 3 samples, not 5; delete it'):
    open_set(path)
  merged.unlink()
  merged.write_bytes(b'')
  with pytest.raises(ValueError, match=f'{merged} cannot be read.*delete it'):
    open_set(path)
  for damage in (b'', beside.read_bytes()[:50], encode(0)):
    merged.unlink(missing_ok=True)
    beside.write_bytes(damage)
    assert open_set(path).index == source.index  # made again
  merged.unlink()
  rows = np.load(beside)
  rows['image_block'] += 1000  # beyond the shard's end
  np.save(beside, rows)
  assert open_set(path)[4] == source[4]


def test_a_killed_build_leaves_what_it_finished(tmp_path, monkeypatch):
  pattern = write_set(tmp_path / 'set', 64)
  index_tar = tars.index_tar

  def dies_at_the_last(read, *args):
    if read.args[0].endswith('0007.tar'):
      raise KeyboardInterrupt
    return index_tar(read, *args)

  monkeypatch.setattr(tars, 'index_tar', dies_at_the_last)
  with pytest.raises(KeyboardInterrupt):
    open_set(pattern)
  monkeypatch.setattr(tars, 'index_tar', index_tar)
  assert len(list((tmp_path / 'set' / '.index').iterdir())) == 7
  assert not list(tmp_path.rglob('*.npy.*')) and len(open_set(pattern)) == 64


@pytest.mark.parametrize('cut', [0, 100, 512, 600, 1500, 1536, 1600, 2500])
def test_truncated_shard(tmp_path, cut):
  """Inside the first header, at its end, inside the image; inside the padding, at its end, inside the next two."""
  path = write_tar(tmp_path / 'a.tar', samples(range(3)))
  os.truncate(path, cut)
  with pytest.raises(ValueError, match=f'{path} is cut short: it ends at byte {cut}.*; fetch it again'):
    open_set(path)


@pytest.mark.parametrize(
  'members, message',
  [
    ({'readme.md': b'hello'}, 'holds no samples'),
    ({'0.jpg': encode(0)}, "holds no .txt files; is the set's caption='txt' right"),
    ({'0.txt': b'a'}, 'holds no .jpg, .jpeg, .png or .webp files'),
    ([('0.jpg', encode(0)), ('0.txt', b'a'), ('0.jpg', encode(1))], 'holds 0.jpg twice'),
  ],
)
def test_tars_that_are_no_webdataset(tmp_path, members, message):
  with pytest.raises(ValueError, match=message):
    open_set(write_tar(tmp_path / 'a.tar', members))


def test_mistakes_in_the_pattern(tmp_path):
  write_set(tmp_path, 24)
  (tmp_path / '0001.tar').unlink()
  (tmp_path / 'text.tar').write_bytes(b'words ' * 1000)
  for pattern, message in [
    (f'{tmp_path}/{{0000..0003}}.tar', f'x: 2 of 4 shards are missing, first {tmp_path}/0001.tar'),
    (f'{tmp_path}/*.zip', 'x: nothing matches'),
    (f'{tmp_path}', 'is not a file'),
    (f'{tmp_path}/{{0000,0000}}.tar', '0000.tar twice'),
    (f'{tmp_path}/text.tar', 'text.tar is not a tar, or is damaged: byte 0'),
    ('gs2://bucket/a.tar', 'cannot reach gs2://bucket/a.tar: Protocol not known'),
  ]:
    with pytest.raises(ValueError, match=message):
      open_set(pattern)
  with pytest.raises(ValueError, match='x: no shards'):
    open_set()
  with pytest.raises(ValueError, match="caption='json'"):
    open_set(f'{tmp_path}/0000.tar', caption='json')
  assert [s.name for s in find_shards([f'{tmp_path}/000*.tar'], 'x')] == ['0000.tar', '0002.tar']


def test_shard_that_shrinks_while_it_is_used(tmp_path):
  path = write_tar(tmp_path / 'a.tar', samples(range(3)))
  source = open_set(path)
  os.truncate(path, 512)
  with pytest.raises(OSError, match='changed while it was in use'):
    source[2]
