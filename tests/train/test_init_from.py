"""Runs that start from weights of elsewhere: which weights, in which shapes, and when not."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch

from groupvit_jax.commands.score import evaluate_benchmark, Request
from groupvit_jax.interop import licence, read
from groupvit_jax.interop.licence import Licence
from groupvit_jax.interop.native import to_flat
from groupvit_jax.train import loop, restored_run
from groupvit_jax.train import run as run_lib
from groupvit_jax.train.checkpoint import Checkpoints
from tests.data.test_tokenizer import write_clip_folder
from tests.huggingface_models import authors_config, authors_state, random_model, small_config
from tests.interop.test_read import edit_config, write_folder
from tests.runs import logged
from tests.tiny import tiny_config
from tests.trained import trained_workdir


def config(**changes):
  """A run that starts from the tiny one."""
  result = tiny_config()
  result.init_from, result.seed = str(trained_workdir()), 5
  result.update(changes)
  return result


def start(config, workdir):
  """The state that a run starts from, and the run."""
  run = run_lib.set_up(config, workdir)
  checkpoints = Checkpoints(workdir, keep=1)
  try:
    return run_lib.restore_or_init(run, checkpoints), run
  finally:
    checkpoints.close()


def assert_equal(found, expected, but=()) -> None:
  found, expected = to_flat(found), to_flat(expected)
  assert found.keys() == expected.keys()
  for name in found.keys() - set(but):
    np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_another_size_of_pictures_over_sharded_parameters(tmp_path):
  changed = config(ema_decay=0.5)
  changed.mesh.fsdp, changed.model.vision.image_size = 2, (48, 48)
  source = restored_run.restore(trained_workdir())
  state, run = start(changed, tmp_path / 'run')
  assert int(state.step) == 0 and run.tokenizer.vocab_size == source.tokenizer.vocab_size
  assert 'fsdp' in state.params['vision']['stage0_block0']['attn']['qkv']['kernel'].sharding.spec
  assert_equal(state.variables, source.variables, but=['params/vision/positions'])
  assert_equal(state.ema, state.variables)
  before = torch.tensor(np.asarray(source.variables['params']['vision']['positions']))
  resized = torch.nn.functional.interpolate(before.permute(2, 0, 1)[None], size=(6, 6), mode='bicubic')[0]
  np.testing.assert_allclose(state.params['vision']['positions'], resized.permute(1, 2, 0), atol=1e-6)
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.usefixtures('one_device')
def test_a_runs_own_checkpoint_comes_first_and_its_start_is_known(tmp_path, capsys):
  folder = shutil.copytree(trained_workdir(), tmp_path / 'source')
  source, changed = restored_run.restore(folder), config(init_from=str(folder), total_steps=2)
  changed.eval.every_steps, changed.optim.warmup_steps = 0, 1
  assert loop.train(changed, tmp_path / 'run') == 0
  opened = restored_run.restore(tmp_path / 'run')
  assert_equal(restored_run.untrained_variables(opened), source.variables)
  changed.init_from = str(tmp_path / 'gone')  # is not looked at any more
  later, _ = start(changed, tmp_path / 'run')
  assert int(later.step) == opened.step == 2
  assert_equal(later.variables, opened.variables)
  kernels = [tree['params']['vision']['patch_embed']['kernel'] for tree in (opened.variables, source.variables)]
  assert not np.array_equal(*kernels)
  shutil.rmtree(folder)  # an evaluation is worth having without that baseline
  assert evaluate_benchmark(str(tmp_path / 'run'), Request('scenes', output=str(tmp_path / 'out'))) == 0
  assert f'the untrained model is left out: there is no file or folder {folder}' in capsys.readouterr().out
  assert json.loads((tmp_path / 'out' / 'results.json').read_text())['baselines'].keys() == {'constant'}


def test_from_a_hugging_face_folder(tmp_path):
  folder = write_folder(tmp_path / 'hub', random_model(small_config()))
  weights = read.read_weights(folder)
  state, run = start(config(init_from=str(folder), model=weights.spec.config), tmp_path / 'run')
  assert run.tokenizer.vocab_size == weights.spec.vocab_size
  assert licence.read_kept(tmp_path / 'run') == Licence('cc-by-nc-4.0')  # and goes into what is exported
  scale = state.params.pop('multi_label_logit_scale')  # which the folder has no place for
  np.testing.assert_allclose(scale, np.log(1 / 0.07), rtol=1e-5)
  assert_equal(state.variables, weights.variables)


@pytest.mark.usefixtures('one_device')
def test_fine_tuning_from_an_authors_file(tmp_path):
  """Two steps on smaller pictures than those of the weights."""
  model = random_model(
    authors_config(depths=[1, 1], num_hidden_layers=2, num_group_tokens=[5, 0], num_output_groups=[4, 4])
  )
  write_clip_folder(tmp_path)
  torch.save({'model': authors_state(model.state_dict())}, tmp_path / 'weights.pth')
  spec = read.read_weights(tmp_path / 'weights.pth').spec
  changed = config(init_from=f'{tmp_path}/weights.pth', model=spec.config, total_steps=2)
  changed.model.vision.image_size, changed.optim.warmup_steps, changed.eval.every_steps = (64, 64), 1, 0
  changed.tokenizer.path = str(tmp_path)
  assert loop.train(changed, tmp_path / 'tuned') == 0
  losses = logged(tmp_path / 'tuned')
  assert len(losses) == 2 and np.isfinite(list(losses.values())).all()
  tuned = restored_run.restore(tmp_path / 'tuned').variables['params']['vision']['norm']['scale']
  before = model.vision_model.layernorm.weight.detach().numpy()
  assert 0 < np.abs(tuned - before).max() < 0.05
  assert licence.read_kept(tmp_path / 'tuned').name.startswith('the file names none;')


def test_a_tokenizer_that_ends_texts_otherwise_is_refused(tmp_path):
  folder = write_folder(tmp_path / 'hub', random_model(small_config()))
  edit_config(folder / 'config.json', 'text_config', eos_token_id=5)
  model = read.read_weights(folder).spec.config
  with pytest.raises(ValueError, match='init_from=.* has eos_id=513 and the weights have 5; name .* tokenizer.path'):
    run_lib.set_up(config(init_from=str(folder), model=model), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_all_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path):
  deeper = config()
  deeper.model.text.depth, deeper.model.projector_dim = 2, 24
  with pytest.raises(ValueError) as error:
    run_lib.set_up(deeper, tmp_path / 'run')
  text = str(error.value)
  assert 'missing: params/text/block1/' in text and 'misshapen: ' in text and deeper.init_from in text
  assert text.count('projector/fc1/kernel (16, 16) instead of (16, 24)') == 2
  with pytest.raises(ValueError, match="init_from='/nowhere': there is no such file or folder"):
    run_lib.set_up(config(init_from='/nowhere'), tmp_path / 'run')
  (tmp_path / 'x.pth').write_bytes(b'weights')
  with pytest.raises(ValueError, match="x.pth' comes without a tokenizer; name it in tokenizer.path"):
    run_lib.set_up(config(init_from=str(tmp_path / 'x.pth')), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
