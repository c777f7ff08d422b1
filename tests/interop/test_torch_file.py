"""Reading torch checkpoints without torch: what torch writes is read, what else a pickle may hold is refused."""

import argparse
import collections
import os
import pathlib
import pickle
import re
import resource
import subprocess
import zipfile

import numpy as np
import pytest
import torch

from groupvit_jax.interop import torch_file
from groupvit_jax.interop.torch_file import read_state_dict


def save(payload: object, path: pathlib.Path) -> pathlib.Path:
  torch.save(payload, path)
  return path


def make_state() -> collections.OrderedDict:
  base = torch.arange(12.0).reshape(3, 4)
  state = collections.OrderedDict(
    base=base,
    transposed=base.t(),
    part=base[1:, ::2],
    bf16=base.bfloat16(),
    half=torch.nn.Parameter(base.half()),
    double=base.double(),
    scalar=torch.tensor(3.5),
    integer=torch.tensor(5),
    empty=torch.zeros(0, 3),
    flags=torch.tensor([True, False]),
  )
  norm = torch.nn.BatchNorm1d(3).state_dict()
  state.update(norm)
  state._metadata = norm._metadata  # an attribute that every real state dict has
  return state


def test_reads_what_torch_writes(tmp_path):
  state = make_state()
  read = read_state_dict(save(state, tmp_path / 'weights'))
  assert read.keys() == state.keys()
  for name, tensor in state.items():
    expected = tensor.detach()
    assert read[name].dtype.name == str(expected.dtype).removeprefix('torch.')
    np.testing.assert_array_equal(read[name].astype(np.float64), expected.double().numpy(), err_msg=name)
  read['part'][0] = 7  # a copy of its own: views would keep the whole file in memory
  np.testing.assert_array_equal(read['base'], state['base'])


def test_skips_settings_and_metrics_beside_the_weights(tmp_path):
  mark = tmp_path / 'mark'
  payload = {
    'model': make_state(),
    'config': argparse.Namespace(depths=[6, 3, 3]),
    'accuracy': np.float64(0.5),
    'history': np.arange(3),
    'counts': collections.defaultdict(int, a=1),
    'epoch': 30,
    'out': pathlib.PurePosixPath('a'),
    'file': Call(np.savetxt, str(mark), [1.0]),
    'optimizer': {'state': {0: {'step': 3, 'exp_avg': torch.ones(2)}}, 'param_groups': [{'lr': 1e-3}]},
  }
  assert read_state_dict(save(payload, tmp_path / 'weights')).keys() == make_state().keys()
  assert not mark.exists()  # what is skipped is not called either


def test_a_file_cut_anywhere_is_refused(tmp_path):
  data = save(make_state(), tmp_path / 'whole').read_bytes()
  path = tmp_path / 'cut'
  for length in [*range(0, len(data) - 1, 37), len(data) - 1]:
    path.write_bytes(data[:length])
    with pytest.raises(ValueError, match=f'^{path} cannot be read: [^\n]*; nothing in it was run$'):
      read_state_dict(path)


class Call:
  """Pickles as a call of any function."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize(
  'call, name',
  [
    (lambda mark: Call(os.system, f'touch {mark}'), 'posix.system'),
    (lambda mark: Call(subprocess.check_call, ['touch', mark]), 'commands.check_call'),  # so protocol 2 calls it
    (lambda mark: Call(exec, f'open({mark!r}, "w")'), '__builtin__.exec'),
    (lambda mark: Call(getattr, 'os', 'system'), '__builtin__.getattr'),
    (lambda mark: Call(torch.load, mark), 'torch.serialization.load'),
    (lambda mark: Call(pickle.loads, b''), 'pickle.loads'),
  ],
)
def test_hostile_pickles_are_refused_and_not_run(tmp_path, call, name):
  mark = tmp_path / 'mark'
  path = save({'model': make_state(), 'extra': call(str(mark))}, tmp_path / 'hostile')
  with pytest.raises(ValueError, match=f'it wants {re.escape(name)}, which no weights need; nothing in it was run'):
    read_state_dict(path)
  assert not mark.exists()


REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'
STORAGE = b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ'


def tensor(offset=b'K\x00', size=b'K\x04', stride=b'K\x01', storage=STORAGE) -> bytes:
  """Pickle opcodes of a 1-D tensor over four numbers."""
  return REBUILD + b'(' + storage + offset + b'(' + size + b't(' + stride + b't\x89ccollections\nOrderedDict\n)RtR'


def state_dict(value: bytes) -> bytes:
  return b'\x80\x02}X\x01\x00\x00\x00w' + value + b's.'


def write_zip(
  path: pathlib.Path, data: bytes, compression: int = zipfile.ZIP_STORED, byteorder: bytes = b'little'
) -> None:
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', data)
    archive.writestr('archive/byteorder', byteorder)
    archive.writestr('archive/data/0', np.arange(4, dtype=np.float32).tobytes())


def test_opcodes_by_hand(tmp_path):
  # Shows that the refusals below are for what they change.
  write_zip(tmp_path / 'weights', state_dict(tensor()))
  np.testing.assert_array_equal(read_state_dict(tmp_path / 'weights')['w'], [0, 1, 2, 3])
  write_zip(tmp_path / 'weights', state_dict(tensor(offset=b'K\x01', size=b'K\x02', stride=b'K\x02')))
  np.testing.assert_array_equal(read_state_dict(tmp_path / 'weights')['w'], [1, 3])


@pytest.mark.parametrize(
  'pickled, reason',
  [
    (state_dict(tensor(size=b'K\x05')), 'reaches beyond'),
    (state_dict(tensor(offset=b'K\x01')), 'reaches beyond'),
    (state_dict(tensor(stride=b'K\x02')), 'reaches beyond'),
    (state_dict(tensor(size=b'J\xff\xff\xff\x7f', stride=b'K\x00')), 'reaches beyond'),  # 8 GB of the first number
    (state_dict(tensor(offset=b'J\xff\xff\xff\xff')), 'an impossible tensor'),
    (state_dict(tensor(stride=b'J\xff\xff\xff\xff')), 'an impossible tensor'),
    (state_dict(tensor(size=b'K\x02K\x02')), 'an impossible tensor'),
    (state_dict(tensor(storage=b'K\x00')), 'an impossible tensor'),
    (state_dict(tensor(storage=STORAGE.replace(b'K\x04', b'K\x05'))), 'cut short or damaged'),
    (state_dict(tensor(storage=STORAGE.replace(b'0X', b'1X'))), "no item named 'archive/data/1'"),
    (state_dict(tensor(storage=b'X\x01\x00\x00\x00xQ')), 'not a storage of numbers'),
    (state_dict(tensor() + b'}X\x01\x00\x00\x00xK\x01sb'), 'attribute'),  # attributes for a tensor
    (state_dict(REBUILD + b'}X\x01\x00\x00\x00xK\x01sb'), 'tries to change a function'),
    (state_dict(REBUILD + b'N}X\x05\x00\x00\x00_callK\x01s\x86b'), 'tries to change a function'),
    (state_dict(b'ctorch\nFloatStorage\nN}X\x05\x00\x00\x00dtypeK\x01s\x86b'), 'attribute'),
    (state_dict(b'ctorch._utils\n_rebuild_tensor_v2.__globals__\n'), 'which no weights need'),
    (state_dict(b'(iposix\nsystem\n'), 'it wants posix.system'),
    (state_dict(b'\x8c\x05posix\x8c\x06system\x93'), 'it wants posix.system'),
    (state_dict(b'K\x01'), 'these entries are no tensors: w'),
    (b'\x80\x02]K\x01a.', 'no state dict'),
    (b'\x80\x02}.', 'no state dict'),
  ],
)
def test_pickles_by_hand_are_refused(tmp_path, pickled, reason):
  write_zip(tmp_path / 'weights', pickled)
  with pytest.raises(ValueError, match=reason):
    read_state_dict(tmp_path / 'weights')


def test_what_a_pickle_notes_under_large_numbers_takes_no_memory(tmp_path):
  """The memo of the unpickler in C is a list, which it makes as long as the largest number."""
  noted = b'r' + (2**26).to_bytes(4, 'little')
  write_zip(tmp_path / 'weights', state_dict(tensor() + noted))
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert read_state_dict(tmp_path / 'weights').keys() == {'w'}
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; a list would take 1 GB


def test_an_optimisers_numbers_are_not_read(tmp_path, monkeypatch):
  model = torch.nn.Linear(3, 2)
  payload = {
    'optimizer': {'state': {0: {'exp_avg': torch.ones(500)}}},
    'model': model.state_dict(),
    'scaler': torch.ones(300),
  }
  path, numbers, read = save(payload, tmp_path / 'weights'), torch_file._numbers, []
  monkeypatch.setattr(torch_file, '_numbers', lambda data, storage: read.append(len(data)) or numbers(data, storage))
  assert read_state_dict(path).keys() == {'weight', 'bias'}
  assert sorted(read) == [8, 24]
  path.write_bytes(path.read_bytes()[:-3])
  with pytest.raises(ValueError, match='cut short'):
    read_state_dict(path)


@pytest.mark.parametrize(
  'write, reason',
  [
    (lambda path: None, '^there is no file '),
    (lambda path: path.write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'), 'Git LFS pointer'),
    (lambda path: path.write_bytes(b'<html>not found</html>'), 'not a torch checkpoint'),
    (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), 'the format before torch 1.6'),
    (lambda path: zipfile.ZipFile(path, 'w').close(), 'not a torch checkpoint'),
    (lambda path: write_zip(path, state_dict(tensor()), zipfile.ZIP_DEFLATED), 'compressed'),
    (lambda path: write_zip(path, state_dict(tensor()), byteorder=b'big'), 'big-endian'),
  ],
)
def test_other_files_are_refused(tmp_path, write, reason):
  write(tmp_path / 'weights')
  with pytest.raises(ValueError, match=reason):
    read_state_dict(tmp_path / 'weights')
