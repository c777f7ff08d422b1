"""The experiments: complete, the paper's, and able to train."""

import pathlib
import shutil

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import groupvit_vits16_gcc_redcaps, groupvit_vits16_gcc_yfcc, quickstart
from groupvit_jax import cli
from groupvit_jax.data import augment, rand_augment
from groupvit_jax.model.build import build_model, build_random_erasing
from groupvit_jax.model.pixels import RandomErasing
from groupvit_jax.running import sharding
from groupvit_jax.train import loop, optim
from groupvit_jax.train import state as train_state
from tests.board import read_board
from tests.runs import read_log, run_command
from tests.tars import samples, set_config, write_set, write_tar

RECIPES = [groupvit_vits16_gcc_yfcc, groupvit_vits16_gcc_redcaps]
MACHINES = ['', '8gpu', '1gpu']


def flat(config: ml_collections.ConfigDict) -> dict[str, object]:
  """Entries by dotted key."""
  return flatten_dict(config.to_dict(), sep='.')


def shrink(config: ml_collections.ConfigDict, folder: pathlib.Path) -> ml_collections.ConfigDict:
  """The experiment on a few small pictures and a small model, for a few steps."""
  config.batch_size, config.total_steps, config.log_every = 16, 3, 1
  config.remat, config.text_budget = 'none', 0  # quicker to compile, and tested elsewhere
  config.optim.warmup_steps, config.checkpoint.every_steps = 1, 100
  config.data.num_workers, config.data.num_threads = 0, 2
  config.data.max_fault_share = 0.5
  with config.unlocked():
    config.data.sets = dict(
      a=set_config(write_set(folder / 'a', 20)),
      b=set_config(write_tar(folder / 'b.tar', samples(range(20, 32)) | {'00021.jpg': b'none', '00022.txt': b' '})),
    )
  config.tokenizer.vocab_size = 300
  config.model.update(embed_dim=8, projector_dim=16, dtype='float32')
  config.model.vision.update(
    image_size=(32, 32), width=16, num_heads=2, depths=(1, 1), num_group_tokens=(4, 0), num_segments=(4, 0)
  )
  config.model.text.update(context_length=24, width=16, depth=1, num_heads=2)
  return config


@pytest.mark.parametrize('machine', MACHINES)
@pytest.mark.parametrize('recipe', RECIPES)
def test_every_key_of_the_quickstart_is_there(recipe, machine):
  other = lambda key: key.startswith(
    ('data.scenes', 'data.sets', 'data.augment', 'data.index_dir', 'data.clean_captions', 'benchmarks')
  )
  keys = {key for key in flat(recipe.get_config(machine)) if not other(key)}
  assert keys == {key for key in flat(quickstart.get_config()) if not other(key)}


@pytest.mark.parametrize('machine', MACHINES)
@pytest.mark.parametrize(
  'recipe, variant, expected',
  [
    (RECIPES[0], '', set()),
    (RECIPES[1], '', set()),
    (RECIPES[0], 'named', {'multi_label_loss', 'data.skipped_words'}),
    (RECIPES[1], 'clip_tokenizer', {'tokenizer.path'}),
  ],
)
def test_variants_change_what_their_names_say(recipe, variant, expected, machine):
  """And machines memory and workers alone."""
  base, changed = recipe.get_config(), recipe.get_config(f'{machine}_{variant}'.strip('_'))
  keys = {key for key, value in flat(changed).items() if value != flat(base)[key]}
  assert keys - {'grad_accum_steps', 'remat', 'data.num_workers', 'data.num_threads'} == expected
  assert (changed.grad_accum_steps > 1) == (machine == '1gpu') and bool(machine) <= bool(keys)
  assert changed.multi_label_loss == ('best_segment' if variant == 'named' else 'pooled')


def test_recipes_are_the_papers():
  yfcc, redcaps = (recipe.get_config() for recipe in RECIPES)
  assert yfcc.total_steps == 30 * ((2_891_445 + 11_156_203 + 14_615_499) // 4096) == 209_910
  assert redcaps.total_steps == 30 * ((2_891_445 + 11_156_203 + 11_866_987) // 4096) == 189_780
  assert (yfcc.data.num_prompts, redcaps.data.num_prompts) == (3, 0)
  for config in (yfcc, redcaps):
    schedule = optim.build_schedule(config.optim, config.total_steps, config.batch_size)
    two_epochs = config.total_steps // 15
    np.testing.assert_allclose(
      [schedule(0), schedule(two_epochs - 1), schedule(config.total_steps)], [4e-6, 1.6e-3, 4e-5], rtol=1e-4
    )
    assert augment.build_augment(config.data.augment, config.model.vision.image_size) == augment.Augment(
      (224, 224), (0.08, 1.0), (3 / 4, 4 / 3), 0.5, rand_augment.RandAugment(0.5, 9.0, 0.5)
    )
    assert build_random_erasing(config.data.augment) == RandomErasing(0.25)
    assert config.model.dtype == 'bfloat16'


def test_recipes_build_the_released_model():
  for recipe, prompts in ((RECIPES[1], 0), (RECIPES[0], 3)):
    config, mesh = recipe.get_config('1gpu'), sharding.make_mesh()
    model = build_model(config.model, vocab_size=49408, eos_id=49407, multi_label=prompts > 0, remat=config.remat)
    schedule = optim.build_schedule(config.optim, config.total_steps, config.batch_size)
    tx = optim.build_optimizer(config.optim, schedule)
    state = train_state.abstract_state(model, tx, (1 + prompts, 77), mesh)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == 55_726_609 + (prompts > 0)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--config=configs/groupvit_vits16_gcc_redcaps.py:2gpu'], "no variant '2gpu'"),
    (['--config=configs/quickstart.py', '--num_processes=0'], '--num_processes=0: 0 is not a positive integer'),
    (
      ['--config=groupvit_vits16_gcc_yfcc', '--config.data.sets.mine.path=x'],
      '--config.data.sets.mine.path=x: the config has no such entry. Add the set in a copy',
    ),
    (['--config=configs/none.py'], "--config: [Errno 2] No such file or directory: 'configs/none.py'; configs/ holds"),
    (
      ['--config=configs/quickstart.py', '--config.batch_sze=8'],
      '--config.batch_sze=8: the config has no such entry. Did you mean "batch_size" instead of "batch_sze"?',
    ),
  ],
)
def test_unknown_keys_and_other_mistakes_take_one_line(flags, message, tmp_path):
  done = run_command('train.py', *flags, f'--workdir={tmp_path}/run')
  assert done.returncode == cli.EXIT_USAGE and message in done.stderr.splitlines()[-1], done.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.usefixtures('one_device')
def test_the_whole_recipe_trains(tmp_path, monkeypatch):
  """Tars, faults, RandAugment, prompts, random erasing and pictures in one run, which goes on exactly."""
  erasing = RandomErasing.__call__
  erased = []
  monkeypatch.setattr(RandomErasing, '__call__', lambda *args: erased.append(args[1].shape) or erasing(*args))
  config, run = shrink(groupvit_vits16_gcc_yfcc.get_config('8gpu_named'), tmp_path), tmp_path / 'run'
  config.checkpoint.every_steps, config.eval.every_steps = 1, 2
  assert loop.train(config, run) == 0
  assert set(erased) == {(16, 32, 32, 3)}
  first, *_, last = lines = read_log(run)
  assert np.isfinite(first['train/loss']) and first['train/multi_label_loss'] > 0
  assert first['train/learning_rate'] == pytest.approx(4e-6 * 16 / 4096)
  assert last['step'] == 3 and last['data/faults/image_corrupt'] >= 1 and last['data/faults/caption_empty'] >= 1
  step, panel = read_board(run / 'tensorboard')['train/pictures']
  assert step == 3 and panel.shape[0] > 4 * 256 and panel.shape[1] == 6 + 2 * (256 + 6)  # four pictures, their groups
  for step in (2, 3):  # as if it had been killed after the first
    shutil.rmtree(run / 'checkpoints' / str(step))
  shutil.rmtree(run / 'tensorboard')
  assert loop.train(config, run) == 0
  without_clock = lambda found: [{key: line[key] for key in line if key != 'train/images_per_s'} for line in found]
  assert without_clock(read_log(run)) == without_clock(lines) and 3 <= len(lines)
