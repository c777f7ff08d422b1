"""Weights on the Hugging Face Hub: downloads them by their id, and uploads exports."""

from collections.abc import Iterator
import contextlib
import functools
import os
import re

from etils import epath

from groupvit_jax import storage
from groupvit_jax.errors import Unavailable, UserError

_ID = re.compile(r'([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w-][\w./-]*))?')
# What a folder of weights holds; torch's weights only where there are no others.
_FILES = ['*.json', '*.txt', '*.md', '*.model', '*.safetensors', '*.stablehlo', '*.onnx', 'tokenizer/*']
_TORCH_FILES = 'pytorch_model*.bin'


def fetch(path: epath.PathLike) -> epath.Path:
  """The local folder or file of weights that a path or an id of the Hub names.

  Files come into the cache of `huggingface_hub` (`HF_HOME`), which resumes what was interrupted. Its settings hold:
  `hf auth login` or `HF_TOKEN` for private models, `HF_HUB_OFFLINE=1` for the cache alone, `HF_ENDPOINT` for a mirror.
  A path that exists wins over an id, which may end with @ and a branch, tag or commit.

  Raises:
    UserError: an id names no model, or one without permission, or `huggingface_hub` is not installed.
    Unavailable: the Hub cannot be reached.
  """
  found = _ID.fullmatch(os.fspath(path))
  return epath.Path(_download(*found.groups()) if found and not epath.Path(path).exists() else path)


def create(name: str) -> None:
  """Creates a model on the Hub unless it is there; raises as `fetch` does."""
  if not _ID.fullmatch(name) or '@' in name:
    raise UserError(f'--push_to_hub={name}: name a model as USER/NAME')
  with _explain(name, None, f'--push_to_hub={name}'):
    _hub().create_repo(name, exist_ok=True)


def upload(folder: epath.PathLike, name: str) -> str:
  """Uploads a folder as one commit of a model that `create` made; returns its address. Raises as `fetch` does."""
  hub = _hub()
  with _explain(name, None, f'{folder} is written; --push_to_hub={name}'):
    hub.upload_folder(repo_id=name, folder_path=os.fspath(folder), commit_message='Export')
  return f'{hub.constants.ENDPOINT}/{name}'


@functools.cache  # one version for all who ask in a process
def _download(name: str, revision: str | None) -> str:
  hub = _hub(name)
  with _explain(name, revision, f'there is no folder {name}, and from the Hub'):
    folder = epath.Path(hub.snapshot_download(name, revision=revision, allow_patterns=_FILES))
    if not any(path.suffix in ('.safetensors', '.stablehlo', '.onnx') for path in folder.iterdir()):
      # Of the same commit, by which its folder is named.
      hub.snapshot_download(name, revision=folder.name, allow_patterns=[*_FILES, _TORCH_FILES])
  return str(folder)


def _hub(name: str = ''):
  try:
    import huggingface_hub
  except ImportError as error:
    lacks = f'there is no folder {name}; to download it from the Hub' if name else 'to upload to the Hub'
    raise UserError(f"{lacks}, pip install 'groupvit-jax[hub]'") from error
  return huggingface_hub


@contextlib.contextmanager
def _explain(name: str, revision: str | None, start: str) -> Iterator[None]:
  """Raises one line, which begins with `start`, for whatever `huggingface_hub` raises inside."""
  from huggingface_hub import constants, errors

  try:
    yield
  except Exception as error:  # of the hub's, and of the library beneath it, which differs between versions
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if isinstance(error, OSError) and error.errno is not None:  # of this machine's disk
      raise
    if isinstance(error, errors.RevisionNotFoundError):
      reason = f'{name} has no revision {revision}; name a branch, tag or commit of it'
    elif isinstance(error, errors.GatedRepoError) or status == 403:
      reason = f'{name} needs a permission; ask for it at {constants.ENDPOINT}/{name}, and run hf auth login'
    elif isinstance(error, errors.RepositoryNotFoundError) or status == 401:
      reason = f'no model {name} is visible; check its name, or run hf auth login if it is private'
    elif constants.HF_HUB_OFFLINE:
      reason = f'HF_HUB_OFFLINE is set and {name} is not in the cache; download it first'
    else:
      cause = storage.describe(error.__cause__ or error)
      raise Unavailable(f'{start}: cannot reach {constants.ENDPOINT}: {cause}') from error
    raise UserError(f'{start}: {reason}') from error
