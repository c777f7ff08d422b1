"""Config entries: all described, each checked before anything is written, and listed in docs/config.md."""

import copy
import functools
import importlib
import math
import operator
import pathlib
import re
from typing import get_args

import jax
import ml_collections
import pytest

from configs import groupvit_vits16_gcc_yfcc, quickstart
from groupvit_jax import config_entries
from groupvit_jax.data import augment, prompts, sources
from groupvit_jax.errors import UserError
from groupvit_jax.interop.state_dicts import abstract_variables
from groupvit_jax.model.build import build_model, build_random_erasing
from groupvit_jax.model.layers import Remat
from groupvit_jax.model.losses import MultiLabel
from groupvit_jax.running import sharding
from groupvit_jax.train import dry_run, loop, optim, workdir
from tests.tiny import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
MACHINES = groupvit_vits16_gcc_yfcc.MACHINES
PAPER = [f'{machine}_{end}'.strip('_') for machine in MACHINES for end in ('', 'clip_tokenizer')]
VARIANTS = {
  'quickstart': [*quickstart.THINGS],
  'groupvit_vits16_gcc_yfcc': [f'{variant}_{end}'.strip('_') for variant in PAPER for end in ('', 'named')],
  'groupvit_vits16_gcc_redcaps': PAPER,
  'own_pairs': ('', 'tiny'),
  'groupvit_vitb16_gcc_yfcc': [None],
  'groupvit_vitl16_gcc_yfcc': [None],
}
ODD = (math.nan, math.inf, -math.inf, -1, 0, 10**9, 0.5, True, 'x', '', None, (), (-1, -1), (math.nan, 1), {'a': 1})


def stock_configs() -> list[ml_collections.ConfigDict]:
  """Every config that comes along, in every variant."""
  modules = {name: importlib.import_module(f'configs.{name}') for name in VARIANTS}
  assert {path.stem for path in (ROOT / 'configs').glob('[!_]*.py')} == set(modules)
  return [
    modules[name].get_config(*(() if variant is None else (variant,)))
    for name, variants in VARIANTS.items()
    for variant in variants
  ]


def allows(words: str, value: object) -> bool:
  """Whether words allow a value, read independently of what made them."""
  if isinstance(value, bool):
    return words == 'True or False'
  if match := re.fullmatch(r'a whole number from (\S+) to ([\d,]+)(?:, or (-?\d+))?', words):
    low, high, also = (int((text or '0').replace(',', '')) for text in match.groups())
    return type(value) is int and (low <= value <= high or match[3] is not None and value == also)
  if match := re.fullmatch(r'a finite number (above|of at least) (\S+) and (below|at most) ([\d,]+)(, or inf)?', words):
    low, high = (float(match[group].replace(',', '')) for group in (2, 4))
    if type(value) not in (int, float):
      return False
    if math.isinf(value) and value > 0 and match[5]:
      return True
    fits_low = value > low if match[1] == 'above' else value >= low
    return fits_low and (value < high if match[3] == 'below' else value <= high)
  if words.startswith('one of '):
    return repr(value) in words.removeprefix('one of ').split(', ')
  if words.startswith('names with values'):
    return isinstance(value, dict)
  if words.startswith(('texts between', 'whole numbers between')):
    return value == ()
  if words.startswith(('text', 'a path')):
    return isinstance(value, str) and (value != '' or words == 'text')
  assert words == 'True or False' or words.startswith(('two ', 'whole numbers', "'normal:"))
  return False


def test_every_entry_is_described_and_every_description_is_used():
  configs = stock_configs()
  for config in configs:
    config_entries.check(workdir.upgrade_config(config))
  used = {name for config in configs for name, _, _ in config_entries.flatten(config)}
  assert used - {'data.sets', 'benchmarks'} == set(config_entries.ENTRIES)
  for name, known in (('remat', Remat), ('multi_label_loss', MultiLabel)):
    assert config_entries.ENTRIES[name].kind == config_entries.choice(*get_args(known))._replace(
      accepts=config_entries.ENTRIES[name].kind.accepts
    )
  for name in ('full', 'subset', 'simple', 'identity'):
    assert prompts.template_set(name) and repr(name) in config_entries.ENTRIES['data.prompt_templates'].kind.words


def test_what_words_do_not_allow_is_refused_by_entry_value_and_words():
  """And what passes makes a run, or ends it with one line, too."""
  built = 0
  bases = quickstart.get_config(), groupvit_vits16_gcc_yfcc.get_config()  # the second adds data sets and benchmarks
  entries = {name: (path, base.to_dict()) for base in bases[::-1] for name, path, _ in config_entries.flatten(base)}
  for name, (path, base) in entries.items():
    *sections, key = path.split('.')
    words = config_entries.ENTRIES[name].kind.words if name not in ('data.sets', 'benchmarks') else ''
    for value in ODD if words else ():
      values = copy.deepcopy(base)
      functools.reduce(operator.getitem, sections, values)[key] = value
      config = ml_collections.ConfigDict(values)
      if allows(words, value):
        config_entries.check(config)
        built += build(config, shapes=path.startswith('model.'))
      else:
        with pytest.raises(UserError) as caught:
          config_entries.check(config)
        assert str(caught.value) == f'config.{path}={value!r}: must be {words}'
  assert built > 20


def build(config: ml_collections.ConfigDict, *, shapes: bool) -> bool:
  """Whether a config makes all that a run needs before its data; else it ends with one line."""
  try:
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size('batch_size', config.batch_size, mesh)
    sharding.check_micro_batches(config.batch_size, config.grad_accum_steps, mesh)
    schedule = optim.build_schedule(config.optim, config.total_steps, config.batch_size)
    optim.build_optimizer(config.optim, schedule)
    augment.build_augment(config.data.augment, config.model.vision.image_size)
    build_random_erasing(config.data.augment)
    if config.data.source == 'scenes' and 'scenes' in config.data:
      sources.build_scenes(config.data.scenes, config.model.vision.image_size, 'validation')
    model = build_model(config.model, vocab_size=99, eos_id=1, multi_label=config.data.num_prompts > 0)
    if shapes:
      abstract_variables(model)
  except UserError as error:
    assert '\n' not in str(error)
    return False
  return True


@pytest.mark.parametrize('width, heads, ratio', [(2, 1, 0.5), (65_536, 1024, 64.0)])
def test_extreme_widths_make_a_model(width, heads, ratio):
  config = tiny_config().model
  config.update(embed_dim=width, projector_dim=width)
  for tower in (config.vision, config.text):
    tower.update(width=width, num_heads=heads, mlp_ratio=ratio)
  variables = abstract_variables(build_model(config, vocab_size=9, eos_id=1, multi_label=True))
  assert all(leaf.size for leaf in jax.tree.leaves(variables))


def test_nothing_is_written_for_a_mistake_and_all_are_listed(tmp_path):
  config = tiny_config()
  config.optim.peak_lr, config.model.vision.depths, config.batch_size = math.nan, (-1, -1), 0
  for start in (loop.train, dry_run.check):
    with pytest.raises(UserError) as caught:
      start(config, tmp_path / 'run')
    for line in (
      'config.batch_size=0: must be a whole number from 1 to 1,048,576',
      'config.model.vision.depths=(-1, -1): must be two to eight whole numbers from 1 to 256',
      'config.optim.peak_lr=nan: must be a finite number above 0 and at most 100',
    ):
      assert line in str(caught.value)
  config = tiny_config()
  config.model.vision.patch_size = 5
  with pytest.raises(UserError, match=r'model.vision.patch_size=5 does not divide image_size=\(32, 32\)'):
    loop.train(config, tmp_path / 'run')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'change, message',
  [
    (dict(momentum=0.9), 'config.optim.momentum=0.9: there is no such entry; docs/config.md lists all'),
    (dict(beta1=dict(a=1)), r"config.optim.beta1={'a': 1}: must be a finite"),
    (dict(beta1=10**100), 'config.optim.beta1=1000.*000...: must be a finite number of at least 0 and below 1'),
  ],
)
def test_what_a_config_file_adds_is_checked(change, message):
  config = tiny_config()
  with config.unlocked():
    config.optim = ml_collections.ConfigDict(config.optim.to_dict() | change)
  with pytest.raises(UserError, match=message):
    config_entries.check(config)
  config = ml_collections.ConfigDict(config.to_dict() | dict(optim=3))
  with pytest.raises(UserError, match='config.optim=3: is a section, not a value'):
    config_entries.check(workdir.upgrade_config(config))


@pytest.mark.parametrize(
  'name, value, accepted',
  [
    ('data.augment.area', (0.5, 0.1), False),
    ('data.augment.area', [0.1, 0.1], True),
    ('data.augment.area', (0.0, 1.0), False),
    ('data.augment.ratio', (2.0, 1.0), False),
    ('model.vision.depths', [1, 2, 3], True),
    ('model.vision.image_size', (224,), False),
    ('model.vision.init.kernel', 'fan_in:1e-3', True),
    ('model.vision.init.kernel', 'normal:0', False),
    ('model.vision.init.kernel', 'normal:nan', False),
    ('model.vision.init.kernel', 'uniform:1', False),
    ('model.vision.init.kernel', 'normal:1e999', False),
    ('data.scenes.things', 'dog', False),
    ('data.sets.NAME.path', ('a.tar', 'b.tar'), True),
    ('data.sets.NAME.path', (), False),
    ('optim.clip_norm', math.inf, True),
    ('mesh.data', -1, True),
  ],
)
def test_values_of_several_parts(name, value, accepted):
  assert config_entries.ENTRIES[name].kind.accepts(value) == accepted


def test_the_page_is_up_to_date():
  assert (ROOT / 'docs' / 'config.md').read_text() == config_entries.page()
