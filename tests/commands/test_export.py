"""Models taken elsewhere: loaded by `transformers`, by jax alone, and by ourselves, bit for bit."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
import sentencepiece
import torch
import transformers

from configs import groupvit_vits16_gcc_yfcc
from groupvit_jax import cli
from groupvit_jax.commands import import_weights as importing
from groupvit_jax.commands import model_card
from groupvit_jax.commands.export import export
from groupvit_jax.data.tokenizer import ClipTokenizer, Tokenizer, train_sentencepiece
from groupvit_jax.interop import licence, read
from groupvit_jax.interop.licence import Licence
from groupvit_jax.interop.native import to_flat
from groupvit_jax.interop.state_dicts import ModelSpec
from groupvit_jax.model.pixels import normalize_images
from groupvit_jax.train import restored_run
from tests.data.test_tokenizer import write_clip_folder
from tests.runs import run_command
from tests.tiny import tiny_config
from tests.train.test_checkpoint import no_room_for
from tests.trained import trained_workdir
from tests.weights import random_variables

TEXTS = ['a dog on the grass', 'snow']
LICENCE = Licence('other', 'Some Licence 2.0', 'https://example.org/licence')


def write_run(folder: pathlib.Path, tokenizer: Tokenizer, *, multi_label: bool, **vision) -> pathlib.Path:
  """A workdir with random weights, as an import leaves one."""
  config = tiny_config().model
  config.vision.update(image_size=(32, 24), depths=(1, 1, 1), num_group_tokens=(5, 3, 0), num_segments=(5, 4, 0))
  config.vision.update(vision)
  spec = ModelSpec(config, tokenizer.vocab_size, tokenizer.eos_id, multi_label)
  variables = jax.tree.map(np.asarray, random_variables(spec.build()))
  importing._write(folder, read.Weights(spec, variables, 'random numbers', LICENCE), tokenizer, 'nowhere')
  return folder


@pytest.fixture(scope='module')
def clip_run(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('clip')
  write_clip_folder(folder)
  return write_run(tmp_path_factory.mktemp('run'), ClipTokenizer(folder), multi_label=True)


@pytest.fixture(scope='module')
def sentencepiece_run(tmp_path_factory) -> pathlib.Path:
  tokenizer = train_sentencepiece(TEXTS * 3, tmp_path_factory.mktemp('pieces') / 'tokenizer.model', 300)
  return write_run(tmp_path_factory.mktemp('run'), tokenizer, multi_label=False)


def pictures(count: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (count, 32, 24, 3), np.uint8)


def our_embeddings(run: restored_run.RestoredRun, images: np.ndarray) -> dict[str, np.ndarray]:
  tokens = run.tokenizer.encode(TEXTS, run.model.text.context_length)
  encode = jax.jit(
    lambda variables, images, tokens: (
      run.model.apply(variables, normalize_images(images), method='encode_segments'),
      run.model.apply(variables, tokens, method='encode_text'),
    )
  )
  with jax.default_matmul_precision('highest'):
    out, text_embeds = encode(run.variables, images, tokens)
  return out._asdict() | {'text_embeds': text_embeds}


@pytest.mark.parametrize(
  'fixture, form',
  [('clip_run', 'huggingface'), ('sentencepiece_run', 'huggingface'), ('sentencepiece_run', 'safetensors')],
)
def test_export_then_import_is_bitwise_the_same(form, fixture, request, tmp_path):
  workdir = request.getfixturevalue(fixture)
  export(workdir, form, tmp_path / 'out')
  importing.import_weights(str(tmp_path / 'out'), str(tmp_path / 'run'))
  before, after = restored_run.restore(workdir), restored_run.restore(tmp_path / 'run')
  assert before.config.model.to_json() == after.config.model.to_json()
  mine, other = to_flat(before.variables), to_flat(after.variables)
  assert mine.keys() == other.keys()
  for path, leaf in mine.items():
    assert leaf.tobytes() == other[path].tobytes(), path
  np.testing.assert_array_equal(before.tokenizer.encode(TEXTS, 9), after.tokenizer.encode(TEXTS, 9))


def test_transformers_loads_strictly_and_computes_the_same(clip_run, tmp_path):
  export(clip_run, 'huggingface', tmp_path / 'out')
  model, info = transformers.AutoModel.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert type(model).__name__ == 'GroupViTModel'
  assert not any(info.values()), info
  processor = transformers.AutoProcessor.from_pretrained(tmp_path / 'out')
  images, run = pictures(2), restored_run.restore(clip_run)
  inputs = processor(
    text=TEXTS,
    images=[PIL.Image.fromarray(x) for x in images],
    return_tensors='pt',
    padding='max_length',
    truncation=True,
  )
  np.testing.assert_array_equal(inputs.input_ids, run.tokenizer.encode(TEXTS, run.model.text.context_length))
  np.testing.assert_allclose(
    inputs.pixel_values.numpy().transpose(0, 2, 3, 1), normalize_images(images), rtol=0, atol=1e-5
  )
  with torch.no_grad():
    image_embeds = model.get_image_features(inputs.pixel_values).pooler_output
    text_embeds = model.get_text_features(inputs.input_ids).pooler_output
  ours = our_embeddings(run, images)
  np.testing.assert_allclose(ours['image_embeds'], image_embeds, rtol=0, atol=1e-4)
  np.testing.assert_allclose(ours['text_embeds'], text_embeds, rtol=0, atol=1e-4)


@pytest.mark.usefixtures('one_device')
@pytest.mark.parametrize('fixture, blocks', [('clip_run', 2), ('sentencepiece_run', 1)])
def test_the_cards_lines_segment_an_image(fixture, blocks, request, tmp_path, monkeypatch):
  """With transformers, and with us: once, for the lines are the same."""
  export(request.getfixturevalue(fixture), 'huggingface', tmp_path / 'exported')
  monkeypatch.chdir(tmp_path)
  PIL.Image.fromarray(pictures(1)[0].repeat(2, axis=0)).save('image.jpg')
  names: dict[str, object] = {}
  code = re.findall(r'```python\n(.*?)```', (tmp_path / 'exported' / 'README.md').read_text(), re.DOTALL)
  assert len(code) == 2
  for block in code[-blocks:]:
    exec(block.replace('LOCAL_', '').replace('FOLDER', str(tmp_path / 'exported')), names)
  assert tuple(names['labels'].shape) == (32, 24) and int(names['labels'].max()) < 2
  if blocks == 2:
    assert names['prediction'].labels.shape == (64, 24) and (tmp_path / 'out' / 'image.mask.png').exists()


def test_transformers_embeds_texts_of_sentencepiece_the_same(sentencepiece_run, tmp_path):
  export(sentencepiece_run, 'huggingface', tmp_path / 'out')
  model, info = transformers.AutoModel.from_pretrained(tmp_path / 'out', output_loading_info=True)
  assert not any(info.values()), info
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'out' / 'tokenizer.model'))
  embeds = []
  for text in TEXTS:
    input_ids = torch.tensor([pieces.encode(text) + [pieces.eos_id()]])
    with torch.no_grad():
      embeds.append(model.get_text_features(input_ids).pooler_output.numpy())
  ours = our_embeddings(restored_run.restore(sentencepiece_run), pictures(1))
  np.testing.assert_allclose(ours['text_embeds'], np.concatenate(embeds), rtol=0, atol=1e-4)


def results(**changes) -> dict[str, object]:
  """A report of eval.py about `clip_run`."""
  return (
    dict(
      benchmark='scenes',
      num_images=512,
      protocol={'window': 64, 'threshold': None},
      miou=0.51,
      pixel_accuracy=0.75,
      oracle_miou=0.6,
      provenance={'step': '0', 'weights': 'trained'},
    )
    | changes
  )


def test_the_card_says_what_the_model_is(clip_run, tmp_path):
  imagenet = dict(
    benchmark='imagenet',
    num_images=50_000,
    protocol={'templates': 'subset'},
    top1=0.437,
    top5=0.7,
    provenance=results()['provenance'],
  )
  for name, report in (('scenes', results()), ('imagenet', imagenet)):
    (tmp_path / f'{name}.json').write_text(json.dumps(report))
  paths = [f'{tmp_path}/scenes.json', f'{tmp_path}/imagenet.json']
  said = export(clip_run, 'huggingface', tmp_path / 'out', scores=paths)
  assert said.splitlines()[-1] == f'the model card has the scores in {", ".join(paths)}'
  card = (tmp_path / 'out' / 'README.md').read_text()
  for text in (
    'license: other\nlicense_name: some-licence-2.0\nlicense_link: https://example.org/licence\n',
    'Not known: the weights were imported from nowhere',
    '| mIoU | 51.0% |',
    '"window": 64',
    'imagenet, 50,000 images',
    '| top-1 accuracy | 43.7% |',
    '"num_group_tokens"',
  ):
    assert text in card, text
  with pytest.raises(ValueError, match='--licence=mit: the run started from weights under another one .Some Licence'):
    export(clip_run, 'huggingface', tmp_path / 'mine', licence='mit')
  importing.import_weights(str(tmp_path / 'out'), str(tmp_path / 'run'))  # the licence stays with what is made of it
  assert licence.read_kept(tmp_path / 'run').link == LICENCE.link


def test_the_card_says_what_a_run_was_trained_on(tmp_path):
  trained = restored_run.restore(trained_workdir())
  (tmp_path / 'eval').mkdir()
  run = trained._replace(workdir=tmp_path)
  model_card.write(tmp_path, run, licence=Licence(), use='', tags='', reports=[])
  card = (tmp_path / 'README.md').read_text()
  assert card.startswith('---\nlicense: unknown\n---\n')
  assert '12 things (dog, panda, ' in card and 'on 6 kinds of stuff (grass, ' in card
  assert 'its caption and 1 prompts made of it; 6 steps of 8 images.' in card
  changed = groupvit_vits16_gcc_yfcc.get_config()
  changed.data.num_prompts, changed.init_from = 0, 'runs/other'
  model_card.write(tmp_path, run._replace(config=changed), licence=Licence(), use='', tags='', reports=[])
  card = (tmp_path / 'README.md').read_text()
  assert '| cc3m | webdataset | 2,891,445 | by size |' in card and 'its caption alone;' in card
  assert 'Training started from the weights in runs/other.' in card


def test_scores_are_those_of_the_exported_checkpoint(clip_run, tmp_path):
  """By default those that the quickstart leaves in WORKDIR/eval."""
  usual = clip_run / 'eval' / 'results.json'
  try:
    said = export(clip_run, 'safetensors', tmp_path / '0')
    assert said.endswith(f'the model card has no scores: there is no {usual}, and --scores names none')
    usual.parent.mkdir()
    usual.write_text(json.dumps(results()))
    assert export(clip_run, 'safetensors', tmp_path / '1').endswith(f'the model card has the scores in {usual}')
    assert '| mIoU | 51.0% |' in (tmp_path / '1' / 'README.md').read_text()
    for wrong, message in (
      (dict(step='7', weights='trained'), 'the scores of step=7, and what is exported is step=0'),
      (dict(step='0', weights='ema'), 'weights=ema, and what is exported is weights=trained'),
    ):
      usual.write_text(json.dumps(results(provenance=wrong)))
      assert message in export(clip_run, 'safetensors', tmp_path / wrong['weights'])
      assert 'None were given' in (tmp_path / wrong['weights'] / 'README.md').read_text()
      with pytest.raises(ValueError, match=message):
        export(clip_run, 'safetensors', tmp_path / 'new', scores=[str(usual)])
  finally:
    shutil.rmtree(usual.parent)
  (tmp_path / 'pictures.json').write_text(json.dumps({'pictures': [], 'provenance': {}}))
  with pytest.raises(ValueError, match='holds no scores; name the results.json of an evaluation on labelled images'):
    export(clip_run, 'safetensors', tmp_path / 'new', scores=[f'{tmp_path}/pictures.json'])


def test_bfloat16_halves_the_weights(clip_run, tmp_path):
  export(clip_run, 'huggingface', tmp_path / 'out', dtype='bfloat16')
  state = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
  assert {x.dtype.name for x in state.values()} - {'int64'} == {'bfloat16'}
  before = to_flat(restored_run.restore(clip_run).variables)
  after = to_flat(read.read_weights(tmp_path / 'out').variables)
  for path, leaf in before.items():
    np.testing.assert_allclose(after[path], leaf, rtol=2**-8, err_msg=path)
  assert transformers.AutoModel.from_pretrained(tmp_path / 'out', dtype='auto').dtype == torch.bfloat16


@pytest.fixture(scope='module')
def bundle(clip_run, tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp('bundle')
  report = export(clip_run, 'stablehlo', folder)
  line = r'.*/{side}\.stablehlo: \d+\.\d MB, \d+\.\d ms for one on this machine\n'
  assert re.match(''.join(line.format(side=side) for side in ('image', 'text')), report), report
  return folder


def test_stablehlo_takes_any_batch_on_any_platform(bundle, clip_run):
  run, images = restored_run.restore(clip_run), pictures(3)
  image, text = (jax.export.deserialize((bundle / f'{side}.stablehlo').read_bytes()) for side in ('image', 'text'))
  assert image.platforms == text.platforms == ('cpu', 'cuda', 'tpu')
  ours = our_embeddings(run, images)
  with jax.default_matmul_precision('highest'):
    for count in (3, 1):
      out = image.call(images[:count])
      for name in ('image_embeds', 'segment_embeds'):
        np.testing.assert_allclose(out[name], ours[name][:count], rtol=0, atol=1e-4)
      for mine, other in zip(out['assignments'], ours['assignments'], strict=True):
        np.testing.assert_allclose(mine, other[:count], rtol=0, atol=1e-4)
    meta = json.loads((bundle / 'bundle.json').read_text())
    tokens = run.tokenizer.encode(TEXTS, meta['context_length'])
    np.testing.assert_allclose(text.call(tokens), ours['text_embeds'], rtol=0, atol=1e-4)
    # The positions resized when the program runs are those of the model, which torch's were compared with.
    wide = np.random.default_rng(1).integers(0, 256, (2, 64, 80, 3), np.uint8)
    out, ours_of_wide = image.call(wide), our_embeddings(run, wide)
    expected = jax.tree.leaves({name: ours_of_wide[name] for name in out})
    for mine, other in zip(jax.tree.leaves(out), expected, strict=True):
      np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4)
  files = {name: (facts['bytes'], facts['input']) for name, facts in meta['files'].items()}
  assert files == {
    f'{side}.stablehlo': ((bundle / f'{side}.stablehlo').stat().st_size, shape)
    for side, shape in (('image', [1, 32, 24, 3]), ('text', [1, 16]))
  }
  assert all(facts['milliseconds'] > 0 for facts in meta['files'].values())
  assert meta['measured_on']['jax'] == jax.__version__ and meta['measured_on']['device'] == 'cpu'
  np.testing.assert_allclose(meta['logit_scale'], min(np.exp(run.variables['params']['logit_scale']), 100), rtol=1e-5)


def test_stablehlo_runs_with_jax_alone(bundle, clip_run, tmp_path):
  PIL.Image.fromarray(pictures(1)[0]).save(tmp_path / 'picture.png')
  script = pathlib.Path(__file__).parents[2] / 'examples' / 'run_exported.py'
  blocked = ('flax', 'groupvit_jax', 'ml_collections', 'optax', 'orbax', 'torch', 'transformers')
  code = (
    f'import runpy, sys; sys.modules.update(dict.fromkeys({blocked}));'
    f'sys.argv = ["x", {str(bundle)!r}, {str(tmp_path / "picture.png")!r}]; runpy.run_path({str(script)!r})'
  )
  done = run_command('-c', code, cwd=tmp_path)
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  segments = [[int(segment) for segment in row.split()] for row in lines[:4]]
  assert list(map(len, segments)) == [3] * 4 and {x for row in segments for x in row} <= set(range(4))
  ours = our_embeddings(run := restored_run.restore(clip_run), pictures(1))
  words = ('a dog', 'grass')
  texts = run.model.apply(run.variables, run.tokenizer.encode(words, 16), method='encode_text')
  unit = lambda x: np.asarray(x) / np.linalg.norm(x, axis=-1, keepdims=True)
  best = (unit(ours['segment_embeds'][0]) @ unit(texts).T).argmax(axis=1)
  assert lines[4:] == [f'segment {i}: {words[k]}' for i, k in enumerate(best)] and len(lines) == 8


def test_stablehlo_in_bfloat16(clip_run, bundle, tmp_path):
  export(clip_run, 'stablehlo', tmp_path / 'out', dtype='bfloat16')
  small, large = ((folder / 'image.stablehlo') for folder in (tmp_path / 'out', bundle))
  params = restored_run.restore(clip_run).variables['params']
  count = sum(leaf.size for leaf in jax.tree.leaves([params['vision'], params['image_projector']]))
  assert large.stat().st_size - small.stat().st_size > 0.7 * 2 * count  # two bytes less for each, and casts
  mine, other = (jax.export.deserialize(path.read_bytes()).call(pictures(2))['image_embeds'] for path in (small, large))
  difference = np.abs(mine - other).max() / np.abs(other).max()
  assert 1e-6 < difference < 0.2


def test_what_transformers_cannot_represent_is_refused(tmp_path):
  (tmp_path / 'clip').mkdir()
  write_clip_folder(tmp_path / 'clip')
  vision = dict(num_group_tokens=(5, 3, 0), num_segments=(6, 4, 0))
  write_run(tmp_path / 'run', ClipTokenizer(tmp_path / 'clip'), multi_label=False, **vision)
  message = r'num_group_tokens=\(5, 3, 0\) and num_segments=\(6, 4, 0\)'
  with pytest.raises(ValueError, match=f'as many segments as group tokens; model.vision has {message}'):
    export(tmp_path / 'run', 'huggingface', tmp_path / 'out')
  assert {path.name for path in tmp_path.iterdir()} == {'clip', 'run'}
  export(tmp_path / 'run', 'safetensors', tmp_path / 'out')


def test_choices_that_there_are_not(clip_run, tmp_path):
  for options, message in (
    (dict(form='pt'), "format='pt': use huggingface, stablehlo, onnx, web, safetensors"),
    (dict(dtype='float64'), "dtype='float64': use float32, bfloat16, float16, int8"),
    (dict(dtype='float16'), "--format=safetensors has no dtype='float16'"),
    (dict(checkpoint='best'), 'kept no best checkpoint'),
    (dict(output='gs://bucket/out'), 'gs://bucket/out is in a bucket'),
  ):
    with pytest.raises(ValueError, match=message):
      export(clip_run, **dict(form='safetensors', output=str(tmp_path / 'out')) | options)
  assert not list(tmp_path.iterdir())


def test_a_full_disk_gets_one_line_and_leaves_nothing(clip_run, tmp_path):
  for form in ('safetensors', 'stablehlo'):
    with no_room_for(100_000), pytest.raises((ValueError, OSError)) as error:
      export(clip_run, form, tmp_path / 'out')
    assert cli.is_mistake(error.value) and str(error.value).startswith(f'cannot write {tmp_path}/out: ')
    assert 'File too large' in str(error.value) and not list(tmp_path.iterdir())


def test_the_command(clip_run, tmp_path):
  flags = f'--workdir={clip_run}', f'--output={tmp_path}/out', '--format=safetensors'
  done = run_command('-m', 'groupvit_jax.commands.export', *flags)
  assert done.stdout.startswith(f'{tmp_path}/out/model.safetensors: 0.2 MB\n') and done.stderr == ''
  with pytest.raises(ValueError, match=f'{tmp_path}/out exists already and is left alone; name another --output'):
    export(clip_run, 'safetensors', tmp_path / 'out')
  message = f'there is no file {tmp_path}/no.json; name a results.json that eval.py wrote, or leave --scores out'
  with pytest.raises(ValueError, match=message):
    export(clip_run, 'huggingface', tmp_path / 'new', scores=[f'{tmp_path}/no.json'])
  assert [path.name for path in tmp_path.iterdir()] == ['out']
