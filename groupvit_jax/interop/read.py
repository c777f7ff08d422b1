"""Reads weights in any known format: Hugging Face folders, authors' checkpoints, our own exports."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import re
from typing import Any, NamedTuple

from etils import epath
import numpy as np
import safetensors

from groupvit_jax.config_entries import check_value, number
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.interop import huggingface, native, nvlabs, state_dicts, torch_file
from groupvit_jax.interop import licence as licence_lib
from groupvit_jax.interop.licence import Licence
from groupvit_jax.storage import check_local

# Beside an exported model's config.json: entries that `transformers` does not have.
SIDE_FILE = 'groupvit_jax.json'


class Weights(NamedTuple):
  """Weights and the model they belong to."""

  spec: state_dicts.ModelSpec
  variables: dict[str, Any]  # {'params': ..., 'batch_stats': ...}, float32
  form: str  # the format, for people
  licence: Licence


def read_weights(path: epath.PathLike) -> Weights:
  """Reads a Hugging Face folder, a folder that `export --format=safetensors` wrote, or an authors' `.pth` file.

  Raises:
    UserError: nothing is there, it is damaged, or it is not GroupViT's.
  """
  check_local(path)
  path = epath.Path(path)
  if not path.exists():
    raise UserError(f'there is no file or folder {path}')
  if not path.is_dir():
    state = torch_file.read_state_dict(path)
    with _prefix_errors(path):
      return _from_authors(state)
  config = _read_json(path / 'config.json')
  state = _read_state_dict(path)
  licence = licence_lib.read_card(path)
  with _prefix_errors(path):
    if config.get('model_type') == native.MODEL_TYPE:
      return _from_flat(state, config, licence)
    side = _read_json(path / SIDE_FILE) if (path / SIDE_FILE).exists() else None
    return _from_huggingface(state, config, side, licence)


def check_tokenizer(tokenizer: Tokenizer, *, vocab_size: int, eos_id: int, remedy: str) -> None:
  """Raises UserError with the remedy when a tokenizer has not the `vocab_size` and `eos_id` of the weights."""
  for name, value in (('vocab_size', vocab_size), ('eos_id', eos_id)):
    if getattr(tokenizer, name) != value:
      raise UserError(f'the tokenizer has {name}={getattr(tokenizer, name)} and the weights have {value}; {remedy}')


def _from_authors(state: Mapping[str, np.ndarray]) -> Weights:
  spec = nvlabs.spec_from_shapes(state)
  variables = nvlabs.from_nvlabs(state, state_dicts.abstract_variables(spec.build()))
  licence = "the file names none; the authors' code is for non-commercial use, see the page that the weights come from"
  return Weights(spec, variables, "an authors' checkpoint", Licence(name=licence))


def _from_flat(state: Mapping[str, np.ndarray], config: Mapping[str, Any], licence: Licence) -> Weights:
  spec = native.spec_from_json(config)
  variables = native.from_flat(state, state_dicts.abstract_variables(spec.build()))
  return Weights(spec, variables, 'a folder of export --format=safetensors', licence)


def _from_huggingface(
  state: Mapping[str, np.ndarray], config: Mapping[str, Any], side: Mapping[str, Any] | None, licence: Licence
) -> Weights:
  """`side` comes with an export of ours: the rest of the config and the prompts' temperature."""
  spec = huggingface.from_huggingface_config(config) if side is None else native.spec_from_json(side)
  without_prompts = spec._replace(multi_label=False)
  variables = huggingface.from_huggingface(state, state_dicts.abstract_variables(without_prompts.build()))
  if spec.multi_label:
    scale = side.get('multi_label_logit_scale')
    check_value('multi_label_logit_scale', scale, number(-100, 100))
    variables['params']['multi_label_logit_scale'] = np.array(scale, np.float32)
  return Weights(spec, variables, 'a Hugging Face folder', licence)


def _read_json(path: epath.Path) -> dict[str, Any]:
  if not path.exists():
    raise UserError(f'{path.parent} holds no {path.name}; name a folder that has one, or a .pth file')
  try:
    values = json.loads(path.read_text())
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON ({error}); download it again') from error
  if not isinstance(values, dict):
    raise UserError(f'{path} is not a JSON object; download it again')
  return values


def _read_safetensors(path: epath.Path) -> dict[str, np.ndarray]:
  if not path.exists():
    raise UserError(f'there is no file {path}')
  try:
    with safetensors.safe_open(str(path), framework='np') as file:
      return {name: file.get_tensor(name) for name in file.keys()}
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f'{path} cannot be read: {error}; download it again') from error


# Tried in this order, each whole or as shards that an index lists.
_READERS: dict[str, Callable[[epath.Path], dict[str, np.ndarray]]] = {
  'model.safetensors': _read_safetensors,
  'pytorch_model.bin': torch_file.read_state_dict,
}


def _read_state_dict(folder: epath.Path) -> dict[str, np.ndarray]:
  for name, read in _READERS.items():
    if (folder / name).exists():
      return read(folder / name)
    index = folder / f'{name}.index.json'
    if index.exists():
      files = _read_json(index).get('weight_map')
      names = list(files.values()) if isinstance(files, dict) else [None]
      if not all(isinstance(shard, str) and re.fullmatch(r'[\w-][\w.-]*', shard) for shard in names):
        raise UserError(f'{index} has no weight_map from arrays to files beside it; download it again')
      shards = sorted(set(names))
      if missing := [shard for shard in shards if not (folder / shard).exists()]:
        raise UserError(f'{folder} lacks {", ".join(missing)}, which {index.name} lists; download them')
      return {key: x for shard in shards for key, x in read(folder / shard).items()}
  raise UserError(f'{folder} holds neither {" nor ".join(_READERS)}, whole or in shards; download the weights')


@contextlib.contextmanager
def _prefix_errors(path: epath.Path) -> Iterator[None]:
  """Prefixes the message of an error with the path."""
  try:
    yield
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path}: {error}') from error
