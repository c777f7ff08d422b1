"""The evaluator against the slow reference, its own parts, and bad input."""

import dataclasses
import functools

import cv2
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from groupvit_jax.eval import class_names, evaluator, labeller, protocols, window_encoder
from groupvit_jax.eval.benchmarks import make_benchmark
from groupvit_jax.eval.class_names import find_names, NameSet, parse_class_names
from groupvit_jax.eval.evaluator import Evaluator, Scoring
from groupvit_jax.eval.labelled import Source
from groupvit_jax.eval.result import Result
from groupvit_jax.model import metrics
from groupvit_jax.model.vision import StageSpec
from groupvit_jax.running import sharding
from tests import reference_protocol
from tests.eval.test_pamr import slow_refine
from tests.tiny import Letters, tiny_model

PATCH, WINDOW = 8, 32
SIZES = reference_protocol.Sizes(WINDOW, 150, WINDOW, 16, PATCH)
PROTOCOL = protocols.override(
  protocols.GROUPVIT, {'short_side': WINDOW, 'max_long_side': 150, 'window': WINDOW, 'stride': 16}
)
# Whole windows only: as large, smaller, wide, portrait, odd, much larger, at the longest.
ORDINARY = [
  (32, 32), (20, 16), (7, 5), (32, 48), (33, 47), (50, 40), (41, 99), (99, 41), (64, 64), (65, 300),
  (150, 32), (32, 150), (31, 33), (120, 90), (90, 121), (77, 211), (211, 77), (240, 320), (333, 250),
]  # fmt: skip
# So wide or tall that the short side is less than a window, and in the last even than a patch.
EXTREME = [(20, 150), (400, 50), (3, 200)]


@dataclasses.dataclass
class Pictures:
  """Blurred noise with label maps of rectangles, 255 at some borders."""

  sizes: list
  classes: tuple

  def __len__(self):
    return len(self.sizes)

  def __getitem__(self, i):
    rng = np.random.default_rng(i)
    height, width = self.sizes[i]
    noise = rng.integers(0, 256, (max(height // 9, 2), max(width // 9, 2), 3), np.uint8)
    labels = rng.integers(0, len(self.classes), (3, 2)).astype(np.uint8)
    label = cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)
    label[:, :1] = 255
    image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return {'image': image, 'label': label, 'key': f'{i}: {height} x {width}'}


CLASSES = ('background', *(f'class {i}' for i in range(9)))
WITH_BACKGROUND = make_benchmark('shapes', CLASSES, background=True)
WITHOUT = make_benchmark('shapes', CLASSES[1:])


def make_model(window=WINDOW, patch=PATCH):
  """Two grouping stages, and an assignment decisive enough that segments differ."""
  decisive = nn.initializers.variance_scaling(8.0, 'fan_in', 'normal')
  spread = nn.initializers.normal(0.5)
  init = dataclasses.replace(tiny_model().vision.init, assign_kernel=decisive, tokens=spread, positions=spread)
  stages = (StageSpec(1, 8, 8), StageSpec(1, 5, 5), StageSpec(1, 0, 0))
  return tiny_model(image_size=(window, window), patch_size=patch, width=16, stages=stages, init=init)


def init_variables(model):
  images, tokens = jnp.zeros((1, *model.vision.image_size, 3)), jnp.full((1, 1, 6), 2)
  return jax.jit(model.init)(jax.random.key(1), images, tokens)


def make_text_embeds():
  return np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)


@pytest.fixture(scope='module')
def model():
  return make_model()


@pytest.fixture(scope='module')
def variables(model):
  return init_variables(model)


@pytest.fixture(scope='module')
def text_embeds():
  return make_text_embeds()


def encoder_of(model, variables):
  """Encodes one window, float [H, W, 3], normalised."""
  apply = jax.jit(lambda x: model.apply(variables, x, method='encode_segments'))

  def call(window):
    out = apply(jnp.asarray(window[None], jnp.float32))
    return reference_protocol.Encoded(*(x[0] for x in out[:2]), [a[0] for a in out.assignments])

  return call


@pytest.fixture(scope='module')
def encode(model, variables):
  return encoder_of(model, variables)


def normalized(image):
  return (image / 255 - reference_protocol.MEAN) / reference_protocol.STD


def score_by(text_embeds, benchmark, protocol, thresholds=()):
  """The scoring of a benchmark's own names by the first of some embeddings."""
  names = find_names(benchmark, 'benchmark')
  protocol = benchmark.fix_threshold(protocol)
  return Scoring(benchmark, protocol, names, text_embeds[: len(names.prompts)], thresholds)


@pytest.fixture(scope='module')
def evaluate(model, variables, text_embeds):
  """Evaluates and returns the result and the label maps by key."""

  def call(sizes, benchmark, protocol, **options):
    maps = {}
    keep = lambda encoded, labelled: maps.update({encoded.image.key: labelled})
    source = Pictures(sizes, benchmark.classes)
    scoring = score_by(text_embeds, benchmark, protocol, options.pop('thresholds', ()))
    (result,) = evaluator.evaluate(
      model, variables, source, [scoring], **({'batch_size': 8, 'on_image': keep} | options)
    )
    return result, maps

  return call


def threshold(value, **changes):
  return protocols.override(PROTOCOL, {'threshold': value} | changes)


@pytest.mark.parametrize('background', [True, False])
def test_refined_label_maps_are_those_of_refined_scores(background, evaluate):
  """Of one window, whose size the image has: the map of each class, and of the background, is refined slowly."""
  benchmark, options = (WITH_BACKGROUND if background else WITHOUT), dict(iterations=2, dilations=(1, 3))
  protocol = threshold(0.1, refine='pamr', refine_iterations=2, refine_dilations=(1, 3))
  segments, sizes = {}, [(WINDOW, WINDOW)]
  for each in (threshold(0.1), protocol):
    keep = lambda encoded, labelled, each=each: segments.update({each.refine: (encoded, labelled)})
    evaluate(sizes, benchmark, each, on_image=keep)
  (hard, _), (soft, labelled) = segments[None], segments['pamr']
  scores = labelled.class_scores[0]
  if background:
    best = scores.max(axis=-1)
    scores = np.concatenate([(best < min(0.1, best.max()))[:, None], scores], axis=-1)
  (hard,), (soft_segments,) = (each.segments.values() for each in (hard, soft))
  masks = scores[hard[0]].astype(np.float64)
  want = slow_refine(masks, soft.image.windows[0], **options)
  np.testing.assert_allclose(soft_segments[0] @ scores, want, atol=1e-5)
  ordered = np.sort(want, axis=-1)
  clear = ordered[..., -1] - ordered[..., -2] > 1e-4
  assert clear.mean() > 0.9 and (soft_segments[0].max(axis=-1) < 0.9).any()
  assert np.array_equal(labelled.labels[clear], want.argmax(axis=-1)[clear])


@pytest.mark.parametrize('background', [True, False])
def test_label_maps_are_those_of_the_slow_reference(background, evaluate, encode, variables, text_embeds):
  benchmark = WITH_BACKGROUND if background else WITHOUT
  sizes = ORDINARY + EXTREME
  _, maps = evaluate(sizes, benchmark, threshold(0.1))
  agree, clear, labels_seen = 0, 0, set()
  for record in Pictures(sizes, benchmark.classes):
    if min(record['image'].shape[:2]) * 150 // max(record['image'].shape[:2]) < PATCH:
      continue  # less than a patch: the description ends here
    want, margin = reference_protocol.label_picture(
      record['image'],
      encode,
      text_embeds,
      float(variables['params']['logit_scale']),
      0.1 if background else None,
      SIZES,
    )
    is_clear = margin > 1e-4
    agree += (maps[record['key']].labels == want)[is_clear].sum()
    clear += is_clear.sum()
    labels_seen |= set(want.ravel().tolist())
  assert len(maps) == len(sizes)
  assert len(labels_seen) >= 5 and (not background or 0 in labels_seen)
  assert clear > 200_000
  assert agree / clear >= 0.9999


# As VOC, COCO, Context, Cityscapes and ADE20K have them: one window and many, smaller than a window, 2048 px wide, odd,
# portrait, and so wide or tall that a window is smaller.
REAL = [
  (375, 500), (500, 375), (333, 500), (500, 333), (281, 500), (500, 442), (366, 500), (480, 640), (640, 480),
  (427, 640), (640, 425), (612, 612), (1024, 2048), (683, 1024), (512, 683), (768, 512), (427, 2048), (448, 448),
  (120, 91), (300, 199), (97, 351), (384, 2048), (1024, 160)]  # fmt: skip


@pytest.mark.long
def test_the_published_sizes_are_those_of_the_slow_reference(text_embeds):
  """Protocol groupvit as it is: windows of 448 px, pictures up to 2048 wide. Patches are large, to be quick."""
  model = make_model(448, 64)
  variables = init_variables(model)
  encode = encoder_of(model, variables)
  protocol = protocols.override(protocols.GROUPVIT, {'threshold': 0.1})
  source, maps = Pictures(REAL, CLASSES), {}
  keep = lambda encoded, labelled: maps.update({encoded.image.key: labelled.labels})
  scoring = score_by(text_embeds, WITH_BACKGROUND, protocol)
  evaluator.evaluate(model, variables, source, [scoring], batch_size=2, on_image=keep)
  agree, counted = [], []
  for record in source:
    want, margin = reference_protocol.label_picture(
      record['image'],
      encode,
      text_embeds,
      float(variables['params']['logit_scale']),
      0.1,
      reference_protocol.Sizes(448, 2048, 448, 224, 64),
    )
    clear = margin > 1e-4
    agree.append((maps[record['key']] == want)[clear].sum())
    counted.append(clear.sum())
    assert agree[-1] >= 0.999 * counted[-1] and clear.mean() > 0.5, record['key']
  assert len(counted) == len(REAL) >= 20 and sum(agree) >= 0.9999 * sum(counted)


@pytest.fixture
def compilations():
  """Names of what is compiled during a test."""
  names, active = [], [True]

  def listen(event, duration, fun_name=None, **_):
    if active[0] and event == '/jax/core/compile/backend_compile_duration':
      names.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  active[0] = False


def test_any_ordinary_sizes_are_a_program_for_pictures_one_for_labels_and_one_for_names(compilations, model, variables):
  # In numbers that no other test has: what those have compiled is not compiled here.
  benchmark = make_benchmark('shapes', CLASSES[:8], background=True)
  mesh = sharding.make_mesh(devices=jax.local_devices()[:3])

  def evaluate(variables, sizes, cut, thresholds):
    variables = jax.device_put(jax.device_get(variables), sharding.replicated(mesh))
    source, protocol = Pictures(sizes, CLASSES[:8]), threshold(cut, templates='full')
    Evaluator(model, Letters(), mesh, source, benchmark, protocol, 0, thresholds).evaluate(variables)

  other = jax.tree.map(lambda x: x * 1.1, variables)
  compilations.clear()
  evaluate(variables, ORDINARY, 0.1, (0.3, 0.4))
  assert sorted(compilations) == ['jit(_embed_texts)', 'jit(count_pixels)', 'jit(encode_windows)']
  # Another step of training, other thresholds, other pictures: nothing is compiled again.
  compilations.clear()
  evaluate(other, ORDINARY[5:9], 0.7, (0.2, 0.9))
  assert compilations == []
  # What is so wide or tall that a window is smaller costs one more for each size, and once.
  evaluate(variables, [*EXTREME, *EXTREME, (40, 300)], 0.1, (0.3, 0.4))
  assert compilations == ['jit(encode_windows)'] * len(EXTREME)


def test_scorings_share_encodings_and_background_phrases_are_background(evaluate, model, variables, text_embeds):
  """Each image is encoded once; each scoring counts what it counts alone."""
  sizes, plain = [(WINDOW, WINDOW), (41, 99), (333, 250), (120, 90)], threshold(0.9)
  refined = threshold(0.9, refine='pamr', refine_iterations=2)
  alone, maps = evaluate(sizes, WITH_BACKGROUND, plain)
  scorings = [score_by(text_embeds, WITH_BACKGROUND, each) for each in (plain, refined)]
  phrases = NameSet('mine', parse_class_names(CLASSES[1:7]), CLASSES[7:])
  fewer, names = make_benchmark('shapes', CLASSES[:7], background=True), {}
  seven = lambda labels: np.where(labels < 7, labels, 255).astype(np.uint8)
  scorings = [Scoring(fewer, plain, phrases, text_embeds, (), seven), *scorings]
  keep = lambda encoded, labelled: names.update({encoded.image.key: labelled.labels})
  source, counts = Source((), 4, Pictures(sizes, CLASSES).__getitem__), np.zeros((7, 7), np.int64)
  few, same, other = evaluator.evaluate(model, variables, source, scorings, batch_size=8, on_image=keep)
  assert np.array_equal(same.counts, alone.counts) and not np.array_equal(other.counts, alone.counts)
  assert np.array_equal(other.counts, evaluate(sizes, WITH_BACKGROUND, refined)[0].counts)
  for record in Pictures(sizes, CLASSES):
    want = maps[record['key']].labels
    want = np.where(want > 6, 0, want)
    assert np.array_equal(names[record['key']], want)
    counted = record['label'] < 7
    np.add.at(counts, (record['label'][counted], want[counted]), 1)
  assert (alone.counts[:, 7:].sum(axis=0) > 0).any() and (counts[:, 1:] > 0).any()
  assert np.array_equal(few.counts, counts) and few.oracle_counts.sum() == counts.sum()


def test_oracle_names_each_segment_by_its_majority(evaluate):
  """On pictures of one window, against the direct count."""
  segments = {}

  def keep(encoded, _):
    segments[encoded.image.key] = encoded.segments[None][0]

  sizes = [(WINDOW, WINDOW)] * 5
  result, _ = evaluate(sizes, WITHOUT, PROTOCOL, on_image=keep)
  counts = 0
  for record in Pictures(sizes, WITHOUT.classes):
    counts += metrics.ConfusionMatrix.oracle(
      jnp.asarray(record['label'])[None], jnp.asarray(segments[record['key']])[None], num_segments=5, num_classes=9
    ).counts()
  assert np.array_equal(result.oracle_counts, counts)
  assert result.oracle.pixel_accuracy > result.scores.pixel_accuracy
  without, _ = evaluate(sizes, WITHOUT, PROTOCOL, oracle=False)
  assert without.oracle is None and without.to_json()['oracle_iou'] is None


def test_eight_devices_give_what_one_gives(evaluate):
  refined = threshold(0.1, refine='pamr', refine_iterations=2, refine_dilations=(1, 3))
  one, maps = evaluate(ORDINARY, WITH_BACKGROUND, refined)
  many, others = evaluate(ORDINARY, WITH_BACKGROUND, refined, mesh=sharding.make_mesh())
  same = sum((maps[key].labels == others[key].labels).sum() for key in maps)
  assert same >= 0.9999 * sum(m.labels.size for m in maps.values())
  assert abs(one.counts - many.counts).sum() <= 2e-4 * one.counts.sum()
  assert many.health == pytest.approx(one.health, rel=1e-5)


def test_health_is_of_windows_not_of_padding(evaluate, encode):
  """Five windows in batches of eight."""
  sizes = [(WINDOW, WINDOW)] * 5
  result, _ = evaluate(sizes, WITHOUT, PROTOCOL)
  windows = [normalized(record['image']) for record in Pictures(sizes, WITHOUT.classes)]
  stages = zip(*(encode(window).assignments for window in windows))
  want = metrics.GroupingHealth.from_assignments([jnp.stack(stage) for stage in stages]).compute()
  assert result.health == pytest.approx(want, rel=1e-5)


def test_each_window_is_encoded_once_in_full_batches(evaluate, monkeypatch):
  """Those of several pictures together, with and without a sweep; label maps stay where they are made."""
  batches, fetched = [], []
  encode_windows = window_encoder.encode_windows

  def encode(variables, windows, mask, **options):
    batches.append(int(mask.sum()))
    return encode_windows(variables, windows, mask, **options)

  monkeypatch.setattr(window_encoder, 'encode_windows', encode)
  monkeypatch.setattr(labeller.Labeller, '_fetch', lambda *_: fetched.append(1))
  evaluate(ORDINARY, WITH_BACKGROUND, threshold(0.1), thresholds=(0.02, 0.3), on_image=None)
  sizes = [window_encoder.resized_size(*size, PROTOCOL, PATCH) for size in ORDINARY]
  whole, rest = divmod(sum(PROTOCOL.windows_along(h) * PROTOCOL.windows_along(w) for h, w in sizes), 8)
  assert batches == [8] * whole + [rest] * bool(rest) and whole > 5 and not fetched


def test_a_sweep_gives_what_each_threshold_gives(evaluate):
  swept, _ = evaluate(ORDINARY, WITH_BACKGROUND, threshold(0.1), thresholds=(0.02, 0.3))
  for value, counts in zip(swept.thresholds, swept.threshold_counts):
    alone, _ = evaluate(ORDINARY, WITH_BACKGROUND, threshold(value))
    assert np.array_equal(counts, alone.counts)
    assert not np.array_equal(counts, swept.counts)
  curve = swept.to_json()['threshold_miou']
  assert [row['threshold'] for row in curve] == [0.02, 0.3]


def test_plain_is_softmax_and_one_threshold(evaluate, encode, variables, text_embeds):
  """On pictures of one window, where stitching does nothing."""
  plain = threshold(0.3, class_filter=None, double_softmax=False, threshold_mode='global')
  sizes = [(WINDOW, WINDOW)] * 4
  segments = {}

  def keep(encoded, labelled):
    segments[encoded.image.key] = encoded.segments[None][0], labelled

  evaluate(sizes, WITH_BACKGROUND, plain, on_image=keep)
  scale = np.exp(float(variables['params']['logit_scale']))
  unit = reference_protocol.unit
  for record in Pictures(sizes, CLASSES):
    segment, labelled = segments[record['key']]
    embeds = np.asarray(encode(normalized(record['image'])).segments, np.float64)
    p = reference_protocol.softmax(scale * unit(embeds) @ unit(text_embeds).T)
    np.testing.assert_allclose(labelled.class_scores[0], p, rtol=1e-4)
    p = p[segment]
    assert np.array_equal(labelled.labels, np.where(p.max(-1) < 0.3, 0, p.argmax(-1) + 1))
    np.testing.assert_allclose(labelled.scores, np.maximum(p.max(-1), 0.3), rtol=1e-4)


def test_table_and_baseline():
  counts = np.array([[6, 2, 0], [1, 1, 0], [0, 0, 0]])
  result = Result(
    benchmark=make_benchmark('mine', ('cat', 'dog', 'cow')),
    protocol=PROTOCOL,
    names=NameSet('benchmark', parse_class_names(['cat|kitten', 'dog', 'cow']), ()),
    num_images=2,
    counts=counts,
    oracle_counts=np.diag([8, 2, 0]),
    health={},
    thresholds=(),
    threshold_counts=counts[:0],
    provenance={},
  )
  lines = result.table().splitlines()
  assert 'mine, 2 images, protocol groupvit' in lines[0] and 'stride=16' in lines[1]
  assert 'cat               66.7   100.0' in lines
  assert 'cow                  -       -' in lines
  assert 'mIoU              45.8   100.0' in lines
  assert "everything called 'cat': mIoU 40.0%, pixel accuracy 80.0%" in lines
  assert result.confusion_csv().splitlines()[:2] == ['is,called cat,called dog,called cow,pixels', 'cat,6,2,0,8']
  assert result.scalars()['constant_miou'] == pytest.approx(0.4)
  assert result.to_json()['iou'] == {'cat': 6 / 9, 'dog': 0.25, 'cow': None}
  assert result.to_json()['class_names'] == ['cat|kitten', 'dog', 'cow']


def test_class_embeddings_are_means_of_projected_features(model, variables):
  templates = ['a photo of the {}.', 'the {}.']
  names = ('cat', 'dog')
  embed = functools.partial(model.apply, variables, method='encode_text')
  tokenizer = Letters()
  want = []
  for name in names:
    tokens = tokenizer.encode([template.format(name) for template in templates], 6)
    want.append(np.asarray(embed(jnp.asarray(tokens)), np.float64).mean(axis=0))
  want = reference_protocol.unit(np.array(want))
  prompts = [[template.format(name) for template in templates] for name in names]
  got = class_names.embed_prompts(model, variables, tokenizer, prompts)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'source': Pictures([], CLASSES[1:])}, 'shapes has no images'),
    ({'source': Pictures(ORDINARY, CLASSES[:9])}, 'the source labels 9 classes .background'),
    ({'text_embeds': np.ones((8, 8), np.float32)}, 'asks for 9 classes but 8 are embedded'),
    ({'mesh': 'all', 'batch_size': 12}, 'batch_size=12 is not a positive multiple of the 8 devices'),
  ],
)
def test_mistakes_are_named(changes, message, model, variables, text_embeds):
  arguments = {'source': Pictures(ORDINARY, CLASSES[1:]), 'batch_size': 8, 'text_embeds': text_embeds} | changes
  if 'mesh' in arguments:
    arguments['mesh'] = sharding.make_mesh()
  scorings = [score_by(arguments.pop('text_embeds'), WITHOUT, PROTOCOL)]
  with pytest.raises(ValueError, match=message):
    evaluator.evaluate(model, variables, scorings=scorings, **arguments)


def test_a_label_that_is_no_class_is_named(evaluate):
  fewer = make_benchmark('shapes', CLASSES[1:4])
  source = Pictures([(32, 32)], CLASSES)
  with pytest.raises(ValueError, match="label map of '0: 32 x 32' holds [3-9], but shapes has .* 2"):
    evaluator.cut_labelled(source, 0, scorings=[score_by(np.ones((3, 8)), fewer, PROTOCOL)], patch_size=PATCH)
