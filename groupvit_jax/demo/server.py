"""Serves the page for one run."""

import pathlib
import tempfile

from etils import epath
import gradio as gr

from groupvit_jax import trained_run
from groupvit_jax.demo.examples import make_examples
from groupvit_jax.demo.page import build_page
from groupvit_jax.demo.viewer import Viewer
from groupvit_jax.predictor import Predictor

_MOST_VISITORS = 64  # whose pictures are remembered
_MOST_WAITING = 32
_ANY_PORT = 0


def serve(workdir: epath.PathLike, *, host: str, port: int, max_upload_mb: int, max_pixels: int) -> None:
  """Opens a run and serves the page until it is interrupted.

  Args:
    workdir: of the run.
    host: address to listen at.
    port: to listen at; 0 for one that is free.
    max_upload_mb: megabytes that an uploaded file may have.
    max_pixels: that a picture may have.

  Raises:
    ValueError: there is no such run, or the address cannot be listened at.
  """
  run = trained_run.open_run(workdir)
  viewer = Viewer(Predictor.from_run(run), max_pixels=max_pixels)
  title = f'`{run.workdir.name}` at step {run.step:,}. Drop or paste a picture, and type what to look for in it.'
  with tempfile.TemporaryDirectory(prefix='groupvit-demo-') as folder:
    folder = pathlib.Path(folder)
    page = build_page(viewer, make_examples(run.config, folder), title, folder)
    page.queue(max_size=_MOST_WAITING)
    try:
      # Fonts of the system: the default theme fetches some from elsewhere.
      _, address, _ = page.launch(
          server_name=host, server_port=None if port == _ANY_PORT else port, share=False, quiet=True,
          prevent_thread_lock=True, max_file_size=f'{max_upload_mb}mb', state_session_capacity=_MOST_VISITORS,
          theme=gr.themes.Base(font=['system-ui', 'sans-serif'], font_mono=['monospace']), footer_links=[],
          ssr_mode=False, show_error=True)
    except OSError as error:
      raise ValueError(f'cannot listen at {host}:{port}; choose another --port, or --port=0 for any') from error
    print(f'the page is at {address}', flush=True)
    page.block_thread()
