"""Initial weights of a run: random, or read from elsewhere (`config.init_from`)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from flax import traverse_util
import jax
import ml_collections
import numpy as np
import optax

from groupvit_jax.data.tokenizer import build_tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.interop import hub, read, state_dicts
from groupvit_jax.interop import licence as licence_lib
from groupvit_jax.interop.licence import Licence
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.model.vision import resize_positions
from groupvit_jax.train import restored_run
from groupvit_jax.train import state as train_state
from groupvit_jax.train.state import TrainState

_POSITIONS = 'params/vision/positions'
_PROMPTS_SCALE = 'params/multi_label_logit_scale'


class Source(NamedTuple):
  """Weights from elsewhere."""

  variables: dict[str, Any]  # {'params': ..., 'batch_stats': ...}, as they are there
  eos_id: int
  licence: Licence


def initial_state(
  model: ImageTextModel,
  tx: optax.GradientTransformation,
  seed: int,
  text_shape: tuple[int, int],
  mesh: jax.sharding.Mesh,
  *,
  weights: Source | None = None,
  average: bool = False,
) -> TrainState:
  """The state at step 0 for tokens of `text_shape` (T, L), with weights from elsewhere if there are any."""
  state = train_state.init_state(model, tx, seed, text_shape, mesh)
  if weights is not None:
    variables = fit_variables(weights.variables, state.variables)
    state = state.replace(**jax.tree.map(_shard, variables, state.variables))
  return state.start_average() if average else state


def read_source(path: epath.PathLike) -> Source:
  """Reads weights from elsewhere.

  That is a workdir (of which the moving average is taken, if there is one), a Hugging Face folder, a folder of
  `export`, a `.pth` file, or an id of the Hub (see `hub.fetch`).
  """
  path = hub.fetch(path)
  if _is_workdir(path):
    run = restored_run.restore(path)
    return Source(jax.tree.map(np.asarray, run.variables), run.tokenizer.eos_id, licence_lib.read_kept(path))
  found = read.read_weights(path)
  return Source(found.variables, found.spec.eos_id, found.licence)


def fit_variables(found: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
  """Weights from elsewhere in the shapes of a model.

  Position embeddings are resized to the model's images. A temperature of the prompts that the source lacks is
  initialised; one that the model lacks is left out.

  Args:
    found: as read.
    like: the model's variables, or their shapes.

  Raises:
    UserError: lists all names that are missing, unexpected or misshapen.
  """
  theirs, ours = (traverse_util.flatten_dict(tree, sep='/') for tree in (found, like))
  if _POSITIONS in theirs and theirs[_POSITIONS].shape[2:] == ours[_POSITIONS].shape[2:]:
    theirs[_POSITIONS] = np.asarray(resize_positions(theirs[_POSITIONS], *ours[_POSITIONS].shape[:2]))
  if _PROMPTS_SCALE in ours:
    theirs.setdefault(_PROMPTS_SCALE, ours[_PROMPTS_SCALE])
  else:
    theirs.pop(_PROMPTS_SCALE, None)
  state_dicts.check_names(theirs, {name: leaf.shape for name, leaf in ours.items()})
  return traverse_util.unflatten_dict(theirs, sep='/')


def with_tokenizer(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The `tokenizer` part of a config; without a path of its own it names the one that the weights came with."""
  tokenizer = config.tokenizer.copy_and_resolve_references()
  if not config.init_from or tokenizer.path:
    return tokenizer
  path = hub.fetch(config.init_from)
  if path.exists() and not path.is_dir():
    raise UserError(f'init_from={config.init_from!r} comes without a tokenizer; name it in tokenizer.path')
  tokenizer.path = str(path / 'tokenizer' if _is_workdir(path) else path)
  return tokenizer


def read_checked(config: ml_collections.ConfigDict, model: ImageTextModel) -> Source:
  """Reads the weights that a config names, and checks that they and the tokenizer fit the model, of any vocabulary."""
  name = f'init_from={config.init_from!r}'
  if not hub.fetch(config.init_from).exists():
    raise UserError(f'{name}: there is no such file or folder')
  tokenizer, source = build_tokenizer(with_tokenizer(config).path), read_source(config.init_from)
  model = model.clone(text=model.text.clone(vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id))
  try:
    fit_variables(source.variables, state_dicts.abstract_variables(model))
    read.check_tokenizer(
      tokenizer,
      vocab_size=tokenizer.vocab_size,
      eos_id=source.eos_id,
      remedy='name the one they were trained with in tokenizer.path',
    )
  except ValueError as error:
    raise UserError(f'{name}: {error}') from error
  return source


def _is_workdir(path: epath.Path) -> bool:
  return (path / 'checkpoints').is_dir()


def _shard(value: Any, like: jax.Array) -> jax.Array:
  """A copy of the value with the sharding of `like`, over any number of processes."""
  value = np.asarray(value, like.dtype)
  return jax.make_array_from_callback(like.shape, like.sharding, lambda index: value[index])
