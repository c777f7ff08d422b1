"""Weights and descriptions that make no model: refused in one line, before anything is written."""

import json
import math
import pathlib
import shutil

from etils import epath
import numpy as np
import pytest
import safetensors.numpy

from groupvit_jax.commands import import_weights as command
from groupvit_jax.commands.import_weights import import_weights
from groupvit_jax.data.tokenizer import build_tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.interop import huggingface, native, read
from groupvit_jax.predictor import Predictor
from groupvit_jax.train import initial_weights, restored_run
from tests.huggingface_models import random_model, small_config
from tests.interop.test_read import edit_config, write_folder


@pytest.fixture(scope='module')
def hub(tmp_path_factory) -> pathlib.Path:
  return write_folder(tmp_path_factory.mktemp('hub'), random_model(small_config()))


def test_weights_that_are_not_finite_are_named(hub, tmp_path):
  folder = shutil.copytree(hub, tmp_path / 'hub')
  state = safetensors.numpy.load_file(folder / 'model.safetensors')
  for name, value in (('vision_model.layernorm.weight', math.nan), ('text_projection.1.running_var', -math.inf)):
    state[name] = np.full_like(state[name], value)
  safetensors.numpy.save_file(state, folder / 'model.safetensors')
  with pytest.raises(UserError) as caught:
    import_weights(str(folder), str(tmp_path / 'run'))
  for text in ('2 arrays hold values that are not finite', 'vision_model.layernorm.weight', '.running_var'):
    assert text in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ['hub']


def test_a_workdir_that_holds_such_weights_is_refused_by_all_that_read_it(hub, tmp_path):
  weights = read.read_weights(hub)
  weights.variables['params']['vision']['positions'][0] = math.nan
  command._write(epath.Path(tmp_path / 'run'), weights, build_tokenizer(hub), 'hub')
  for read_run in (restored_run.restore, initial_weights.read_source, Predictor.from_pretrained):
    with pytest.raises(UserError, match='step 0 in .*/run holds parameters that are not finite'):
      read_run(tmp_path / 'run')


def test_every_size_of_a_huggingface_config_is_checked():
  """Zero, negative, huge, not finite, text and lists: none hangs, none is a traceback."""
  base = small_config().to_dict()
  odd = (0, -1, 10**9, 10**100, 0.5, math.nan, True, 'x', None, [], [10**9, 1], [1] * 1000, {}, [['x']])
  for part, kinds in huggingface._KINDS.items():
    for key, kind in kinds.items():
      for value in odd:
        config = json.loads(json.dumps(base))
        (config[part] if part else config)[key] = value
        try:
          huggingface.from_huggingface_config(config).build()
        except UserError as error:
          assert '\n' not in str(error)
        if not kind.accepts(value):
          name = f'{part}.{key}'.lstrip('.')
          with pytest.raises(UserError, match=f'config.json has {name}=.*: must be ') as caught:
            huggingface.from_huggingface_config(config)
          assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
  'part, value', [('vision_config', [1]), ('text_config', 'x'), ('vision_config_dict', 3), ('text_config_dict', [])]
)
def test_parts_are_objects(part, value):
  with pytest.raises(UserError, match='config.json has .*_config=.*; it must be an object'):
    huggingface.from_huggingface_config(small_config().to_dict() | {part: value})


NESTED = '[' * 100_000, '{"model_type":' * 100_000, '{"model_type": "groupvit", "x": ' * 900 + '1' + '}' * 900


@pytest.mark.parametrize('text', NESTED, ids=['list', 'object', 'less deep'])
def test_deep_nesting_is_refused_or_ignored(text, tmp_path):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match='config.json is not JSON|holds neither model.safetensors nor') as caught:
    read.read_weights(tmp_path)
  assert len(str(caught.value)) < 300


@pytest.fixture(scope='module')
def exported(hub, tmp_path_factory) -> pathlib.Path:
  """A folder as `export --format=huggingface` writes it, with its side file."""
  folder = shutil.copytree(hub, tmp_path_factory.mktemp('exported') / 'hub')
  side = native.spec_to_json(read.read_weights(hub).spec._replace(multi_label=True)) | {'multi_label_logit_scale': 2.5}
  (folder / read.SIDE_FILE).write_text(json.dumps(side))
  assert read.read_weights(folder).variables['params']['multi_label_logit_scale'] == 2.5
  return folder


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(model=[]), r'has model=\[\]; it must be an object'),
    (dict(model={}), 'config.model.dtype is missing; config.model.embed_dim is missing'),
    (dict(vocab_size=-1), 'vocab_size=-1: must be a whole number'),
    (dict(multi_label='yes'), "multi_label='yes': must be True or False"),
    (dict(multi_label_logit_scale=math.nan), 'multi_label_logit_scale=nan: must be a finite'),
    (dict(multi_label_logit_scale=None), 'multi_label_logit_scale=None: must be a finite'),
  ],
)
def test_a_description_of_ours_is_checked(change, message, exported, tmp_path):
  folder = shutil.copytree(exported, tmp_path / 'hub')
  edit_config(folder / read.SIDE_FILE, '', **change)
  with pytest.raises(UserError, match=message) as caught:
    read.read_weights(folder)
  assert '\n' not in str(caught.value)
