"""The page: its layout in Gradio, and its event handlers."""

from collections.abc import Iterator, Sequence
import io
import json
import pathlib
from typing import Any

import gradio as gr
from gradio import processing_utils

from groupvit_jax.demo import viewer as viewer_lib
from groupvit_jax.demo.examples import Example
from groupvit_jax.demo.viewer import Upload, View, Viewer
from groupvit_jax.eval.draw import draw_groups, OPACITY

_HOUR = 3600
_HEIGHT, _WIDTH = 320, 210  # pixels: the three images lie beside each other, equally large, but on a phone
_SCRIPT = pathlib.Path(__file__).with_name('page.js')
# A small image is as large as its segments; the legend is a quiet table.
STYLE = """
#picture img { width: 100%; height: 100%; object-fit: contain; }
#legend table { width: 100%; border-collapse: collapse; font-size: 0.9em; }
#legend table, #legend tr { border: 0; }
#legend th, #legend td { border: 0; border-bottom: 1px solid #8884; padding: 3px 6px; text-align: right; }
#legend th:first-child, #legend td:first-child { text-align: left; white-space: nowrap; }
#legend p { font-size: 0.85em; opacity: 0.7; }
"""
_HINT = 'These are the groups. Type what to look for, with commas between the names: dog, banana, grass.'
_COMPILING = 'Compiling the model for images of this size: half a minute or so, once.'

# Gradio would open the file first, and answer a bad one with the name of an exception. For the class: an example makes
# the component anew, and of a subclass Gradio writes a .pyi file beside this one.
gr.Image.preprocess = lambda self, payload: payload and Upload(payload.path, payload.orig_name)


def build_page(viewer: Viewer, examples: Sequence[Example], about: str) -> gr.Blocks:
  """The page, which `launch` serves."""
  shown = dict(interactive=False, format='png', buttons=['download', 'fullscreen'], height=_HEIGHT)
  picture = gr.Image(
    label='Image: drop, paste or click',
    sources=['upload'],
    elem_id='picture',
    height=_HEIGHT,
    buttons=['fullscreen'],
    render=False,
  )
  words = gr.Textbox(
    label='Class names',
    placeholder='dog|puppy, banana, grass',
    elem_id='words',
    info='Separated by commas; dog|puppy is one class of two names.',
    max_length=5000,
    render=False,
  )
  with gr.Blocks(title='GroupViT', analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as page:
    gr.Markdown('# GroupViT\nFinds the things that you name in an image. It has learnt them from captions alone.')
    view = gr.State(None, time_to_live=_HOUR)
    gallery = gr.Dataset(
      components=[picture],
      samples=[[example.path] for example in examples],
      type='index',
      label='Examples',
      elem_id='examples',
      visible=bool(examples),
    )
    with gr.Row():
      with gr.Column(min_width=_WIDTH):
        picture.render()
        words.render()
        button = gr.Button('Segment', variant='primary', elem_id='segment')
      with gr.Column(min_width=_WIDTH):
        overlay = gr.Image(label='Segments', elem_id='overlay', **shown)
        message = gr.Markdown(elem_id='message')
        legend = gr.HTML(elem_id='legend-box')
      with gr.Column(min_width=_WIDTH):
        groups = gr.Image(label='Groups', elem_id='groups', **shown)
        stage = gr.Slider(
          1,
          max(viewer.num_stages, 2),  # Gradio wants a range
          viewer.num_stages,
          step=1,
          label='Stage',
          elem_id='stage',
          visible=viewer.num_stages > 1,
        )
        threshold = gr.Slider(
          0,
          1,
          0,
          step=0.01,
          label='Threshold',
          elem_id='threshold',
          info='Pixels that score less for every class are background.',
        )
        opacity = gr.Slider(0, 1, OPACITY, step=0.05, label='Opacity', elem_id='opacity')
        with gr.Row():
          mask = gr.DownloadButton('Mask', elem_id='mask', size='sm', min_width=80, interactive=False)
          report = gr.DownloadButton('JSON', elem_id='report', size='sm', min_width=80, interactive=False)
    with gr.Accordion('About this model', open=False):
      gr.Markdown(about)

    results = [message, view, overlay, legend, groups, mask, report]
    no_file = gr.update(value=None, interactive=False)

    def segment(
      upload: Upload | None, text: str, cut: float, tint: float, number: int, before: View | None
    ) -> Iterator[list[Any]]:
      if upload is not None and not viewer.compiled:
        yield [_COMPILING, *[gr.skip()] * 6]
      try:
        now = viewer.segment(upload, text, cut, before)
      except ValueError as error:
        kept = before and before._replace(prediction=None)
        yield [_alert(error), kept, None, '', None, no_file, no_file]
        return
      if now is None:
        yield ['', None, None, '', None, no_file, no_file]
      elif now.prediction is None:
        yield [_HINT, now, None, '', draw_stage(number, now), no_file, no_file]
      else:
        files = [gr.update(value=path, interactive=True) for path in _write_downloads(mask.GRADIO_CACHE, now)]
        shown = viewer_lib.for_screen(now.prediction)
        key = viewer_lib.legend(shown, now.prediction)
        yield ['', now._replace(prediction=shown), shown.overlay(tint), key, draw_stage(number, now), *files]

    def draw(tint: float, now: View | None) -> Any:
      return gr.skip() if now is None or now.prediction is None else now.prediction.overlay(tint)

    def draw_stage(number: int, now: View | None) -> Any:
      maps = now and now.encoded.group_maps()
      return draw_groups(now.encoded.image, maps[min(int(number), len(maps)) - 1]) if maps else gr.skip()

    def choose(number: int) -> list[Any]:
      return [examples[number].path, examples[number].words]

    inputs = [picture, words, threshold, opacity, stage, view]
    # One at a time: the devices are shared, and a slider that moves on outdates what it asked for.
    options = dict(concurrency_limit=1, concurrency_id='model', trigger_mode='always_last', api_visibility='private')
    for happens in (picture.change, words.submit, button.click, threshold.change):
      happens(segment, inputs, results, **options)
    gallery.click(choose, gallery, [picture, words], api_visibility='private')
    for control, redraw, image in ((opacity, draw, overlay), (stage, draw_stage, groups)):
      control.change(redraw, [control, view], image, trigger_mode='always_last', api_visibility='private')
    page.load(js=_SCRIPT.read_text(encoding='utf-8'))
  return page


def _alert(error: ValueError) -> str:
  """An error as a line of the page; Markdown in it stays as typed."""
  text = ''.join(f'\\{c}' if c in '\\`*_{}[]<>()#+-.!|~$' else c for c in ' '.join(str(error).split()))
  return f'⚠️ {text}'


def _write_downloads(cache: str, now: View) -> list[str]:
  """The label map and the JSON of a result, in Gradio's folder of files to serve, under a hash of their contents."""
  image, report = io.BytesIO(), now.prediction.to_json() | {'picture': now.upload.name}
  now.prediction.mask().save(image, 'PNG')
  files = {'mask.png': image.getvalue(), 'segments.json': json.dumps(report, indent=2).encode() + b'\n'}
  return [processing_utils.save_bytes_to_cache(data, name, cache) for name, data in files.items()]
