"""Our own format: arrays by their paths in the model, and a JSON description of the model."""

from collections.abc import Mapping
import json
from typing import Any

from flax import traverse_util
import ml_collections
import numpy as np

from groupvit_jax import config_entries
from groupvit_jax.errors import UserError
from groupvit_jax.interop import state_dicts

MODEL_TYPE = 'groupvit_jax'

_KEYS = ('model', 'vocab_size', 'eos_id', 'multi_label')


def to_flat(variables: Mapping) -> state_dicts.StateDict:
  """Variables by path, as in 'params/vision/positions'."""
  return {path: np.asarray(x, order='C') for path, x in traverse_util.flatten_dict(variables, sep='/').items()}


def from_flat(state: Mapping[str, np.ndarray], abstract: Mapping) -> dict:
  """The inverse of `to_flat`; raises as `state_dicts.from_state_dict` does."""
  paths = traverse_util.flatten_dict(abstract, sep='/')
  rules = [state_dicts.Rule(path, (path,), state_dicts.SAME) for path in paths]
  return state_dicts.from_state_dict(state, abstract, rules)


def spec_to_json(spec: state_dicts.ModelSpec) -> dict[str, Any]:
  """A spec as plain values."""
  return {'model_type': MODEL_TYPE, 'model': json.loads(spec.config.to_json())} | {
    key: getattr(spec, key) for key in _KEYS[1:]
  }


def spec_from_json(values: Mapping[str, Any]) -> state_dicts.ModelSpec:
  """The inverse of `spec_to_json`. Raises UserError for what makes no model."""
  if missing := [key for key in _KEYS if key not in values]:
    raise UserError(f'the description of the model lacks {", ".join(missing)}')
  if not isinstance(values['model'], dict):
    raise UserError(f'the description of the model has model={values["model"]!r}; it must be an object')
  spec = state_dicts.ModelSpec(ml_collections.ConfigDict(values['model']), *(values[key] for key in _KEYS[1:]))
  config_entries.check(spec.config, 'model', complete=True)
  for key in ('vocab_size', 'eos_id'):
    config_entries.check_value(key, values[key], config_entries.whole(0, 10**7))
  config_entries.check_value('multi_label', values['multi_label'], config_entries.SWITCH)
  return spec
