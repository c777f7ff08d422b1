"""ONNX exports: the same answers from ONNX Runtime and OpenVINO, and from the static page in a browser."""

import collections
import dataclasses
import functools
import http.server
import importlib.util
import json
import pathlib
import random
import re
import shutil
import sys
import threading

import numpy as np
from PIL import Image
from playwright import sync_api
import pytest

from groupvit_jax.commands.export import export
from groupvit_jax.commands.score import evaluate_benchmark, Request
from groupvit_jax.commands.segment import segment_images
from groupvit_jax.commands.web_folder import tokenizer_to_json
from groupvit_jax.data.sources import build_scenes
from groupvit_jax.data.tokenizer import build_tokenizer
from groupvit_jax.interop import onnx_graph
from groupvit_jax.predictor import Predictor
from groupvit_jax.train import restored_run
from tests import browser
from tests.data.test_tokenizer import write_clip_folder
from tests.photos import encode, photo
from tests.trained import trained_workdir

onnx = pytest.importorskip('onnx')
for _package in ('onnxruntime', 'openvino'):  # which needs no import: OpenVINO's has side effects
  if not importlib.util.find_spec(_package):
    pytest.skip(f'{_package} is not installed', allow_module_level=True)
NAMES = ['dog|puppy', 'banana', 'grass', 'sky']
# Segments an image by the page's own modules.
SEGMENT = """async ([data, width, height, names, threshold]) => {
  const {Segmenter} = await import('./segmenter.js');
  self.segmenter ??= await Segmenter.load();
  const encoded = await self.segmenter.encode({data: Uint8Array.from(data), width, height});
  const {labels, scores} = await self.segmenter.segment(encoded, names, threshold);
  return [Array.from(labels), Array.from(scores), encoded.groups.map(map => Array.from(map))];
}"""
ENCODE = """async ([tokenizer, texts, length]) => {
  const {encode} = await import('./tokenizer.js');
  return Array.from(encode(tokenizer, texts, length));
}"""
ODD = 'aAbBzZ éÉßẞςΣσ ñÑøØİıŁ日本語漢かカ한국 😀👍🏽\u200d\u200b\t\n\u00a0\u3000ﬁ①²½™…“”—-–\'"&;!?.,019Ⅷ㎏ǅᎠ'


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> pathlib.Path:
  """The page of a tiny run."""
  if not shutil.which('npm'):
    pytest.skip('npm is not installed, which fetches ONNX Runtime for the page')
  folder = tmp_path_factory.mktemp('web') / 'site'
  report = export(str(trained_workdir()), 'web', str(folder), webgpu=True)
  assert '100.00% of patches in the same segment as with JAX' in report
  return folder


@pytest.fixture(scope='module')
def address(site):
  """Where the page is served."""

  class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'http://127.0.0.1:{server.server_port}/'
  server.shutdown()


@pytest.fixture(scope='module')
def page(address):
  """The page in a browser that reaches no other host."""
  with browser.launched() as chromium:
    page = chromium.new_page(viewport=dict(width=1100, height=900))
    page.set_default_timeout(90_000)
    page.context.route(lambda url: not url.startswith((address, 'data:', 'blob:')), lambda route: route.abort())
    page.failed = []
    page.on('requestfailed', lambda request: page.failed.append(request.url))
    page.on('pageerror', lambda error: page.failed.append(str(error)))
    page.goto(address)
    page.wait_for_selector('#legend tr')
    yield page


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_runtimes_answer_as_jax_does(runtime, site):
  images = [photo(48, 70), photo(40, 33, seed=2)]
  ours = Predictor.from_pretrained(trained_workdir())(images, NAMES, threshold=0.2)
  predictor = Predictor.from_pretrained(site, runtime=runtime)
  assert runtime in repr(predictor) and 'openvino_telemetry.backend' not in sys.modules
  for mine, other in zip(predictor(images, NAMES, threshold=0.2), ours, strict=True):
    np.testing.assert_allclose(mine.class_scores, other.class_scores, atol=1e-4)
    assert (mine.labels == other.labels).mean() > 0.999 and (mine.segments == other.segments).mean() > 0.999
  with pytest.raises(ValueError, match='takes windows of .* px and an image or a protocol asks for'):
    predictor(photo(8, 200), NAMES)


def test_eval_runs_an_export(site, tmp_path):
  """--images and a labelled benchmark, with the labels of JAX, and with the runtime in the results."""
  for name in ('images', 'labels'):
    (tmp_path / name).mkdir()
  (tmp_path / 'classes.txt').write_text('\n'.join(NAMES))
  predictor = Predictor.from_pretrained(trained_workdir())
  for seed in range(2):
    truth = predictor(photo(48, 70, seed=seed), NAMES).labels
    Image.fromarray(photo(48, 70, seed=seed)).save(tmp_path / f'images/{seed}.png')
    Image.fromarray(truth).save(tmp_path / f'labels/{seed}.png')
  shared = dict(overwrite=False, protocol='native', runtime='openvino')
  images = dict(images=str(tmp_path / 'images/*'), classes=','.join(NAMES), output=str(tmp_path / 'out'), changes={})
  assert segment_images(str(site), **images, **shared) == 0
  masks = [
    [np.array(Image.open(tmp_path / name.format(seed))) for seed in range(2)]
    for name in ('labels/{}.png', 'out/{}.mask.png')
  ]
  assert np.mean(np.equal(*masks)) > 0.999
  request = Request('folder', data_dir=str(tmp_path), output=str(tmp_path / 'scores'), **shared)
  assert evaluate_benchmark(str(site), request) == 0
  found = [json.loads((tmp_path / name / 'results.json').read_text()) for name in ('out', 'scores')]
  assert found[1]['pixel_accuracy'] > 0.999
  for each in found:
    assert each['provenance']['runtime'] == 'openvino' and each['provenance']['precision'].startswith(
      'float32 by openvino'
    )
  for call, message in (
    (lambda: evaluate_benchmark(str(site), Request('scenes', **shared)), 'has no held-out scenes'),
    (lambda: evaluate_benchmark(str(site), dataclasses.replace(request, protocol='tcl')), 'takes windows of .* px'),
    (lambda: evaluate_benchmark(str(trained_workdir()), request), 'is no ONNX export'),
    (lambda: evaluate_benchmark(str(site), dataclasses.replace(request, checkpoint='best')), 'is no workdir'),
  ):
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.parametrize('side, activation', [('image', 'Gelu'), ('text', 'Sigmoid')])
def test_graphs_have_what_runtimes_have_kernels_for(side, activation, site):
  """Norms, activations and attention are one operation each."""
  count = collections.Counter(node.op_type for node in onnx.load(site / f'{side}.onnx').graph.node)
  assert not {'Einsum', 'Erf', 'ReduceSumSquare'} & set(count)
  assert count['Softmax'] and count['LayerNormalization'] > count[activation] > 0


def test_mistakes(site, tmp_path, monkeypatch):
  run = str(trained_workdir())
  monkeypatch.delitem(onnx_graph._RULES, 'concatenate')
  for call, message in (
    (lambda: Predictor.from_pretrained(site, runtime='tensorrt'), "runtime='tensorrt': use onnxruntime, openvino"),
    (lambda: Predictor.from_pretrained(run, runtime='openvino'), 'is no ONNX export'),
    (lambda: export(run, 'onnx', str(tmp_path / 'out')), 'cannot be converted: no rule converts concatenate to ONNX$'),
    (lambda: export(run, 'onnx', str(tmp_path / 'out'), window=9), 'window=9 is no multiple of the patch size'),
    (lambda: export(run, 'web', str(tmp_path / 'out'), window=8 * 10**6), 'window=8000000 is no multiple .* or above'),
    (lambda: export(run, 'onnx', str(tmp_path / 'out'), dtype='bfloat16'), "--format=onnx has no dtype='bfloat16'"),
    (lambda: export(run, 'onnx', str(tmp_path / 'out'), webgpu=True), '--webgpu is of --format=web, not onnx'),
    (lambda: export(run, 'stablehlo', str(tmp_path / 'out'), window=64), 'window=64 is of --format=onnx and web'),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
@pytest.mark.parametrize('damage', [b'', b'cut', None])
def test_a_damaged_export_takes_one_line(damage, runtime, site, tmp_path):
  for path in site.iterdir():
    if path.name != 'text.onnx':
      (tmp_path / path.name).symlink_to(path)
    elif damage is not None:
      (tmp_path / path.name).write_bytes(path.read_bytes()[:2000] if damage else b'')
  with pytest.raises(ValueError, match=r'is no whole bundle .*; export it again$') as error:
    Predictor.from_pretrained(tmp_path, runtime=runtime)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('dtype', ['float16', 'int8'])
def test_small_weights_and_their_agreement(dtype, site, tmp_path):
  export(str(trained_workdir()), 'onnx', str(tmp_path / 'out'), dtype=dtype, window=48)  # positions are resized
  found = json.loads((tmp_path / 'out' / 'bundle.json').read_text())
  assert found['dtype'] == dtype and 0.8 < found['same_segment'] <= 1 and found['least_cosine'] < 1
  sizes = [(folder / 'image.onnx').stat().st_size for folder in (tmp_path / 'out', site)]
  assert sizes[0] < sizes[1]


def test_webgpu_labels_as_python_does(address):  # before the other browser is there: one at a time
  image = photo(32, 32)
  want = Predictor.from_pretrained(trained_workdir())(image, NAMES)
  rgba = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
  with browser.launched(browser.SOFTWARE_WEBGPU) as chromium:
    page = chromium.new_page()
    page.goto(address)
    page.wait_for_selector('#legend tr')
    labels, scores, _ = page.evaluate(SEGMENT, [rgba.ravel().tolist(), 32, 32, NAMES, 0])
    assert page.evaluate('segmenter.bundle.provider') == 'webgpu'
  assert (np.reshape(labels, (32, 32)) == want.labels).mean() > 0.999
  np.testing.assert_allclose(scores, want.scores, atol=1e-2)


def test_the_browser_labels_as_python_does(page):
  run = restored_run.restore(trained_workdir())
  scenes = build_scenes(run.config.data.scenes, tuple(run.config.model.vision.image_size), 'test')
  images = [scenes[index % len(scenes)]['image'] for index in range(20)] + [photo(70, 110)]
  predictor = Predictor.from_pretrained(trained_workdir())
  for threshold in (None, 0.3):
    for image, want in zip(images, predictor(images, NAMES, threshold=threshold), strict=True):
      rgba = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
      height, width = image.shape[:2]
      labels, scores, groups = page.evaluate(SEGMENT, [rgba.ravel().tolist(), width, height, NAMES, threshold or 0])
      same = (np.reshape(labels, (height, width)) == want.labels).mean()
      assert same > 0.999 if image is not images[-1] else same > 0.97  # which was resized by other code
      np.testing.assert_allclose(scores[want.background :], want.scores[want.background :], atol=1e-2)
      if image is not images[-1]:
        assert (np.reshape(groups[-1], (height, width)) == want.segments).mean() > 0.999
  assert page.evaluate('segmenter.bundle.provider') == 'wasm'


def test_the_page(page, address, site, tmp_path):
  """An example is shown at once; other images, names and sliders; downloads; a phone's width; without a network."""
  legend, status = page.locator('#legend'), page.locator('#status')
  sync_api.expect(status).to_contain_text('encoded and segmented in')
  page.locator('#file').set_input_files(
    dict(name='mine.png', mimeType='image/png', buffer=encode(photo(60, 90), 'PNG'))
  )
  sync_api.expect(status).to_contain_text('90 × 60 px')
  page.locator('#names').fill('dog, <b>grass</b>')
  sync_api.expect(page.locator('body')).to_contain_text('<b>grass</b>')
  page.locator('#threshold').fill('1')
  sync_api.expect(legend).to_contain_text('background')
  box = page.locator('#segments').bounding_box()
  page.mouse.move(box['x'] + 5, box['y'] + 5)
  sync_api.expect(page.locator('#under')).to_have_text(re.compile('background|dog|grass'))
  files = {}
  for name in ('mask', 'json'):
    with page.expect_download() as download:
      page.locator(f'#{name}').click()
    files[name] = download.value.path()
  report = json.loads(files['json'].read_text())
  mask = np.asarray(Image.open(files['mask']).convert('L'))
  assert (report['picture'], report['height'], report['width']) == ('mine', 60, 90) == ('mine', *mask.shape)
  for row in report['classes']:
    assert (mask == row['label']).sum() == row['pixels']
  page.locator('#file').set_input_files(dict(name='bad.png', mimeType='image/png', buffer=b'no image'))
  sync_api.expect(status).to_contain_text('bad.png is no image')
  page.set_viewport_size(dict(width=390, height=844))
  assert page.evaluate('document.documentElement.scrollWidth') <= 390
  page.screenshot(path=tmp_path / 'phone.png', full_page=True)
  assert sum(path.stat().st_size for path in site.rglob('*') if path.is_file()) < 10e6
  page.context.set_offline(True)
  page.reload()
  page.wait_for_selector('#legend tr')
  page.context.set_offline(False)
  assert page.evaluate('self.crossOriginIsolated') and page.failed == []


def test_tokenizers_in_the_browser(page, tmp_path):
  write_clip_folder(tmp_path)
  run = restored_run.restore(trained_workdir())
  scenes, draw = build_scenes(run.config.data.scenes, (32, 32), 'train'), random.Random(0)
  texts = [scenes[index]['text'] for index in range(2000)]
  texts += [''.join(draw.choice(ODD) for _ in range(draw.randrange(40))) for _ in range(8000)]
  for tokenizer in (run.tokenizer, build_tokenizer(tmp_path)):
    found = page.evaluate(ENCODE, [tokenizer_to_json(tokenizer), texts, 24])
    np.testing.assert_array_equal(np.reshape(found, (len(texts), 24)), tokenizer.encode(texts, 24))
