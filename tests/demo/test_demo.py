"""The page: what it does with pictures and words, and all of it in a real browser."""

import base64
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import ml_collections
import numpy as np
from PIL import Image
from playwright import sync_api
import pytest

from groupvit_jax.demo import viewer as viewer_lib
from groupvit_jax.demo.examples import make_examples
from groupvit_jax.demo.viewer import Upload, Viewer
from groupvit_jax.eval import window_encoder
from groupvit_jax.predictor import Predictor
from groupvit_jax.train import restored_run
from tests import browser, photos
from tests.photos import photo
from tests.trained import trained_workdir

ROOT = pathlib.Path(__file__).parents[2]
# What copying a picture in another program does.
COPY = """async data => {
  const blob = await (await fetch('data:image/png;base64,' + data)).blob();
  await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
}"""
WORDS = 'dog|puppy, banana, grass'
# Where nobody answers: the page must not be asked for there.
PROXY = dict.fromkeys(('HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'), 'http://127.0.0.1:9')


@pytest.fixture(scope='module')
def viewer() -> Viewer:
  return Viewer(Predictor.from_pretrained(trained_workdir()), num_stages=1, max_pixels=10_000)


@pytest.fixture
def picture(tmp_path) -> Upload:
  Image.fromarray(photo(60, 90)).save(tmp_path / 'a.png')
  return Upload(str(tmp_path / 'a.png'), 'a.png')


def test_other_words_and_sliders_do_not_encode_again(viewer, picture, monkeypatch):
  passes = []
  for name in ('encode_windows', 'encode_groups'):
    run = getattr(window_encoder, name)
    counted = lambda *args, run=run, name=name, **kw: passes.append(name) or run(*args, **kw)
    monkeypatch.setattr(window_encoder, name, counted)
  first = viewer.segment(picture, WORDS, 0, None)
  assert first.prediction.classes == ('dog', 'banana', 'grass')
  shown = viewer_lib.for_screen(first.prediction)
  drawn = [shown.overlay(opacity) for opacity in (0.1, 0.9)]
  assert not np.array_equal(*drawn) and passes == ['encode_windows', 'encode_groups']
  cut = viewer.segment(picture, WORDS, 0.9, first)
  assert cut.prediction.classes[0] == 'background'
  np.testing.assert_array_equal(viewer_lib.for_screen(cut.prediction).group_overlay(), shown.group_overlay())
  assert viewer.segment(picture, 'cat,', 0, cut._replace(prediction=None)).prediction.areas.tolist() == [1]
  assert len(passes) == 2


def test_what_a_person_gets_wrong_is_said_in_a_sentence(viewer, picture, tmp_path):
  (tmp_path / 'no.png').write_bytes(b'not a picture')
  Image.new('RGB', (101, 100)).save(tmp_path / 'large.png')
  for path, text, message in (
    (picture, 'dog, dog', "the class 'dog' is named twice"),
    (Upload(str(tmp_path / 'no.png'), 'no.png'), WORDS, "^image 'no.png' has no format that can be read"),
    (
      Upload(str(tmp_path / 'large.png'), 'large.png'),
      WORDS,
      'large.png has 101 x 100 pixels; this page takes up to 0.01 million',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      viewer.segment(path, text, 0, None)


def test_without_class_names_an_image_is_grouped(viewer, picture):
  view = viewer.segment(picture, ' , ', 0, None)
  assert view.prediction is None and viewer.compiled and view.encoded.group_maps()[0].shape == (60, 90)
  assert viewer.segment(None, WORDS, 0, view) is None
  assert viewer.segment(picture, WORDS, 0, view).encoded is view.encoded


def test_the_legend_has_areas_and_no_markup_of_the_visitors(viewer, picture):
  found = viewer.segment(picture, '<b>x</b>', 0, None).prediction
  text = viewer_lib.legend(viewer_lib.for_screen(found), found)
  assert '&lt;b&gt;x&lt;/b&gt;</span></td><td>100.0%' in text and '<b>' not in text
  some = viewer.segment(picture, WORDS, 0, None).prediction
  found, _, absent = viewer_lib.legend(some, some).partition('not found: ')
  for name, area in zip(some.classes, some.areas):
    assert (name in found, name in absent) == (area > 0, area == 0)


def test_what_is_kept_fits_a_screen(viewer, tmp_path):
  Image.fromarray(photo(8, 1250)).resize((1300, 7)).save(tmp_path / 'long.png')
  view = viewer.segment(Upload(str(tmp_path / 'long.png'), 'long.png'), WORDS, 0, None)
  shown = viewer_lib.for_screen(view.prediction)
  assert view.prediction.labels.shape == (7, 1300) and shown.overlay(0.5).shape == (7, 1280, 3)
  assert [x.shape for x in shown.groups] == [(7, 1280)] and shown.group_overlay(0).shape == (7, 1280, 3)
  assert {x.shape for x in (shown.image[..., 0], shown.labels, shown.pixel_scores)} == {(7, 1280)}
  assert view.encoded.image.shape == (7, 1280, 3)


def test_examples_are_of_the_kind_that_the_model_was_trained_on(tmp_path):
  pytest.importorskip('skimage')
  config = restored_run.restore(trained_workdir()).config
  scenes = make_examples(config, tmp_path)
  assert len({pathlib.Path(path).read_bytes() for path, _ in scenes}) == 4
  assert {words for _, words in scenes} == {', '.join([*config.data.scenes.things, *config.data.scenes.stuff])}
  imported = ml_collections.ConfigDict(dict(data=dict(num_prompts=0)))  # names no scenes
  for (path, words), name in zip(make_examples(imported, tmp_path), ('cat', 'coffee|cup', 'rocket'), strict=True):
    assert min(Image.open(path).size) >= 300 and words.split(', ')[0] == name


@contextlib.contextmanager
def served(workdir: pathlib.Path, *options: str):
  """The address of the page, served by the command that people give, on a machine behind a proxy."""
  command = [sys.executable, '-m', 'groupvit_jax.demo', f'--workdir={workdir}', '--port=0', *options]
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | PROXY | {'JAX_NUM_CPU_DEVICES': '1'},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
  )
  try:
    line = process.stdout.readline()
    found = re.fullmatch(r'the page is at (\S+)\n', line)
    assert found, line + process.stdout.read()
    yield found[1]
  finally:
    process.terminate()
    process.communicate(timeout=60)


def picture_bytes(image: np.ndarray) -> dict[str, object]:
  """A file as a browser uploads it."""
  return dict(name='mine.png', mimeType='image/png', buffer=photos.encode(image, 'PNG'))


def encoded(image: np.ndarray) -> str:
  """A file's contents as scripts of a page take them."""
  return base64.b64encode(photos.encode(image, 'PNG')).decode()


def changed(page: sync_api.Page, before: str) -> str:
  """Waits for another overlay; returns it."""
  page.wait_for_function(
    "old => { const i = document.querySelector('#overlay img'); return i && i.src && i.src !== old }", arg=before
  )
  return page.locator('#overlay img').get_attribute('src')


@contextlib.contextmanager
def opened(address: str):
  """The page in a browser."""
  sync_api.expect.set_options(timeout=90_000)
  with browser.launched() as chromium:
    page = chromium.new_page(viewport=dict(width=1100, height=1000))
    page.set_default_timeout(90_000)
    page.goto(address)
    yield page


def test_in_a_browser():
  """Upload, paste, type, look; move the sliders; make mistakes; take the results home."""
  options = '--max_upload_mb=1', '--max_megapixels=0.25'
  with served(trained_workdir(), *options) as address, opened(address) as page:
    page.context.grant_permissions(['clipboard-read', 'clipboard-write'], origin=address.rstrip('/'))
    elsewhere = []
    page.on(
      'request',
      lambda request: (
        elsewhere.append(request.url) if not request.url.startswith((address, 'data:', 'blob:')) else None
      ),
    )
    page.reload()
    message, legend, words = page.locator('#message'), page.locator('#legend'), page.locator('#words textarea')
    upload = page.locator('#picture input[type=file]')
    upload.set_input_files(picture_bytes(photo(60, 90)))
    sync_api.expect(message).to_contain_text('Type what to look for')
    sync_api.expect(page.locator('#groups img')).to_be_visible()
    words.fill('dog|puppy, banana')
    words.press('Enter')
    first = changed(page, '')
    sync_api.expect(message).to_be_empty()
    assert {'dog', 'banana'} <= set(re.findall(r'\w+', legend.inner_text()))
    words.fill('grass, sky')  # as many words as before: nothing to compile
    page.locator('#segment').click()
    second = changed(page, first)
    sync_api.expect(legend).to_contain_text('grass')
    page.locator('#opacity input[type=number]').fill('0.9')
    third = changed(page, second)
    page.locator('#threshold input[type=number]').fill('1')
    sync_api.expect(legend).to_contain_text('background')
    changed(page, third)
    assert page.locator('#stage').count() == 0  # one grouping stage
    page.get_by_text('About this model').click()
    sync_api.expect(page.get_by_text('step 6')).to_be_visible()
    files = {}
    for name in ('mask', 'report'):
      with page.expect_download() as download:
        page.locator(f'#{name}').click()
      files[name] = download.value.path()
    report = json.loads(files['report'].read_text())
    assert report['picture'] == 'mine.png' and (report['height'], report['width']) == (60, 90)
    assert {row['name'] for row in report['classes']} == {'background', 'grass', 'sky'}
    mask = np.asarray(Image.open(files['mask']))
    for row in report['classes']:
      assert (mask == row['label']).sum() == row['pixels']
    box = page.locator('#overlay img').bounding_box()
    page.mouse.move(box['x'] + 0.501 * box['width'], box['y'] + 0.501 * box['height'])
    (middle,) = (row['name'] for row in report['classes'] if row['label'] == mask[30, 45])
    sync_api.expect(page.locator('#class-name')).to_have_text(middle)

    upload.set_input_files(dict(name='bad.png', mimeType='image/png', buffer=b'not a picture'))
    sync_api.expect(message).to_contain_text("image 'bad.png' has no format that can be read")
    assert page.locator('#overlay img').count() == 0
    page.locator('#opacity input[type=number]').fill('0.5')  # draws nothing: there is no picture
    upload.set_input_files(picture_bytes(np.zeros((600, 500, 3), np.uint8)))
    sync_api.expect(message).to_contain_text('this page takes up to 0.25 million')
    assert page.locator('#overlay img').count() == 0
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    upload.set_input_files(picture_bytes(noise))
    sync_api.expect(page.get_by_text(re.compile('maximum allowed size'))).to_be_visible()
    page.locator('#examples button.gallery-item').first.click()
    before = changed(page, '')
    page.evaluate(COPY, encoded(photo(70, 40, seed=2)))
    page.locator('#opacity').click(position=dict(x=5, y=5))  # from here, too, keys paste
    page.keyboard.press('Control+V')
    changed(page, before)
    with page.expect_download() as download:
      page.locator('#mask').click()
    assert Image.open(download.value.path()).size == (40, 70)
    words.fill(' , ')
    page.locator('#segment').click()
    sync_api.expect(message).to_contain_text('Type what to look for')
    page.set_viewport_size(dict(width=900, height=844))
    tops = [page.locator(name).bounding_box()['y'] for name in ('#picture', '#overlay', '#groups')]
    assert max(tops) - min(tops) < 2  # side by side
    page.set_viewport_size(dict(width=390, height=844))  # a phone: nothing wider than the screen
    assert page.evaluate('document.documentElement.scrollWidth') <= 390
    assert not elsewhere
    host, port = re.fullmatch(r'http://(.+):(\d+)/', address).groups()
    assert host == '127.0.0.1'
    with pytest.raises(ConnectionRefusedError):  # answers only where everything is let in
      socket.create_connection(('127.0.0.2', int(port)), timeout=5).close()


def test_a_mistake_takes_one_line():
  command = [sys.executable, '-m', 'groupvit_jax.demo', '--workdir=/nowhere/at/all']
  done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
  assert done.returncode == 2 and done.stderr.count('\n') == 1, done.stderr
  assert done.stderr.startswith('error: there is no workdir /nowhere/at/all; train one with ')
