"""A stand-in for S3 that several processes share: s3://NAME/KEY is the file FOLDER/NAME/KEY.

As in a store, objects appear whole, and nothing can be renamed or appended.
"""

import importlib.machinery
import os
import pathlib
import shutil
import sys
import threading
import types

import fsspec
from fsspec.implementations.local import LocalFileSystem
import pytest


class FolderBucket(LocalFileSystem):
  """Objects as files."""

  protocol = 's3'
  cachable = False
  folder: pathlib.Path

  def __init__(self, **options):
    super().__init__(auto_mkdir=True, **options)

  @classmethod
  def _strip_protocol(cls, path):
    key = str(path).removeprefix('s3://').removeprefix(str(cls.folder)).strip('/')
    return f'{cls.folder}/{key}'

  def mkdir(self, path, create_parents=True, **kwargs):
    """There are no folders."""

  def makedirs(self, path, exist_ok=False):
    """There are no folders."""

  def cp_file(self, path1, path2, **kwargs):
    if self.isfile(path1):
      self.pipe_file(path2, self.cat_file(path1))

  def mv(self, path1, path2, **kwargs):
    self.copy(path1, path2, recursive=True)
    self.rm(path1, recursive=True)

  def pipe_file(self, path, value, mode='overwrite', **kwargs):
    target = pathlib.Path(self._strip_protocol(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f'.{target.name}.{threading.get_native_id()}')
    partial.write_bytes(value)
    if mode != 'create':
      partial.replace(target)
      return
    try:
      os.link(partial, target)  # fails where there is one
    finally:
      partial.unlink()

  def put_file(self, lpath, rpath, callback=None, mode='overwrite', **kwargs):
    if pathlib.Path(lpath).is_file():
      self.pipe_file(rpath, pathlib.Path(lpath).read_bytes())

  def get_file(self, rpath, lpath, callback=None, **kwargs):
    shutil.copyfile(self._strip_protocol(rpath), lpath)


def use(monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path) -> None:
  """Lets a test find its s3:// in a folder."""
  from groupvit_jax import storage

  monkeypatch.setattr(FolderBucket, 'folder', folder, raising=False)
  monkeypatch.setitem(sys.modules['fsspec.registry']._registry, 's3', FolderBucket)
  monkeypatch.setattr(storage, '_systems', {})


def install(folder: str) -> None:
  """Lets this process find its s3:// in a folder."""
  FolderBucket.folder = pathlib.Path(folder)
  fsspec.register_implementation('s3', FolderBucket, clobber=True)
  module = types.ModuleType('s3fs')  # where the package is not installed
  module.__spec__ = importlib.machinery.ModuleSpec('s3fs', None)
  sys.modules['s3fs'] = module
