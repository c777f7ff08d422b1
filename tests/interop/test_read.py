"""Weights from elsewhere: into a workdir, with the same features, or refused in one line."""

import json
import pathlib
import shutil
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from configs import groupvit_vits16_gcc_yfcc
from groupvit_jax.commands.import_weights import import_weights
from groupvit_jax.interop import huggingface, read
from groupvit_jax.predictor import Predictor
from groupvit_jax.train import restored_run
from tests import huggingface_models
from tests.data.test_tokenizer import write_clip_folder
from tests.huggingface_models import authors_config, authors_state, small_config

VARIANTS = {
  'two groupings': (small_config(), ((224, 224), (448, 672))),
  'one grouping, patch 32': (
    small_config(depths=[2, 1], num_hidden_layers=3, num_group_tokens=[5, 0], num_output_groups=[4, 4], patch_size=32),
    ((224, 224),),
  ),
}


def write_folder(folder: pathlib.Path, model: transformers.GroupViTModel, **options) -> pathlib.Path:
  """A folder as the hub has it, tokenizer and model card included."""
  model.save_pretrained(folder, **options)
  write_clip_folder(folder)
  (folder / 'README.md').write_text('---\nlicense: cc-by-nc-4.0\n---\n# A model\n')
  return folder


@pytest.fixture(scope='module')
def released(tmp_path_factory) -> tuple[pathlib.Path, transformers.GroupViTModel]:
  model = huggingface_models.random_model(small_config())
  return write_folder(tmp_path_factory.mktemp('hub'), model), model


def flat(variables) -> dict[str, np.ndarray]:
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(variables)}


def assert_equal_variables(mine, other) -> None:
  mine, other = flat(mine), flat(other)
  assert mine.keys() == other.keys()
  for path, leaf in mine.items():
    np.testing.assert_array_equal(leaf, other[path], err_msg=path)


class Features(NamedTuple):
  """What both sides compute of a picture."""

  image_embeds: np.ndarray
  segment_embeds: np.ndarray
  assignments: list[np.ndarray]


def reference_features(model: transformers.GroupViTModel, images: np.ndarray) -> Features:
  """At any size, the positions resized by torch."""
  vision = model.vision_model
  with torch.no_grad():
    hidden = vision.embeddings(torch.tensor(images.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True)
    encoded = vision.encoder(hidden, output_attentions=True)
    segments = vision.layernorm(encoded.last_hidden_state)
    project = lambda x: model.visual_projection(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1).numpy()
    return Features(project(segments.mean(dim=1)), project(segments), [soft.numpy() for soft in encoded.attentions])


def assert_equal_features(
  run: restored_run.RestoredRun, model: transformers.GroupViTModel, size: tuple[int, int]
) -> None:
  images = np.random.default_rng(0).standard_normal((1, *size, 3)).astype(np.float32)
  encode = jax.jit(lambda variables, images: run.model.apply(variables, images, method='encode_segments'))
  with jax.default_matmul_precision('highest'):
    mine = encode(run.variables, images)
  other = reference_features(model, images)
  for a, b in zip(jax.tree.leaves(Features(*mine)), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize('config, sizes', VARIANTS.values(), ids=VARIANTS.keys())
def test_features_and_assignments_are_those_of_transformers_at_any_size(config, sizes, tmp_path):
  model = huggingface_models.random_model(config)
  import_weights(str(write_folder(tmp_path / 'hub', model)), str(tmp_path / 'run'))
  run = restored_run.restore(tmp_path / 'run')
  for size in sizes:
    assert_equal_features(run, model, size)
  texts = ['a dog', 'snow']
  theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path / 'hub')
  ids = theirs(texts, padding='max_length', truncation=True, max_length=9, return_tensors='pt').input_ids
  tokens = run.tokenizer.encode(texts, 9)
  np.testing.assert_array_equal(tokens, ids.numpy())
  with torch.no_grad():
    expected = model.get_text_features(ids).pooler_output.numpy()
  with jax.default_matmul_precision('highest'):
    embeds = jax.jit(lambda variables: run.model.apply(variables, tokens, method='encode_text'))(run.variables)
  np.testing.assert_allclose(embeds, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('form', ['sharded safetensors', 'sharded pytorch_model.bin'])
def test_every_form_of_folder_gives_the_same(form, released, tmp_path):
  folder, model = released
  other = tmp_path / 'hub'
  if form == 'sharded safetensors':
    write_folder(other, model, max_shard_size='20KB')
    assert len(list(other.glob('*.safetensors'))) > 2 and not (other / 'model.safetensors').exists()
  else:
    shutil.copytree(folder, other)
    (other / 'model.safetensors').unlink()
    state = model.state_dict()
    state['text_model.embeddings.position_ids'] = torch.arange(9)[None]  # in files of 2022
    index = {}
    for i in range(3):
      part = dict(list(state.items())[i::3])
      torch.save(part, other / f'pytorch_model-{i}.bin')
      index |= dict.fromkeys(part, f'pytorch_model-{i}.bin')
    (other / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': index}))
  assert_equal_variables(read.read_weights(other).variables, read.read_weights(folder).variables)


def test_authors_checkpoint_equals_the_same_weights_from_transformers(tmp_path):
  model = huggingface_models.random_model(authors_config())
  hub = write_folder(tmp_path / 'hub', model)
  checkpoint = tmp_path / 'weights.pth'
  payload = {'model': authors_state(model.state_dict()), 'epoch': 30}
  torch.save(payload, checkpoint)
  with pytest.raises(ValueError, match="comes without a tokenizer; name CLIP's vocabulary with --tokenizer="):
    import_weights(str(checkpoint), str(tmp_path / 'run'))
  import_weights(str(checkpoint), str(tmp_path / 'run'), tokenizer=str(hub))
  mine = read.read_weights(checkpoint)
  other = read.read_weights(hub)
  assert mine.spec.config.to_dict() == other.spec.config.to_dict()
  assert (mine.spec.eos_id, mine.spec.multi_label, other.spec.multi_label) == (other.spec.eos_id, True, False)
  run = restored_run.restore(tmp_path / 'run')
  params = dict(run.variables['params'])
  assert params.pop('multi_label_logit_scale') == 1.25
  assert_equal_variables(run.variables | {'params': params}, other.variables)


def test_all_that_does_not_fit_is_listed_together(released, tmp_path):
  folder = shutil.copytree(released[0], tmp_path / 'hub')
  state = safetensors.numpy.load_file(folder / 'model.safetensors')
  del state['text_model.final_layer_norm.bias'], state['vision_model.encoder.stages.1.group_token']
  state['vision_model.layernorm.weight'] = np.zeros(3, np.float32)
  state['extra.weight'] = np.zeros(3, np.float32)
  state['vision_model.layernorm.bias'] = np.zeros(24, np.int32)
  safetensors.numpy.save_file(state, folder / 'model.safetensors')
  with pytest.raises(ValueError) as caught:
    import_weights(str(folder), str(tmp_path / 'run'))
  assert str(caught.value) == (
    f'{folder}: the weights do not fit the model; 2 missing: text_model.final_layer_norm.bias, '
    'vision_model.encoder.stages.1.group_token; 1 unexpected: extra.weight; 1 misshapen: '
    'vision_model.layernorm.weight (3,) instead of (24,); 1 not floating point: vision_model.layernorm.bias (int32)'
  )


def test_all_that_does_not_fit_is_listed_by_the_authors_names(tmp_path):
  state = authors_state(huggingface_models.random_model(authors_config()).state_dict())

  def message() -> str:
    torch.save({'model': state}, tmp_path / 'weights.pth')
    with pytest.raises(ValueError) as caught:
      read.read_weights(tmp_path / 'weights.pth')
    return str(caught.value).removeprefix(f'{tmp_path}/weights.pth: ')

  del state['text_encoder.ln_final.bias'], state['img_projector.linear_hidden.1.running_mean']
  state['extra'] = torch.zeros(3)
  state['img_encoder.norm.weight'] = torch.zeros(3)
  state['img_encoder.norm.bias'] = torch.zeros(64, dtype=torch.int32)
  assert message() == (
    'the weights do not fit the model; 2 missing: img_projector.linear_hidden.1.running_mean, '
    'text_encoder.ln_final.bias; 1 unexpected: extra; 1 misshapen: img_encoder.norm.weight (3,) instead of (64,); '
    '1 not floating point: img_encoder.norm.bias (int32)'
  )
  state['img_encoder.layers.0.group_token'] = torch.zeros(3)  # of those that tell sizes
  del state['text_encoder.token_embedding.weight'], state['img_encoder.layers.1.downsample.mlp_inter.fc2.weight']
  assert message() == (
    "these are no weights of the authors' GroupViT: they lack text_encoder.token_embedding.weight with 2 axes, "
    'img_encoder.layers.0.group_token with 3 axes, img_encoder.layers.1.downsample.mlp_inter.fc2.weight with 2 axes'
  )


def cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-100])


def edit_config(path: pathlib.Path, part: str, **values) -> None:
  config = json.loads(path.read_text())
  (config[part] if part else config).update(values)
  path.write_text(json.dumps(config))


class Hostile:
  def __reduce__(self):
    return exec, ("open('mark', 'w')",)


def write_hostile(folder: pathlib.Path) -> None:
  (folder / 'model.safetensors').unlink()
  torch.save({'weight': Hostile()}, folder / 'pytorch_model.bin')


def write_index(folder: pathlib.Path) -> None:
  (folder / 'model.safetensors').rename(folder / 'a.safetensors')
  index = {'weight_map': {'x': 'a.safetensors', 'y': 'b.safetensors', 'z': 'c.safetensors'}}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda folder: cut(folder / 'model.safetensors'), 'model.safetensors cannot be read: .*; download it again'),
    (write_index, 'lacks b.safetensors, c.safetensors, which model.safetensors.index.json lists; download them'),
    (
      lambda folder: (folder / 'model.safetensors').unlink(),
      'holds neither model.safetensors nor pytorch_model.bin, whole or in shards; download the weights',
    ),
    (write_hostile, 'pytorch_model.bin cannot be read: it wants __builtin__.exec, .* nothing in it was run'),
    (lambda folder: cut(folder / 'config.json'), r'config.json is not JSON \(.*\); download it again'),
    (lambda folder: (folder / 'config.json').unlink(), 'holds no config.json'),
    (
      lambda folder: edit_config(folder / 'config.json', '', model_type='clip'),
      "model_type 'clip'; this reads 'groupvit'",
    ),
    (
      lambda folder: edit_config(folder / 'config.json', 'vision_config', hidden_act='relu'),
      "vision_config.hidden_act='relu'; only 'gelu' is supported",
    ),
    (
      lambda folder: edit_config(folder / 'config.json', 'vision_config', assign_eps=0.5),
      'vision_config.assign_eps=0.5; only 1.0 is supported',
    ),
    (lambda folder: edit_config(folder / 'config.json', 'vision_config', patch_size=[16, 8]), 'only square patches'),
    (
      lambda folder: edit_config(folder / 'config.json', 'vision_config', assign_mlp_ratio=[0.5, 4]),
      r'assign_mlp_ratio=\[0.5, 4\]; only half the width',
    ),
    (lambda folder: (folder / 'merges.txt').unlink(), 'holds no tokenizer.model'),
    (lambda folder: edit_config(folder / 'vocab.json', '', extra=514), 'vocab_size=515 and the weights have 514'),
  ],
)
def test_a_damaged_folder_gets_one_line_and_leaves_nothing(damage, message, released, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = shutil.copytree(released[0], tmp_path / 'hub')
  damage(folder)
  with pytest.raises(ValueError, match=message) as caught:
    import_weights(str(folder), str(tmp_path / 'run'))
  assert '\n' not in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ['hub']


def test_weights_in_a_bucket_are_refused(released, tmp_path):
  for options in (
    dict(source='gs://bucket/hub', workdir=f'{tmp_path}/run'),
    dict(source=str(released[0]), workdir='gs://bucket/run'),
  ):
    with pytest.raises(ValueError, match='gs://bucket/.* is in a bucket, .*; copy the folder'):
      import_weights(**options)


def test_weights_are_no_workdir(released, tmp_path):
  (tmp_path / 'x.pth').write_bytes(b'x')
  for path, kind in ((released[0], 'holds weights and no run'), (tmp_path / 'x.pth', 'is a file and no workdir')):
    with pytest.raises(ValueError, match=f'{path} {kind}; .*groupvit_jax.commands.import_weights --from={path} '):
      restored_run.restore(path)


def test_a_tokenizer_of_other_weights_is_refused_by_the_predictor_too(released, tmp_path):
  folder = shutil.copytree(released[0], tmp_path / 'hub')
  edit_config(folder / 'vocab.json', '', extra=514)
  with pytest.raises(ValueError, match='vocab_size=515 and the weights have 514; put that into '):
    Predictor.from_pretrained(folder)
  with pytest.raises(ValueError, match='is no workdir and has one set of weights; leave out weights'):
    Predictor.from_pretrained(released[0], weights='ema')


def test_old_configs_pool_at_the_largest_id():
  config = small_config().to_dict()
  config['text_config']['eos_token_id'] = 2
  assert huggingface.from_huggingface_config(config).eos_id == huggingface_models.VOCAB_SIZE - 1


def test_old_configs_may_name_a_part_twice():
  """Of the two, `transformers` takes the one whose name ends in _dict, where it is not null."""
  config = small_config().to_dict()
  want = huggingface.from_huggingface_config(config)
  other = dict(
    vision_config={},
    text_config=dict(vocab_size=7),
    vision_config_dict=config['vision_config'],
    text_config_dict=config['text_config'],
  )
  assert huggingface.from_huggingface_config(config | other) == want
  assert huggingface.from_huggingface_config(config | dict(text_config_dict=None, vision_config_dict=None)) == want


def test_a_config_that_says_nothing_is_the_released_model():
  spec = huggingface.from_huggingface_config({'model_type': 'groupvit'})
  assert spec == huggingface.from_huggingface_config(transformers.GroupViTConfig().to_dict())
  assert (spec.vocab_size, spec.eos_id, spec.config.vision.depths) == (49408, 49407, (6, 3, 3))
  ours = groupvit_vits16_gcc_yfcc.get_config().model  # so that a run of ours can start from the released weights
  assert spec.config.to_dict() | dict(dtype=ours.dtype) == ours.to_dict()
