"""The page: its layout in Gradio, and its event handlers."""

from collections.abc import Sequence
import io
import json
from typing import Any

import gradio as gr
from gradio import processing_utils

from groupvit_jax.demo import viewer as viewer_lib
from groupvit_jax.demo.examples import Example
from groupvit_jax.demo.viewer import Upload, View, Viewer
from groupvit_jax.eval.draw import OPACITY

_HOUR = 3600

# Gradio would open the file first, and answer a bad one with the name of an exception. For the class: an example makes
# the component anew, and of a subclass Gradio writes a .pyi file beside this one.
gr.Image.preprocess = lambda self, payload: payload and Upload(payload.path, payload.orig_name)

# Gradio pastes by a button alone.
_PASTE = """() => document.addEventListener('paste', event => {
  const file = [...event.clipboardData.files].find(file => file.type.startsWith('image/'));
  const input = document.querySelector('#picture input[type=file]');
  if (!file || !input) return;
  event.preventDefault();
  const files = new DataTransfer();
  files.items.add(file);
  input.files = files.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
})"""


def build_page(viewer: Viewer, examples: Sequence[Example], title: str) -> gr.Blocks:
  """The page, which `launch` serves.

  Args:
    viewer: of the model.
    examples: shown at the bottom.
    title: a line about the model, in Markdown.
  """
  shown = dict(interactive=False, format='png', buttons=['download', 'fullscreen'])
  with gr.Blocks(title='GroupViT', analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as page:
    gr.Markdown(f'# GroupViT\n{title}')
    view = gr.State(None, time_to_live=_HOUR)
    with gr.Row():
      with gr.Column():
        picture = gr.Image(
          label='Picture', sources=['upload', 'clipboard'], elem_id='picture', height=280, buttons=['fullscreen']
        )
        words = gr.Textbox(
          label='Words',
          placeholder='dog|puppy, banana, grass',
          elem_id='words',
          info='With commas between them; names of one thing are separated by |.',
          max_length=5000,
        )
        button = gr.Button('Segment', variant='primary', elem_id='segment')
        threshold = gr.Slider(
          0,
          1,
          0,
          step=0.01,
          label='Threshold',
          elem_id='threshold',
          info='What fits every word worse is background. At 0 each pixel gets a word.',
        )
        opacity = gr.Slider(0, 1, OPACITY, step=0.05, label='Opacity', elem_id='opacity')
      with gr.Column():
        message = gr.Markdown(elem_id='message')
        overlay = gr.Image(label='Segments', elem_id='overlay', **shown)
        legend = gr.HTML(elem_id='legend-box')
    with gr.Row():
      first = gr.Image(label='First groups', elem_id='first-groups', visible=False, **shown)  # of two stages and more
      final = gr.Image(label='Final groups', elem_id='final-groups', **shown)
    with gr.Row():
      mask = gr.DownloadButton('Mask (PNG)', elem_id='mask', interactive=False)
      report = gr.DownloadButton('Areas and scores (JSON)', elem_id='report', interactive=False)
    gr.Examples([list(example) for example in examples], [picture, words], label='Examples')

    results = [message, view, overlay, legend, first, final, mask, report]

    def segment(upload: Upload | None, text: str, cut: float, tint: float, before: View | None) -> list[Any]:
      try:
        now = viewer.segment(upload, text, cut, before)
      except ValueError as error:
        kept = before and before._replace(prediction=None)
        return [_alert(error), kept, None, '', None, None, *[gr.update(value=None, interactive=False)] * 2]
      files = [gr.update(value=path, interactive=True) for path in _write_downloads(mask.GRADIO_CACHE, now)]
      shown = viewer_lib.for_screen(now.prediction)
      several = len(shown.groups) > 1
      first_groups = gr.update(value=shown.group_overlay(0) if several else None, visible=several)
      drawn = [shown.overlay(tint), viewer_lib.legend(now.prediction), first_groups, shown.group_overlay(-1)]
      return ['', now._replace(prediction=shown), *drawn, *files]

    def draw(tint: float, now: View | None) -> Any:
      return gr.skip() if now is None or now.prediction is None else now.prediction.overlay(tint)

    inputs = [picture, words, threshold, opacity, view]
    # One at a time: the devices are shared, and a slider that moves on outdates what it asked for.
    options = dict(concurrency_limit=1, concurrency_id='model', trigger_mode='always_last', api_visibility='private')
    for happens in (picture.change, words.submit, button.click, threshold.change):
      happens(segment, inputs, results, **options)
    opacity.change(draw, [opacity, view], overlay, trigger_mode='always_last', api_visibility='private')
    page.load(js=_PASTE)
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
