"""A result as one page that needs nothing else: headline, classes, confusions, threshold curve, pictures."""

import base64
from collections.abc import Mapping, Sequence
import html
import io

import numpy as np
from PIL import Image

from groupvit_jax.eval import draw
from groupvit_jax.eval.benchmarks import IGNORE_LABEL
from groupvit_jax.eval.draw import Row
from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.eval.result import Result

MARK = '<!-- made by groupvit_jax/eval.py -->'  # how a page of ours is known
_LONG_SIDE = 384  # pixels of a picture in the gallery, at most: about what a page shows, so that names stay legible
_CONFUSIONS = 12
_TITLES = {'best': 'Best pictures', 'median': 'Median pictures', 'worst': 'Worst pictures'}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 2rem auto; max-width: 1500px;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.ours td { font-weight: 600; } tr { border-bottom: 1px solid #e4e4e4; }
.bars { columns: 3 22rem; column-gap: 2.5rem; } .bar { break-inside: avoid; display: grid; align-items: center;
       grid-template-columns: 9.5rem 1fr 3.4rem; gap: .5rem; height: 1.45rem; }
.bar .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.bar .track { background: #efefef; height: .8rem; position: relative; }
.bar .fill { height: 100%; outline: 1px solid #0003; } .bar .value { text-align: right; font-size: .85rem; }
.bar .mark { position: absolute; top: -2px; bottom: -2px; border-left: 2px solid #111; }
.strip { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: .5rem;
         margin: .3rem 0; }
.legend { font-size: .85rem; margin: 0 0 1.6rem; } .legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; vertical-align: -.1rem;
            outline: 1px solid #0003; }
.strip img, .curve { width: 100%; height: auto; display: block; } .curve { max-width: 760px; }
figure { margin: 0; } figcaption, .note { color: #555; font-size: .85rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .8rem; font-size: .8rem; }
"""


def make_page(
  result: Result, gallery: Mapping[str, Sequence[tuple[str, float, Row]]], curve: np.ndarray | None, settings: str
) -> str:
  """The page.

  Args:
    result: what was found.
    gallery: 'best', 'median' and 'worst' to pictures: name, mIoU and what there is to see.
    curve: of thresholds, uint8 [H, W, 3]; None where none were swept.
    settings: everything the figures depend on, as text.

  Returns:
    HTML with pictures inside.
  """
  name = html.escape(result.benchmark.name)
  protocol = result.protocol
  parts = [
    f'<h1>{name}: mIoU {_percent(result.scores.miou)}</h1>',
    f'<p>{result.pictures} pictures, {result.benchmark.num_classes} classes; protocol '
    f'<b>{html.escape(protocol.title)}</b>: '
    + html.escape(', '.join(_parameters(protocol)))
    + '. '
    + ', '.join(f'{html.escape(key)} {html.escape(value)}' for key, value in result.provenance.items())
    + '.</p>',
    '<h2>Beside the published figures</h2>',
    _headline(result),
    '<h2>IoU of each class</h2>',
    _bars(result),
    '<h2>Worst confusions</h2>',
    _confusions(result),
  ]
  if curve is not None:
    parts += ['<h2>Background threshold</h2>', f'<img class="curve" alt="mIoU over the threshold" src="{_uri(curve)}">']
  for kind, pictures in gallery.items():
    if pictures:
      parts += [f'<h2>{_TITLES[kind]}</h2>', *(_strip(*picture, result) for picture in pictures)]
  parts += ['<h2>Everything the figures depend on</h2>', f'<pre>{html.escape(settings)}</pre>']
  return (
    f'<!doctype html>\n{MARK}\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{name}: mIoU {_percent(result.scores.miou)}</title><style>{_STYLE}</style></head>\n<body>\n'
    + '\n'.join(parts)
    + '\n</body></html>\n'
  )


def _parameters(protocol: Protocol) -> list[str]:
  """Everything that a protocol says, in words."""
  kept = 'all classes' if protocol.class_filter is None else f'the {protocol.class_filter} best classes of a window'
  where = 'in each window' if protocol.threshold_mode == 'window' else 'everywhere'
  return [
    f'short side {protocol.short_side} px, long side at most {protocol.max_long_side} px',
    'averaged where pictures shrink' if protocol.antialias else 'OpenCV’s bilinear resize',
    f'windows of {protocol.window} px, stride {protocol.stride}',
    f'{kept}, {"double" if protocol.double_softmax else "plain"} softmax',
    *([] if protocol.threshold is None else [f'background threshold {protocol.threshold:g} {where}']),
    f'templates “{protocol.templates}”, class names “{protocol.class_names}”',
  ]


def _headline(result: Result) -> str:
  """This result, its bounds, and the papers' figures."""
  row = lambda text, scores, kind='': (
    f'<tr class="{kind}"><td>{html.escape(text)}</td>'
    + ''.join(
      f'<td class="number">{_percent(value)}</td>'
      for value in (scores.miou, scores.pixel_accuracy, scores.mean_accuracy)
    )
    + '</tr>'
  )
  constant, scores = result.constant
  rows = [row(f'this checkpoint, protocol {result.protocol.title}', result.scores, 'ours')]
  if result.oracle is not None:
    rows.append(row('every segment with its majority label (what naming loses)', result.oracle))
  rows.append(row(f'everything called “{constant}”', scores))
  for published in result.benchmark.published:
    unlike = result.unlike(published)
    rows.append(
      f'<tr><td>published: protocol {html.escape(published.protocol)}, GroupViT-S/16 of '
      f'{html.escape(published.training_data)}{html.escape(f" ({unlike})" * bool(unlike))}</td>'
      f'<td class="number">{published.miou:.1f}</td>'
      '<td class="number">–</td><td class="number">–</td></tr>'
    )
  head = (
    '<tr><th>percent</th><th class="number">mIoU</th><th class="number">pixel accuracy</th>'
    '<th class="number">mean accuracy</th></tr>'
  )
  note = '' if result.benchmark.published else '<p class="note">There are no published figures for these classes.</p>'
  return f'<table>{head}{"".join(rows)}</table>{note}'


def _bars(result: Result) -> str:
  """A bar for each class, best first, with a mark where perfect naming would be."""
  iou = result.scores.iou
  oracle = np.full(len(iou), np.nan) if result.oracle is None else result.oracle.iou
  bars, absent = [], []
  for label in np.argsort(-np.nan_to_num(iou, nan=-1), kind='stable'):
    if np.isnan(iou[label]):
      absent.append(html.escape(result.benchmark.classes[label].strip()))
      continue
    name, value = html.escape(result.benchmark.classes[label].strip()), iou[label]
    colour = '#{:02x}{:02x}{:02x}'.format(*result.benchmark.palette[label])
    mark = '' if np.isnan(oracle[label]) else f'<div class="mark" style="left:{100 * oracle[label]:.1f}%"></div>'
    bars.append(
      f'<div class="bar"><div class="name" title="{name}">{name}</div><div class="track">'
      f'<div class="fill" style="width:{100 * value:.1f}%;background:{colour}"></div>{mark}</div>'
      f'<div class="value">{_percent(value)}</div></div>'
    )
  return (
    f'<div class="bars">{"".join(bars)}</div><p class="note">The mark is what perfect naming of the same '
    f'segments would give.{" Neither in the truth nor predicted: " * bool(absent)}{", ".join(absent)}</p>'
  )


def _confusions(result: Result) -> str:
  """The largest shares of a class that another name took."""
  counts = result.counts.astype(float)
  wrong = counts - np.diag(np.diag(counts))
  total = wrong.sum()
  if not total:
    return '<p>There are none.</p>'
  rows = []
  for cell in np.argsort(-wrong, axis=None, kind='stable')[:_CONFUSIONS]:
    true, called = np.unravel_index(cell, wrong.shape)
    if wrong[true, called]:
      names = (html.escape(result.benchmark.classes[label].strip()) for label in (true, called))
      shares = (wrong[true, called] / counts[true].sum(), wrong[true, called] / total)
      rows.append(
        '<tr>'
        + ''.join(f'<td>{name}</td>' for name in names)
        + ''.join(f'<td class="number">{_percent(share)}</td>' for share in shares)
        + '</tr>'
      )
  return (
    '<table><tr><th>is</th><th>called</th><th class="number">% of its pixels</th>'
    f'<th class="number">% of all wrong pixels</th></tr>{"".join(rows)}</table>'
  )


def _strip(name: str, miou: float, row: Row, result: Result) -> str:
  """A picture as it came, as it is labelled, and its groups."""
  row = draw.shrink(row, _LONG_SIDE)
  palette, names = result.benchmark.palette, result.benchmark.classes
  overlay = lambda labels: draw.draw_overlay(row.image, labels, palette, names)
  tiles = [
    ('input', row.image),
    ('truth', overlay(row.truth)),
    ('prediction', overlay(row.prediction)),
    ('final groups', draw.draw_groups(row.image, row.groups[-1])),
  ]
  if len(row.groups) > 1:
    tiles.append(('first groups', draw.draw_groups(row.image, row.groups[0])))
  figures = ''.join(
    f'<figure><img alt="{title}" src="{_uri(tile)}"><figcaption>{title}</figcaption></figure>' for title, tile in tiles
  )
  return (
    f'<p>{html.escape(name)}: mIoU {_percent(miou)}</p><div class="strip">{figures}</div>'
    f'<p class="legend">{_legend(row, result)}</p>'
  )


def _legend(row: Row, result: Result) -> str:
  """The colours of the classes in the truth or the prediction, largest first."""
  pixels = np.bincount(np.concatenate([row.truth.ravel(), row.prediction.ravel()]), minlength=IGNORE_LABEL + 1)
  swatch = lambda colour, name: (
    '<span><i style="background:#{:02x}{:02x}{:02x}"></i>'.format(*colour) + html.escape(name.strip()) + '</span>'
  )
  return ' '.join(
    swatch(result.benchmark.palette[label], result.benchmark.classes[label])
    for label in np.argsort(-pixels, kind='stable')
    if pixels[label] and label != IGNORE_LABEL
  )


def _uri(picture: np.ndarray) -> str:
  """A picture as part of the page."""
  data = io.BytesIO()
  Image.fromarray(picture).save(data, 'WEBP', quality=85)
  return 'data:image/webp;base64,' + base64.b64encode(data.getvalue()).decode()


def _percent(value: float) -> str:
  return '–' if np.isnan(value) else f'{100 * value:.1f}'
