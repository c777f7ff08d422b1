"""The one-call API: pictures and words in; label maps, groups and scores out."""

from collections.abc import Iterator
import contextlib
import dataclasses
import io
import pathlib
import pydoc
import types

import jax
import numpy as np
from PIL import Image
import pytest

import groupvit_jax
from groupvit_jax import predictor as predictor_lib
from groupvit_jax.eval import class_names, labelled, protocols, window_encoder
from groupvit_jax.eval.class_names import parse_class_names
from groupvit_jax.eval.evaluator import Evaluator
from groupvit_jax.predictor import Prediction, Predictor
from groupvit_jax.running import sharding
from groupvit_jax.train import restored_run
from tests.tiny import tiny_model
from tests.trained import trained_workdir
from tests.weights import random_variables

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ('dog|puppy', 'banana', 'grass')


@pytest.fixture(scope='module')
def run() -> restored_run.RestoredRun:
  return restored_run.restore(trained_workdir())


@pytest.fixture(scope='module')
def predictor(run) -> Predictor:
  return Predictor(run.model, run.variables, run.tokenizer, run.mesh)


@pytest.fixture(scope='module')
def image() -> np.ndarray:
  """Smooth blobs: 48 x 70, resized two windows of 32."""
  coarse = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((70, 48), Image.Resampling.BICUBIC))


@pytest.fixture(scope='module')
def prediction(predictor, image) -> Prediction:
  return predictor(image, WORDS)


def test_everything_is_there_and_of_the_pictures_size(prediction, image):
  assert prediction.classes == ('dog', 'banana', 'grass') and not prediction.background
  for array in (prediction.labels, prediction.segments, prediction.pixel_scores):
    assert array.shape == (48, 70)
  assert len(prediction.groups) == 1 and prediction.groups[-1] is prediction.segments
  assert prediction.labels.dtype == np.uint8 and prediction.labels.max() < 3
  assert prediction.areas.sum() == pytest.approx(1) and prediction.scores.shape == (3,)
  best = prediction.scores[prediction.labels]
  assert (prediction.pixel_scores <= best + 1e-5).all() and prediction.pixel_scores.min() > 0
  # A segment that no pixel belongs to has no say.
  nowhere = {None: [np.zeros_like(one) for one in prediction.windows.segments[None]]}
  scores = prediction.class_scores.copy()
  scores[:, 0], scores[:, 1] = (0.48, 0.01, 0.5), (0, 0.84, 0)
  windows = dataclasses.replace(prediction.windows, segments=nowhere)
  replaced = dataclasses.replace(prediction, windows=windows, class_scores=scores)
  np.testing.assert_allclose(replaced.scores, (0.48, 0.01, 0.5), atol=1e-6)
  assert prediction.image is image
  assert prediction.overlay().shape == (48 * 6, 70 * 6, 3)
  shares = dict(zip(prediction.classes, prediction.areas))
  line = ', '.join(
    f'{name} {shares[name]:.0%}' for name in sorted(shares, key=shares.get, reverse=True) if shares[name]
  )
  assert repr(prediction) == f"Prediction('number 1', 48 x 70: {line})"
  shown = np.asarray(Image.open(io.BytesIO(prediction._repr_png_())))  # what a notebook shows: a legend below
  overlay, legend = np.split(shown, [48 * 6])
  np.testing.assert_array_equal(overlay, prediction.overlay())
  found = {prediction.palette[label] for label in np.unique(prediction.labels)}
  assert found <= set(map(tuple, legend.reshape(-1, 3).tolist()))
  assert prediction.group_overlay(0).shape == (48 * 6, 70 * 6, 3)
  mask = prediction.mask()
  assert mask.mode == 'P' and np.array_equal(np.asarray(mask), prediction.labels)
  areas = [row['area'] for row in prediction.to_json()['classes']]
  assert areas == sorted(prediction.areas, reverse=True)


def test_heat_maps_are_what_labels_are_chosen_by(predictor, prediction, image):
  """Two windows that overlap: the maps average them as the labels do."""
  some = predictor(image, WORDS, threshold=0.3)
  for found in (prediction, some):
    maps = np.stack([found.heat_map(name) for name in ('dog', 'banana', 'grass')])
    assert maps.shape == (3, 48, 70) and len(found.windows.segment_embeds) == 2
    np.testing.assert_allclose(maps.max(axis=0), prediction.pixel_scores, atol=1e-5)
    assert (maps.argmax(axis=0) == prediction.labels).mean() > 0.995  # but for near-ties
  with pytest.raises(ValueError, match="'puppy' was not looked for; there are dog, banana, grass"):
    prediction.heat_map('puppy')


def test_other_words_do_not_encode_again(predictor, prediction, image, monkeypatch):
  (encoded,) = predictor.encode([image])
  monkeypatch.setattr(window_encoder, 'encode_windows', None)
  found = predictor.segment(encoded, WORDS)
  assert np.array_equal(found.labels, prediction.labels) and found.key == prediction.key
  assert predictor.segment(encoded, ['sky', 'dog'], threshold=0.2).classes == ('background', 'sky', 'dog')


def test_one_image_or_several_of_any_kind(predictor, prediction, image, tmp_path):
  path = str(tmp_path / 'a.png')
  Image.fromarray(image).save(path)
  for one in (path, jax.numpy.asarray(image)):
    np.testing.assert_array_equal(predictor.segment(predictor.encode(one), WORDS).labels, prediction.labels)
  found = predictor((part for part in (image, Image.fromarray(image), path, image[:20], image[:4, :64])), WORDS)
  assert [each.key for each in found] == ['number 1', 'number 2', path, 'number 4', 'number 5']
  for same in found[:3]:
    np.testing.assert_array_equal(same.labels, prediction.labels)
    np.testing.assert_array_equal(same.segments, prediction.segments)
  assert [each.labels.shape for each in found[3:]] == [(20, 70), (4, 64)]
  assert predictor([], WORDS) == []
  with pytest.raises(ValueError, match="image 'number 2' is float64"):
    predictor([image, image / 255], WORDS)
  with pytest.raises(ValueError, match="image 'number 1' is of type int; give a path"):
    predictor(5, WORDS)


def test_lines_for_people(predictor, run):
  assert repr(Predictor.of_run(run, protocol='groupvit')) == (
    f'Predictor(GroupViT of 32 x 32 px and {sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"])) - 2:,} '
    f'parameters; {run.workdir}, step 6, trained weights; protocol groupvit)'
  )
  assert repr(predictor).endswith('weights in memory; protocol native)')
  page = pydoc.render_doc(groupvit_jax, renderer=pydoc.plaintext)
  for name in ('Predictor', 'Prediction', 'UserError'):
    assert name in dir(groupvit_jax) and name in page
  for example in (
    "Predictor.from_pretrained('runs/quickstart')",
    "prediction.save('out')",
    'except UserError as error',
  ):
    assert example in page


def test_save_writes_the_files_of_the_command(prediction, tmp_path):
  prediction.save(tmp_path / 'new', 'a')
  kinds = ('mask.png', 'overlay.png', 'final_groups.png', 'first_groups.png', 'json')
  assert {path.name for path in (tmp_path / 'new').iterdir()} == {f'a.{kind}' for kind in kinds}
  np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'new' / 'a.mask.png')), prediction.labels)
  with pytest.raises(OSError, match=f'cannot write {tmp_path}/new/a.json/number 1.mask.png: File exists'):
    prediction.save(tmp_path / 'new' / 'a.json')


def test_same_answer_as_the_evaluation(run):
  """By a protocol of one's own, on held-out scenes: the same pixels are right and wrong."""
  changes = dict(class_filter=3, double_softmax=False, templates='subset')
  protocol = protocols.override(protocols.native_protocol(run.model.vision.image_size), changes)
  predictor = Predictor(run.model, run.variables, run.tokenizer, run.mesh, protocol=protocol)
  benchmark, source = labelled.open_scenes(run.config, labelled.TEST)
  scenes = Evaluator(run.model, run.tokenizer, run.mesh, source, benchmark, protocol, num_threads=0)
  want = scenes.evaluate(run.variables).counts
  records = [scenes.source[i] for i in range(len(scenes.source))]
  found = predictor([record['image'] for record in records], scenes.source.classes)
  counts = np.zeros_like(want)
  for record, prediction in zip(records, found):
    np.add.at(counts, (record['label'], prediction.labels), 1)
    # One window, so each segment has one label.
    pairs = set(zip(prediction.segments.ravel().tolist(), prediction.labels.ravel().tolist()))
    assert len(pairs) <= len(np.unique(prediction.segments)) + 1  # near-ties of two segments
  assert np.abs(counts - want).sum() <= 2e-3 * want.sum()
  assert len({prediction.labels.tobytes() for prediction in found}) > 1


def test_synonyms_are_the_mean_of_their_embeddings_and_are_kept(predictor, monkeypatch):
  words = parse_class_names(['dog|puppy', 'dog2', 'puppy3'])
  two = predictor.embed_classes(parse_class_names(['dog', 'puppy']))
  np.testing.assert_allclose(np.linalg.norm(two, axis=1), 1, rtol=1e-5)
  asked = []
  embed = class_names.embed_classes
  monkeypatch.setattr(class_names, 'embed_classes', lambda *args: asked.append(args[3]) or embed(*args))
  got = predictor.embed_classes(words)
  mean = two.mean(axis=0)
  np.testing.assert_allclose(got[0], mean / np.linalg.norm(mean), atol=1e-6)
  predictor.embed_classes(words)
  assert asked == [['dog2', 'puppy3']]  # what was known is not embedded again


def test_more_words_than_a_batch_of_texts_in_one_shape_and_the_last_ones_are_kept(predictor, monkeypatch):
  words = parse_class_names([f'{letter}{i}' for letter in 'abc' for i in range(20)])
  with traces() as names:
    few, many = predictor.embed_classes(words[:17]), predictor.embed_classes(words)
  assert names.count('_embed_texts') <= 2  # rows of texts, rounded up
  with traces() as names:
    predictor.embed_classes(parse_class_names([f'd{i}' for i in range(40)]))
  assert not names
  np.testing.assert_array_equal(many[:17], few)
  monkeypatch.setattr(predictor_lib, '_MAX_EMBEDDINGS', 5)
  np.testing.assert_allclose(predictor.embed_classes(words[17:]), many[17:], atol=1e-6)
  assert list(predictor._embeds) == [word.name for word in words[-5:]]


def test_two_grouping_stages_have_groups_of_their_own(run, image):
  model = run.model.clone(vision=tiny_model(image_size=(32, 32), patch_size=8).vision)
  two = Predictor(model, random_variables(model), run.tokenizer, run.mesh)
  first, final = two(image, WORDS).groups
  assert (len(np.unique(first)) > 2 and set(np.unique(final)) <= {0, 1}) and first.shape == final.shape == (48, 70)
  # A final segment is made of first groups, but where both are stretched between patches.
  pairs = np.unique(np.stack([first, final]).reshape(2, -1), axis=1, return_counts=True)
  assert not np.array_equal(first, final) and pairs[1].max() > 100


def test_threshold_makes_background(predictor, prediction, image):
  everywhere = predictor(image, WORDS, threshold=0.0)
  assert everywhere.classes[0] == 'background' and everywhere.background
  assert np.array_equal(everywhere.labels, prediction.labels + 1)
  some = predictor(image, WORDS, threshold=1.0)
  assert some.areas[0] > 0  # maybe 1: the best segment of a window is never background, but may be empty
  assert np.isnan(some.scores[0]) and some.to_json()['classes'][0]['name'] is not None
  np.testing.assert_allclose(some.scores[1:], prediction.scores)
  assert some.palette[0] == (0, 0, 0) and some.palette[1:] == prediction.palette
  for threshold in (1.5, float('nan'), '0.5'):
    with pytest.raises(ValueError, match='threshold='):
      predictor(image, WORDS, threshold=threshold)
  assert predictor(image, ['dog', 'background']).classes == ('dog', 'background')  # without one a name like any other
  with pytest.raises(ValueError, match="the class 'background' is named twice"):
    predictor(image, ['dog', 'background'], threshold=0.5)


@contextlib.contextmanager
def traces() -> Iterator[list[str]]:
  """The names of the functions that are traced meanwhile, which each compilation starts with."""
  names = []

  def note(event: str, _: float, fun_name: str = '', **kwargs: object) -> None:
    if event == '/jax/core/compile/jaxpr_trace_duration':
      names.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(note)


def test_compiled_once_per_bucket_of_sizes_and_of_numbers_of_words(predictor, image, monkeypatch):
  large, many = image.repeat(2, axis=0).repeat(2, axis=1), [f'a{i}' for i in range(33)]
  predictor.embed_classes(parse_class_names(many))  # how these are compiled, the test of words says
  for threshold in (None, 0.5):
    predictor(image, WORDS, threshold=threshold)
  with traces() as names:
    for (height, width), words in (((48, 71), many[:1]), ((60, 90), many[:16]), ((32, 40), many[:9])):
      for threshold in (None, 0.1):
        predictor(large[:height, :width], words, threshold=threshold)
    predictor([image, image], WORDS)
  assert not names
  with traces() as names:
    predictor(image, many)
    predictor(image[:40], [*many, 'dog'])
  assert names.count('label_pixels') == 1 and 'encode_windows' not in names
  # 34 windows: more than four on each of 8 devices, but never more than evaluation takes.
  for most, traced in ((8, []), (128, ['encode_windows'])):
    monkeypatch.setattr(predictor_lib, 'windows_per_batch', lambda mesh, window, most=most: most)
    with traces() as names:
      predictor.encode([image] * 17)
    assert names == traced


def test_no_image_on_one_device_is_no_error(run):
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  variables = jax.device_put(jax.tree.map(np.asarray, run.variables), sharding.replicated(mesh))
  assert not list(Predictor(run.model, variables, run.tokenizer, mesh).stream(iter(()), ['dog']))


@pytest.mark.parametrize('total, batch_size', [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4)])
def test_one_cpu_device_does_not_encode_more_padding_than_it_must(total, batch_size):
  one = sharding.make_mesh(devices=jax.devices()[:1])
  large = Predictor(tiny_model(), {}, None, one, protocol='groupvit')  # four windows at a time
  pictures = iter([types.SimpleNamespace(windows=[None] * total)])
  assert large._fit_encoder(pictures)[0].batch_size == batch_size


@pytest.mark.parametrize(
  'words, message',
  [
    ([], 'there are no classes to look for'),
    (['dog', 'cat', 'Dog '], "the class 'Dog' is named twice"),
    (['dog|puppy', 'puppy'], "the class 'puppy' is named twice"),
    (['dog', ' '], "the class ' ' has an empty name"),
    (['dog|'], "the class 'dog|' has an empty name".replace('|', r'\|')),
    (['dog', 5], 'the class 5 is no text'),
    ('dog', "class_names is one text, 'dog'"),
    (None, 'class_names=None is no list'),
  ],
)
def test_bad_words_are_refused(words, message, predictor, image):
  with pytest.raises(ValueError, match=message):
    predictor(image, words)
