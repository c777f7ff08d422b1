"""The page for people, in a browser where there is one."""

import dataclasses
import re

import numpy as np
import pytest

from groupvit_jax.eval import protocols, report
from groupvit_jax.eval.benchmarks import find_benchmark
from groupvit_jax.eval.class_names import find_names
from groupvit_jax.eval.draw import Row
from groupvit_jax.eval.result import Result
from tests import browser
from tests.photos import photo

BENCHMARK = find_benchmark('voc21')


def make_result(thresholds=(0.1, 0.5, 0.9)) -> Result:
  """Counts in which cats are often called dogs."""
  rng = np.random.default_rng(0)
  counts = rng.integers(0, 30, (21, 21)) + np.diag(rng.integers(100, 900, 21))
  counts[8, 12] = 5000
  counts[20] = counts[:, 20] = 0
  swept = np.array([counts + np.eye(21, dtype=int) * 50 * i for i in range(len(thresholds))])
  return Result(
    BENCHMARK,
    BENCHMARK.fix_threshold(protocols.GROUPVIT),
    find_names(BENCHMARK, 'groupvit'),
    7,
    counts,
    np.diag(counts.sum(axis=1)),
    {},
    thresholds,
    swept,
    {'step': '12', 'code': 'abc<def>'},
  )


def make_row(height: int, width: int) -> Row:
  labels = np.zeros((height, width), np.uint8)
  labels[: height // 2, : width // 2] = 8
  groups = np.add.outer(np.arange(height) * 3 // height, np.arange(width) * 3 // width).astype(np.uint8)
  return Row(photo(height, width), np.where(labels, 12, 255).astype(np.uint8), labels, (groups * 7, groups))


@pytest.fixture(scope='module')
def page() -> str:
  result = make_result()
  gallery = {'best': [('a & b', 0.9, make_row(90, 120))], 'median': [], 'worst': [('big', 0.1, make_row(900, 1300))]}
  return report.make_page(result, gallery, report.threshold_curve(result), 'stride=224\n<settings>')


def test_figures_stand_beside_the_published_ones(page):
  result = make_result()
  assert f'{100 * result.scores.miou:.1f}' in page and '<td class="number">52.3</td>' in page
  assert 'published: GroupViT-S/16 of gcc_redcaps, protocol groupvit (here 7 of 1,449 images)' in page
  assert 'published: SimSeg, protocol unknown, refinement densecrf (another protocol; ' in page
  assert '<b>groupvit</b>' in page and 'the 5 best classes of a window, double softmax' in page
  assert 'background threshold 0.95 in each window' in page
  rows = re.findall(r'<tr><td>(.*?)</td><td>(.*?)</td><td class="number">(.*?)</td><td class="number">(.*?)</td>', page)
  wrong = result.counts.sum() - np.trace(result.counts)
  assert rows[0] == ('cat', 'dog', f'{5000 / result.counts[8].sum():.1%}'[:-1], f'{5000 / wrong:.1%}'[:-1])
  values = re.findall(r'class="value">(.*?)</div>', page)
  assert len(values) == 20 and [float(value) for value in values] == sorted(map(float, values), reverse=True)
  assert '<summary>1 neither in the truth nor predicted</summary>tvmonitor</details>' in page


def test_a_strip_says_what_its_colours_are(page):
  """Of what is true or predicted there: a cat (64, 0, 0) that is called a dog (64, 0, 128), and background."""
  legends = re.findall(r'<p class="legend">(.*?)</p>', page)
  found = re.findall(r'background:(#\w+)"></i>(\w+)<', legends[0])
  assert sorted(found) == [('#000000', 'background'), ('#400000', 'cat'), ('#400080', 'dog')] and len(legends) == 2


def test_a_changed_protocol_is_not_called_by_its_name_alone():
  protocol = protocols.override(protocols.GROUPVIT, {'stride': 112, 'class_filter': None})
  result = dataclasses.replace(make_result(), protocol=BENCHMARK.fix_threshold(protocol), num_images=1449)
  page = report.make_page(result, {}, None, '')
  assert 'this checkpoint, protocol groupvit with stride=112, class_filter=None</td>' in page
  assert (
    page.count('protocol groupvit (changed here: stride, class_filter)') == 2 and 'all classes, double softmax' in page
  )
  assert result.table().splitlines()[0].endswith('1,449 images, protocol groupvit with stride=112, class_filter=None')
  as_published = dataclasses.replace(make_result(), num_images=1449)
  unlike = [as_published.unlike(row) for row in BENCHMARK.published]
  assert unlike == ['', ''] + ['another protocol'] * (len(unlike) - 2)


def test_what_people_wrote_is_text(page):
  assert 'abc&lt;def&gt;' in page and '&lt;settings&gt;' in page and 'a &amp; b' in page


def test_no_curve_and_no_gallery_where_there_are_none():
  page = report.make_page(make_result(()), {'best': [], 'median': [], 'worst': []}, None, '')
  assert 'threshold</h2>' not in page and 'images</h2>' not in page and '<img' not in page


def test_a_curve_of_equal_scores_is_flat():
  result = make_result()
  swept = np.stack([result.counts + np.diag(i * (result.counts.diagonal() > 0)) for i in range(3)])
  curve = report.threshold_curve(dataclasses.replace(result, threshold_counts=swept))
  rows, _ = np.nonzero((curve == (0x00, 0x77, 0xDD)).all(axis=-1))
  assert len(rows) and np.ptp(rows) < 60


def test_in_a_browser(page, tmp_path):
  (tmp_path / 'report.html').write_text(page)
  asked, faults = [], []
  with browser.launched() as chromium:
    tab = chromium.new_page(viewport={'width': 1200, 'height': 900})
    tab.on('request', lambda request: asked.append(request.url))
    tab.on('console', lambda message: faults.append(message.text))
    tab.on('pageerror', lambda error: faults.append(str(error)))
    tab.goto(f'file://{tmp_path}/report.html')
    sizes = tab.evaluate('Array.from(document.images, i => [i.complete, i.naturalWidth, i.naturalHeight, i.width])')
    widths = tab.evaluate('Array.from(document.querySelectorAll(".fill"), e => e.getBoundingClientRect().width)')
    overflow = []
    for width in (1200, 420):
      tab.set_viewport_size({'width': width, 'height': 900})
      overflow.append(tab.evaluate('document.documentElement.scrollWidth - window.innerWidth'))
  assert [url for url in asked if not url.startswith(('file:', 'data:'))] == [] and faults == []
  assert len(sizes) == 1 + 2 * 5 and all(done and width > 100 and shown > 100 for done, width, _, shown in sizes)
  assert sizes[6][1:3] == [384, 266]  # a large picture is no larger than the page shows it
  values = [float(value) for value in re.findall(r'class="value">([\d.]+)', page)]
  np.testing.assert_allclose(widths[: len(values)], np.array(values) / values[0] * widths[0], atol=1.5)
  assert overflow[0] <= 0 and overflow[1] <= 0, overflow
