"""An HTML page of a result: headline, classes, confusions, threshold curve and images, in one file."""

import base64
from collections.abc import Iterable, Mapping, Sequence
import html
import io

import numpy as np
from PIL import Image

from groupvit_jax.eval import draw
from groupvit_jax.eval.draw import Row
from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.eval.result import Result
from groupvit_jax.model import metrics

MARK = '<!-- made by groupvit_jax/eval.py -->'  # identifies a page of ours
_LONG_SIDE = 384  # pixels of a tile, at most: about what a page shows, so that names stay legible
_CONFUSIONS = 12
_SMALLEST_SPAN = 1  # points of mIoU on the axis of the threshold curve, at least
_TITLES = {'best': 'Best images', 'median': 'Median images', 'worst': 'Worst images'}
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --quiet: #555; --page: #fff; --line: #e4e4e4; --track: #efefef; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --quiet: #aaa; --page: #161618; --line: #333; --track: #2a2a2c; }
  .curve { filter: invert(.9) hue-rotate(180deg); }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
       max-width: 1500px; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.ours td { font-weight: 600; } tr { border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
.bars { columns: 3 22rem; column-gap: 2.5rem; } .bar { break-inside: avoid; display: grid; align-items: center;
       grid-template-columns: 9.5rem 1fr 3.4rem; gap: .5rem; height: 1.45rem; }
.bar .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar .track { background: var(--track); height: .8rem; position: relative; }
.bar .fill { height: 100%; outline: 1px solid #8886; } .bar .value { text-align: right; font-size: .85rem; }
.bar .mark { position: absolute; top: -2px; bottom: -2px; border-left: 2px solid var(--ink); }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: .5rem;
         margin: .3rem 0; }
.legend { font-size: .85rem; margin: 0 0 1.6rem; } .legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; vertical-align: -.1rem;
            outline: 1px solid #8886; }
.strip img, .curve { width: 100%; height: auto; display: block; } .curve { max-width: 760px; }
figure { margin: 0; } figcaption, .note { color: var(--quiet); font-size: .85rem; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--track); padding: .8rem; font-size: .8rem; }
"""


def make_page(
  result: Result, gallery: Mapping[str, Sequence[tuple[str, float, Row]]], curve: np.ndarray | None, settings: str
) -> str:
  """The page, images included.

  Args:
    result: of an evaluation.
    gallery: 'best', 'median' and 'worst' to images: name, mIoU and row of tiles.
    curve: of thresholds, uint8 [H, W, 3]; None where none were swept.
    settings: everything that the metrics depend on, as text.
  """
  title = f'{html.escape(result.benchmark.name)}: mIoU {_percent(result.scores.miou)}'
  protocol, parameters = html.escape(result.protocol.title), html.escape(', '.join(_parameters(result.protocol)))
  provenance = html.escape(', '.join(f'{key} {value}' for key, value in result.provenance.items()))
  parts = [
    f'<h1>{title}</h1>',
    f'<p>{result.images} images, {result.benchmark.num_classes} classes; protocol <b>{protocol}</b>: {parameters}.</p>'
    f'<p class="note">{provenance}</p>',
    f'<h2>{"Beside the published results" if result.benchmark.published else "Scores"}</h2>',
    _headline(result),
    '<h2>IoU of each class</h2>',
    _bars(result),
    *_confusions(result),
  ]
  if curve is not None:
    parts += ['<h2>Background threshold</h2>', f'<img class="curve" alt="mIoU over the threshold" src="{_uri(curve)}">']
  for kind, images in gallery.items():
    if images:
      parts += [f'<h2>{_TITLES[kind]}</h2>', *(_strip(*image, result) for image in images)]
  parts += [_folded('Everything the results depend on', f'<pre>{html.escape(settings)}</pre>')]
  return _page(title, parts)


def make_table_page(
  title: str, header: Sequence[str], rows: Sequence[tuple[str, Sequence[str], Sequence[str]]], notes: Sequence[str]
) -> str:
  """A page of one table: rows of a kind ('ours' is bold), texts and numbers, and notes below."""
  texts = len(rows[0][1])
  table = [_table_row(header[:texts], header[texts:], tag='th')]
  table += [_table_row(found, numbers, kind=kind) for kind, found, numbers in rows]
  notes = [f'<p class="note">{html.escape(note)}</p>' for note in notes]
  return _page(
    title, [f'<h1>{html.escape(title)}</h1>', f'<div class="wide"><table>{"".join(table)}</table></div>', *notes]
  )


def _page(title: str, parts: Sequence[str]) -> str:
  """The page of a title and parts, which are HTML."""
  return (
    f'<!doctype html>\n{MARK}\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n' + '\n'.join(parts) + '\n</body></html>\n'
  )


def pick_images(miou: Sequence[float], each: int) -> dict[str, list[int]]:
  """'best', 'median' and 'worst' to the indices of so many images each, at most; none of them twice.

  Without an mIoU (nan) an image is left out. The best ones come first, and the worst first.
  """
  order = [int(i) for i in np.argsort(np.negative(miou), kind='stable') if not np.isnan(miou[i])]
  each = min(each, -(-len(order) // 3))
  # One without a wrong pixel shows a single class, mostly the background: there is nothing to see.
  best = sorted(order, key=lambda i: miou[i] == 1)[:each]
  worst = [i for i in reversed(order) if i not in best][:each]
  rest = [i for i in order if i not in best and i not in worst]
  start = max(len(rest) - each, 0) // 2
  return {'best': best, 'median': rest[start : start + each], 'worst': worst}


def threshold_curve(result: Result) -> np.ndarray:
  """mIoU over the thresholds of a result, with the one that was used and the best one, uint8 [H, W, 3]."""
  from matplotlib.figure import Figure  # half a second: only for those who use it

  miou = [100 * metrics.scores_from_counts(counts).miou for counts in result.threshold_counts]
  rows, used = list(zip(result.thresholds, miou)), (result.protocol.threshold, 100 * result.scores.miou)
  best = max(rows, key=lambda row: row[1])
  figure = Figure(figsize=(7, 4), dpi=120, layout='constrained')
  axes = figure.add_subplot()
  axes.plot(*zip(*sorted([*rows, used])), marker='.', color='#0077dd')
  axes.plot(*used, 'o', color='#111111', label=f'used: {used[0]:g}, mIoU {used[1]:.1f}')
  axes.plot(*best, '*', markersize=13, color='#dd5500', label=f'best of the sweep: {best[0]:g}, mIoU {best[1]:.1f}')
  title = f'{result.benchmark.name}, {result.images} images, protocol {result.protocol.name}'
  title += ', changed' * bool(result.protocol.changed)
  axes.set(xlabel='background threshold', ylabel='mIoU, percent', title=title)
  low, high = axes.get_ylim()
  margin = max(0, _SMALLEST_SPAN - (high - low)) / 2  # or a flat curve would show its last digits alone
  axes.set_ylim(low - margin, high + margin)
  axes.grid(alpha=0.3)
  axes.legend()
  data = io.BytesIO()
  figure.savefig(data, format='png')
  return np.asarray(Image.open(data).convert('RGB'))


def _parameters(protocol: Protocol) -> list[str]:
  """The parameters of a protocol as phrases."""
  kept = 'all classes' if protocol.class_filter is None else f'the {protocol.class_filter} best classes of a window'
  where = 'in each window' if protocol.threshold_mode == 'window' else 'everywhere'
  return [
    f'{protocol.short_side} px square'
    if protocol.resize == 'square'
    else f'short side {protocol.short_side} px, long side at most {protocol.max_long_side} px',
    'averaged where images shrink' if protocol.antialias else 'OpenCV’s bilinear resize',
    f'windows of {protocol.window} px, stride {protocol.stride}',
    f'{kept}, {"double" if protocol.double_softmax else "plain"} softmax',
    *(['the argmax of a final softmax'] if protocol.final_softmax else []),
    *([] if protocol.refine is None else [f'{protocol.refine.upper()}, {protocol.refine_iterations} iterations']),
    *([] if protocol.threshold is None else [f'background threshold {protocol.threshold:g} {where}']),
    f'templates “{protocol.templates}”, class names “{protocol.class_names}”',
  ]


def _table_row(texts: Iterable[str], numbers: Iterable[str], *, tag: str = 'td', kind: str = '') -> str:
  """A row of a table; the numbers are flush right."""
  cells = [f'<{tag}>{html.escape(text)}</{tag}>' for text in texts]
  cells += [f'<{tag} class="number">{number}</{tag}>' for number in numbers]
  opening = f'<tr class="{kind}">' if kind else '<tr>'
  return f'{opening}{"".join(cells)}</tr>'


def _headline(result: Result) -> str:
  """This result, its bounds, and the published ones."""
  percents = lambda scores: map(_percent, (scores.miou, scores.pixel_accuracy, scores.mean_accuracy))
  constant, scores = result.constant
  rows = [
    _table_row(['percent'], ['mIoU', 'pixel accuracy', 'mean accuracy'], tag='th'),
    _table_row([f'this checkpoint, protocol {result.protocol.title}'], percents(result.scores), kind='ours'),
  ]
  if result.oracle is not None:
    oracle = 'oracle: every segment with its majority label'
    rows.append(_table_row([oracle], percents(result.oracle)))
  rows.append(_table_row([f'everything called “{constant}”'], percents(scores)))
  for row in result.benchmark.published:
    unlike = result.unlike(row)
    text = f'published: {row.title}' + f' ({unlike})' * bool(unlike)
    rows.append(_table_row([text], [f'{row.scores[result.benchmark.name]:.1f}', '–', '–']))
  return f'<table>{"".join(rows)}</table>'


def _bars(result: Result) -> str:
  """A bar for each class, best first, with a mark where perfect naming would be."""
  iou = result.scores.iou
  oracle = np.full(len(iou), np.nan) if result.oracle is None else result.oracle.iou
  bars, absent = [], []
  for label in np.argsort(-np.nan_to_num(iou, nan=-1), kind='stable'):
    name, value = html.escape(result.benchmark.classes[label].strip()), iou[label]
    colour = draw.hex_colour(result.benchmark.palette[label])
    if np.isnan(value):
      absent.append(name)
      continue
    mark = '' if np.isnan(oracle[label]) else f'<div class="mark" style="left:{100 * oracle[label]:.1f}%"></div>'
    bars.append(
      f'<div class="bar"><div class="name" title="{name}">{name}</div><div class="track"><div class="fill" '
      f'style="width:{100 * value:.1f}%;background:{colour}"></div>{mark}</div>'
      f'<div class="value">{_percent(value)}</div></div>'
    )
  note = '<p class="note">The mark is what perfect naming of the same segments would give.</p>'
  more = [_folded(f'{len(absent)} neither in the truth nor predicted', ', '.join(absent))] if absent else []
  return ''.join([f'<div class="bars">{"".join(bars)}</div>', note * (result.oracle is not None), *more])


def _folded(summary: str, content: str) -> str:
  return f'<details><summary>{summary}</summary>{content}</details>'


def _confusions(result: Result) -> list[str]:
  """A section with the largest shares of a class that another name took; none where all is right."""
  counts = result.counts.astype(float)
  wrong = counts - np.diag(np.diag(counts))
  total = wrong.sum()
  if not total:
    return []
  rows = [_table_row(['is', 'called'], ['% of its pixels', '% of all wrong pixels'], tag='th')]
  for cell in np.argsort(-wrong, axis=None, kind='stable')[:_CONFUSIONS]:
    true, called = np.unravel_index(cell, wrong.shape)
    if wrong[true, called]:
      names = (result.benchmark.classes[label].strip() for label in (true, called))
      shares = (wrong[true, called] / counts[true].sum(), wrong[true, called] / total)
      rows.append(_table_row(names, map(_percent, shares)))
  return ['<h2>Worst confusions</h2>', f'<table>{"".join(rows)}</table>']


def _strip(name: str, miou: float, row: Row, result: Result) -> str:
  """An image, its truth, prediction and groups side by side."""
  row = draw.shrink(row, _LONG_SIDE)
  tiles = draw.draw_tiles(row, result.benchmark.palette, result.benchmark.classes)
  figures = ''.join(
    f'<figure><img alt="{title}" src="{_uri(tile)}"><figcaption>{title}</figcaption></figure>'
    for title, tile in tiles.items()
  )
  return (
    f'<p>{html.escape(name)}: mIoU {_percent(miou)}</p><div class="strip">{figures}</div>'
    f'<p class="legend">{_legend(row, result)}</p>'
  )


def _legend(row: Row, result: Result) -> str:
  """The colours of the classes in the truth or the prediction, largest first."""
  pixels = np.bincount(np.concatenate([row.truth.ravel(), row.prediction.ravel()]))[: result.benchmark.num_classes]
  shown = [i for i in np.argsort(-pixels, kind='stable') if pixels[i]]
  palette, names = result.benchmark.palette, result.benchmark.classes
  swatch = lambda i: f'<i style="background:{draw.hex_colour(palette[i])}"></i>'
  return ' '.join(f'<span>{swatch(i)}{html.escape(names[i].strip())}</span>' for i in shown)


def _uri(image: np.ndarray) -> str:
  """An image as part of the page."""
  data = io.BytesIO()
  Image.fromarray(image).save(data, 'WEBP', quality=85)
  return 'data:image/webp;base64,' + base64.b64encode(data.getvalue()).decode()


def _percent(value: float) -> str:
  return '–' if np.isnan(value) else f'{100 * value:.1f}'
