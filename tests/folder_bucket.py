"""A stand-in for a store of buckets that several processes share: s3://NAME/KEY is the file FOLDER/NAME/KEY.

As in a store, objects appear whole, folders exist while something lies in them, and nothing can be renamed or appended.
"""

import importlib.machinery
import os
import pathlib
import sys
import types

import fsspec
import pytest


class FolderBucket(fsspec.AbstractFileSystem):
  """Objects as files."""

  protocol = 's3'
  cachable = False
  folder: pathlib.Path

  @classmethod
  def _strip_protocol(cls, path):
    return str(path).removeprefix('s3://').strip('/')

  def _path(self, key: str) -> pathlib.Path:
    return self.folder / self._strip_protocol(key)

  def ls(self, path, detail=True, **kwargs):
    root = self._path(path)
    if root.is_file():
      found = [self._describe(root)]
    else:
      found = [self._describe(each) for each in sorted(root.iterdir()) if self._holds(each)] if root.is_dir() else []
      if not found and self._strip_protocol(path):
        raise FileNotFoundError(path)
    return found if detail else [each['name'] for each in found]

  def _holds(self, path: pathlib.Path) -> bool:
    return path.is_file() and '.partial' not in path.suffixes or any(each.is_file() for each in path.rglob('*'))

  def _describe(self, path: pathlib.Path) -> dict[str, object]:
    name = path.relative_to(self.folder).as_posix()
    return {
      'name': name,
      'size': path.stat().st_size if path.is_file() else 0,
      'type': 'file' if path.is_file() else 'directory',
      'ETag': str(path.stat().st_mtime_ns),
    }

  def mkdir(self, path, create_parents=True, **kwargs):
    """There are no folders."""

  def makedirs(self, path, exist_ok=False):
    """There are no folders."""

  def cp_file(self, path1, path2, **kwargs):
    if self._path(path1).is_file():
      self.pipe_file(path2, self.cat_file(path1))

  def rm_file(self, path):
    target = self._path(path)
    if target.is_file():
      target.unlink()
      for parent in target.parents:
        if parent == self.folder or any(parent.iterdir()):
          break
        parent.rmdir()

  def rmdir(self, path):
    """There are no folders."""

  def pipe_file(self, path, value, mode='overwrite', **kwargs):
    target = self._path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f'{target.name}.partial.{os.getpid()}')
    partial.write_bytes(value)
    partial.replace(target)

  def put_file(self, lpath, rpath, callback=None, mode='overwrite', **kwargs):
    if pathlib.Path(lpath).is_file():
      self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())

  def _open(self, path, mode='rb', **kwargs):
    if mode == 'rb':
      return self._path(path).open('rb')
    if mode not in ('wb', 'xb'):
      raise ValueError(f'no object can be opened as {mode}')
    return _Written(self, path)


class _Written(fsspec.spec.io.BytesIO):
  """An object that appears when it is closed."""

  def __init__(self, system: FolderBucket, path: str):
    super().__init__()
    self._target = system, path

  def close(self):
    if not self.closed:
      system, path = self._target
      system.pipe_file(path, self.getvalue())
    super().close()


def use(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
  """Lets a test find its s3:// in a folder."""
  monkeypatch.setattr(FolderBucket, 'folder', folder, raising=False)
  monkeypatch.setitem(sys.modules['fsspec.registry']._registry, 's3', FolderBucket)


def install(folder: str) -> None:
  """Lets this process find its s3:// in a folder."""
  FolderBucket.folder = pathlib.Path(folder)
  fsspec.register_implementation('s3', FolderBucket, clobber=True)
  module = types.ModuleType('s3fs')  # where the package is not installed
  module.__spec__ = importlib.machinery.ModuleSpec('s3fs', None)
  sys.modules['s3fs'] = module
