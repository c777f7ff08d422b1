"""Reads the weights of a torch checkpoint without torch, and without running what the file asks for.

A checkpoint is a pickle, and a pickle is a program: it names functions and calls them. The reader looks up every name
in a table of its own, whose entries only record how a tensor is stored; any other name is refused. (No maintained
library does this without torch; `torch.load(weights_only=True)` works the same way.)
"""

from collections.abc import Callable
import pickle
from typing import BinaryIO, NamedTuple
import zipfile

from etils import epath
import ml_dtypes
import numpy as np

from groupvit_jax.errors import UserError

_LFS_POINTER = b'version https://git-lfs'

_DTYPES = {
  'FloatStorage': np.dtype('<f4'),
  'HalfStorage': np.dtype('<f2'),
  'DoubleStorage': np.dtype('<f8'),
  'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
  'LongStorage': np.dtype('<i8'),
  'IntStorage': np.dtype('<i4'),
  'ShortStorage': np.dtype('<i2'),
  'CharStorage': np.dtype('i1'),
  'ByteStorage': np.dtype('u1'),
  'BoolStorage': np.dtype('?'),
}

# Modules of settings and metrics that are saved beside weights. They are skipped: nothing of them is called.
_SKIPPED_MODULES = ('_codecs', 'argparse', 'collections', 'numpy', 'omegaconf', 'pathlib', 'typing', 'yacs')
_SKIPPED_BUILTINS = ('bool', 'bytes', 'dict', 'float', 'int', 'list', 'long', 'set', 'str', 'tuple', 'unicode')


class _StorageType(NamedTuple):
  """A number format; a tuple, as a pickle could change a dtype."""

  dtype: np.dtype


class _Storage(NamedTuple):
  """A contiguous array of numbers in the file."""

  key: str
  dtype: np.dtype
  numel: int


class _Tensor(NamedTuple):
  """A view of a storage."""

  storage: _Storage
  offset: int
  size: tuple[int, ...]
  stride: tuple[int, ...]


class _Dict(dict):
  """A dict that a pickle cannot give attributes (torch puts `_metadata` on state dicts)."""

  __slots__ = ()

  def __setstate__(self, state: object = None) -> None:
    pass


class _Skipped(dict):
  """Stands for an object of `_SKIPPED_MODULES`; ignores all that a pickle does to it."""

  __slots__ = ()

  def __init__(self, *args: object, **kwargs: object):
    super().__init__()

  def __setstate__(self, state: object = None) -> None:
    pass

  def append(self, item: object) -> None:
    """Called for items of a pickled list."""


class _Name:
  """A function of the table that a pickle can call and cannot change."""

  __slots__ = ('_call',)

  def __init__(self, call: Callable[..., object]):
    object.__setattr__(self, '_call', call)

  def __call__(self, *args: object) -> object:
    return self._call(*args)

  def __setattr__(self, name: str, value: object) -> None:
    raise pickle.UnpicklingError(f'it tries to change {name}')

  def __setstate__(self, state: object) -> None:
    raise pickle.UnpicklingError('it tries to change a function')


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> _Tensor:
  numbers = lambda value: isinstance(value, tuple) and all(type(n) is int and n >= 0 for n in value)
  if not (
    isinstance(storage, _Storage)
    and numbers((offset,))
    and numbers(size)
    and numbers(stride)
    and len(size) == len(stride)
  ):
    raise pickle.UnpicklingError('it describes an impossible tensor')
  return _Tensor(storage, offset, size, stride)


_TABLE = (
  {
    ('collections', 'OrderedDict'): _Dict,
    ('torch', 'Size'): _Name(tuple),
    ('torch._utils', '_rebuild_tensor'): _Name(_rebuild_tensor),
    ('torch._utils', '_rebuild_tensor_v2'): _Name(_rebuild_tensor),
    ('torch._utils', '_rebuild_parameter'): _Name(lambda data, *_: data),
  }
  | {('torch', name): _StorageType(dtype) for name, dtype in _DTYPES.items()}
  | {(module, name): _Skipped for module in ('builtins', '__builtin__') for name in _SKIPPED_BUILTINS}
)


# The one in Python: the one in C allocates a memo as long as the largest index that a pickle names.
class _Unpickler(pickle._Unpickler):
  """An unpickler that resolves only the names of the table."""

  def find_class(self, module: str, name: str) -> object:
    if (module, name) in _TABLE:
      return _TABLE[module, name]
    if module.split('.')[0] in _SKIPPED_MODULES:
      return _Skipped
    raise pickle.UnpicklingError(f'it wants {module}.{name}, which no weights need')

  def persistent_load(self, pid: object) -> _Storage:
    match pid:
      case ('storage', _StorageType(dtype), str(key), _, int(numel)) if numel >= 0:
        return _Storage(key, dtype, numel)
    raise pickle.UnpicklingError('it refers to something that is not a storage of numbers')


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
  """Reads the weights of a `.pth`, `.pt` or `.bin` file of torch, of any version since 1.6.

  Args:
    path: of a file that holds a state dict, or a dict with one under 'model'.

  Returns:
    Name -> array.

  Raises:
    UserError: the file is missing, truncated, not torch's, holds no state dict, or asks for more than tensors.
  """
  path = epath.Path(path)
  if not path.is_file():
    raise UserError(f'there is no file {path}')
  try:
    with path.open('rb') as file, _open_zip(file) as archive:
      (pickled,) = (name for name in archive.namelist() if name.endswith('/data.pkl'))
      tensors = _state_dict(_Unpickler(archive.open(pickled)).load())
      root = pickled.removesuffix('data.pkl')
      storages = {tensor.storage for tensor in tensors.values()}
      numbers = {each: _numbers(archive.read(f'{root}data/{each.key}'), each) for each in storages}
    return {name: _view(tensor, numbers[tensor.storage]) for name, tensor in tensors.items()}
  except Exception as error:  # a damaged pickle or zip raises nearly anything
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise UserError(f'{path} cannot be read: {reason}; nothing in it was run') from error


def _state_dict(payload: object) -> dict[str, _Tensor]:
  """The tensors of the pickled object, by name."""
  payload = payload.get('model', payload) if isinstance(payload, dict) else payload
  if not isinstance(payload, dict) or not payload:
    raise UserError('it holds no state dict')
  wrong = [str(name) for name, value in payload.items() if not (isinstance(value, _Tensor) and isinstance(name, str))]
  if wrong:
    raise UserError(f'these entries are no tensors: {", ".join(wrong[:10])}')
  return payload


def _open_zip(file: BinaryIO) -> zipfile.ZipFile:
  start = file.read(len(_LFS_POINTER))
  if start == _LFS_POINTER:
    raise UserError('it is a Git LFS pointer; download the file it stands for')
  if start.startswith(b'\x80'):
    raise UserError('it is in the format before torch 1.6; save it again with a later torch')
  if not start.startswith(b'PK'):
    raise UserError('it is not a torch checkpoint')
  try:
    archive = zipfile.ZipFile(file)
  except zipfile.BadZipFile:
    raise UserError('it is cut short or damaged; download it again') from None
  names = archive.namelist()
  if sum(name.endswith('/data.pkl') for name in names) != 1:
    raise UserError('it is not a torch checkpoint')
  if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
    raise UserError('it is compressed, which torch never does')
  if any(name.endswith('/byteorder') and archive.read(name) != b'little' for name in names):
    raise UserError('it was written by a big-endian machine')
  return archive


def _numbers(data: bytes, storage: _Storage) -> np.ndarray:
  if len(data) != storage.numel * storage.dtype.itemsize:
    raise UserError('it is cut short or damaged; download it again')
  return np.frombuffer(data, storage.dtype)


def _view(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
  """The array of a tensor. Checks the bounds, which `as_strided` does not."""
  last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
  count = int(np.prod(tensor.size, dtype=object))
  if count and (last >= numbers.size or count > numbers.size):
    raise UserError('a tensor reaches beyond its storage')
  if not count:
    return np.zeros(tensor.size, tensor.storage.dtype)
  strides = [step * numbers.itemsize for step in tensor.stride]
  return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.size, strides, writeable=False).copy()
