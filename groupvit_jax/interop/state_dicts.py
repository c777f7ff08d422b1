"""Conversion between state dicts (name -> numpy array) of torch and the model's variables, by tables of names.

A table is a sequence of `Rule`s, each pairing a path of ours with names of theirs. Placeholders ({i} stage, {j} block)
are filled from the model's own paths, so that a table serves any number of stages, depths and widths.
"""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import NamedTuple

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from groupvit_jax.errors import UserError
from groupvit_jax.model.build import build_model
from groupvit_jax.model.image_text import ImageTextModel

Array = np.ndarray | jax.Array
StateDict = dict[str, np.ndarray]


# Entries of the model's config that matter in training alone and are in no weights file: the paper's values.
TRAINING_CONFIG = dict(
  drop_path=0.1,
  assignment='gumbel',
  init=dict(
    kernel='normal:0.02', assign_kernel='normal:0.02', value_kernel='normal:0.02', tokens_std=0.02, positions_std=0.02
  ),
)


class ModelSpec(NamedTuple):
  """Arguments of `build_model` for a model that was read from elsewhere."""

  config: ml_collections.ConfigDict  # the `model` part of a config
  vocab_size: int
  eos_id: int
  multi_label: bool

  def build(self) -> ImageTextModel:
    """The model. Raises UserError where its sizes do not fit together."""
    return build_model(self.config, vocab_size=self.vocab_size, eos_id=self.eos_id, multi_label=self.multi_label)


class Layout(NamedTuple):
  """How torch stores an array of ours: as one array or several."""

  load: Callable[[Sequence[np.ndarray], tuple[int, ...]], np.ndarray]  # theirs, our shape -> ours
  save: Callable[[Array], Sequence[Array]]  # ours -> theirs


class Rule(NamedTuple):
  """One array of ours and the names that hold it."""

  ours: str  # path below the variables, as in 'params/vision/stage{i}_group_tokens'
  theirs: tuple[str, ...]  # names of the arrays it is made of
  layout: Layout


class Entry(NamedTuple):
  """A rule with its placeholders filled."""

  names: tuple[str, ...]
  layout: Layout


# torch keeps a dense kernel as [out, in]; ours is [in..., out...] with the heads apart.
SAME = Layout(lambda arrays, shape: arrays[0].reshape(shape), lambda x: (x,))
VECTOR = Layout(SAME.load, lambda x: (x.reshape(-1),))
BATCHED = Layout(SAME.load, lambda x: (x.reshape(1, -1, x.shape[-1]),))  # a leading axis of size one
KERNEL_IN = Layout(lambda arrays, shape: arrays[0].T.reshape(shape), lambda x: (x.reshape(x.shape[0], -1).T,))
KERNEL_OUT = Layout(KERNEL_IN.load, lambda x: (x.reshape(-1, x.shape[-1]).T,))
PATCH_KERNEL = Layout(lambda arrays, shape: arrays[0].transpose(2, 3, 1, 0), lambda x: (x.transpose(3, 2, 0, 1),))
SPLIT_KERNEL = Layout(
  lambda arrays, shape: np.stack([x.T for x in arrays], axis=1).reshape(shape),
  lambda x: [x[:, i].reshape(x.shape[0], -1).T for i in range(x.shape[1])],
)
SPLIT_BIAS = Layout(
  lambda arrays, shape: np.stack(arrays).reshape(shape), lambda x: [x[i].reshape(-1) for i in range(x.shape[0])]
)


def array(ours: str, theirs: str, layout: Layout = SAME) -> tuple[Rule, ...]:
  """A single parameter."""
  return (Rule(f'params/{ours}', (theirs,), layout),)


def norm(ours: str, theirs: str) -> tuple[Rule, ...]:
  """LayerNorm."""
  return *array(f'{ours}/scale', f'{theirs}.weight'), *array(f'{ours}/bias', f'{theirs}.bias')


def dense(ours: str, theirs: str, kernel: Layout = KERNEL_IN) -> tuple[Rule, ...]:
  """Linear or, with another kernel layout, convolution."""
  return *array(f'{ours}/kernel', f'{theirs}.weight', kernel), *array(f'{ours}/bias', f'{theirs}.bias', VECTOR)


def mlp(ours: str, theirs: str, fc1: str = 'fc1', fc2: str = 'fc2') -> tuple[Rule, ...]:
  """Two dense layers."""
  return *dense(f'{ours}/fc1', f'{theirs}.{fc1}'), *dense(f'{ours}/fc2', f'{theirs}.{fc2}')


def batch_norm(ours: str, theirs: str) -> tuple[Rule, ...]:
  """BatchNorm with its running statistics."""
  statistics = (('mean', 'running_mean'), ('var', 'running_var'))
  return *norm(ours, theirs), *(
    Rule(f'batch_stats/{ours}/{mine}', (f'{theirs}.{name}',), SAME) for mine, name in statistics
  )


def abstract_variables(model: ImageTextModel) -> dict:
  """Shapes and dtypes of a model's variables, {'params': ..., 'batch_stats': ...}, without computing them."""
  images = jax.ShapeDtypeStruct((1, *model.vision.image_size, 3), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, 1, model.text.context_length), jnp.int32)
  return jax.eval_shape(model.init, jax.random.key(0), images, tokens)


def mlp_ratio(width: int, hidden: int) -> float:
  """The ratio with int(width * ratio) == hidden, which hidden / width may miss by a rounding."""
  ratio = hidden / width
  return ratio if int(width * ratio) == hidden else float(np.nextafter(ratio, np.inf))


def name_map(variables: Mapping, rules: Sequence[Rule]) -> dict[str, Entry]:
  """For each path of `variables` (arrays or their shapes) the names that hold it.

  Raises:
    UserError: the table has no rule for a path.
  """
  patterns = [(re.compile(re.sub(r'\\{(\w)\\}', r'(?P<\1>\\d+)', re.escape(rule.ours))), rule) for rule in rules]
  result = {}
  for path in traverse_util.flatten_dict(variables, sep='/'):
    found = [(match, rule) for pattern, rule in patterns if (match := pattern.fullmatch(path))]
    if not found:
      raise UserError(f'{path} has no counterpart in this format')
    match, rule = found[0]
    result[path] = Entry(tuple(name.format(**match.groupdict()) for name in rule.theirs), rule.layout)
  return result


def from_state_dict(
  state: Mapping[str, np.ndarray], abstract: Mapping, rules: Sequence[Rule], ignore: str = r'(?!)'
) -> dict:
  """Variables of ours from a state dict.

  Args:
    state: name -> array, of any floating dtype.
    abstract: shapes of our variables, from `abstract_variables`.
    rules: the table of names.
    ignore: regular expression of names to ignore.

  Returns:
    Nested {'params': ..., 'batch_stats': ...} of float32 numpy arrays.

  Raises:
    UserError: names are missing, unexpected, misshapen or not floating point, or values not finite; all are listed.
  """
  leaves, entries = traverse_util.flatten_dict(abstract, sep='/'), name_map(abstract, rules)
  expected = {}
  for path, entry in entries.items():
    saved = jax.eval_shape(entry.layout.save, jax.ShapeDtypeStruct(leaves[path].shape, jnp.float32))
    expected |= {name: leaf.shape for name, leaf in zip(entry.names, saved, strict=True)}
  check_names({name: x for name, x in state.items() if not re.fullmatch(ignore, name)}, expected)
  flat, bad = {}, []
  for path, entry in entries.items():
    arrays = [np.asarray(state[name], np.float32) for name in entry.names]
    bad += [name for name, x in zip(entry.names, arrays) if not np.isfinite(x).all()]
    flat[path] = np.asarray(entry.layout.load(arrays, leaves[path].shape), order='C')
  if bad:
    raise UserError(f'{len(bad)} arrays hold values that are not finite: {", ".join(bad)}; download the weights again')
  return traverse_util.unflatten_dict(flat, sep='/')


def to_state_dict(variables: Mapping, rules: Sequence[Rule]) -> StateDict:
  """The state dict of our variables; the inverse of `from_state_dict`.

  Raises:
    UserError: a parameter has no counterpart in the format.
  """
  flat = traverse_util.flatten_dict(variables, sep='/')
  state = {}
  for path, entry in name_map(variables, rules).items():
    arrays = entry.layout.save(np.asarray(flat[path]))
    state.update({name: np.asarray(x, order='C') for name, x in zip(entry.names, arrays, strict=True)})
  return state


def cast(state: Mapping[str, np.ndarray], dtype: np.dtype) -> StateDict:
  """Floating-point arrays in another dtype; counters keep theirs."""
  return {name: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for name, x in state.items()}


def check_names(state: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
  """Raises one UserError that lists all misfits between arrays and expected shapes, both by name."""
  common = [name for name in expected if name in state]
  problems = {
    'missing': [name for name in expected if name not in state],
    'unexpected': [name for name in state if name not in expected],
    'misshapen': [
      f'{name} {tuple(state[name].shape)} instead of {tuple(expected[name])}'
      for name in common
      if tuple(state[name].shape) != tuple(expected[name])
    ],
    'not floating point': [
      f'{name} ({state[name].dtype})' for name in common if not jnp.issubdtype(state[name].dtype, jnp.floating)
    ],
  }
  found = [f'{len(names)} {kind}: ' + ', '.join(names) for kind, names in problems.items() if names]
  if found:
    raise UserError('the weights do not fit the model; ' + '; '.join(found))
