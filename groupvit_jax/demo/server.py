"""Serves the page for one run."""

import os
import pathlib
import tempfile

from etils import epath
import gradio as gr
from starlette.middleware import Middleware

from groupvit_jax.demo.examples import make_examples
from groupvit_jax.demo.gate import Gate
from groupvit_jax.demo.page import build_page, STYLE
from groupvit_jax.demo.viewer import Viewer
from groupvit_jax.errors import UserError
from groupvit_jax.eval.protocols import Protocol
from groupvit_jax.interop.licence import read_kept
from groupvit_jax.predictor import Predictor
from groupvit_jax.train import restored_run

_MAX_VISITORS = 32  # whose images are kept, about 20 MB each
_MAX_WAITING = 32
_ANY_PORT = 0


def serve(
  workdir: epath.PathLike, *, protocol: str, checkpoint: str, host: str, port: int, max_upload_mb: int, max_pixels: int
) -> None:
  """Opens a run and serves the page until it is interrupted; arguments are the command's flags.

  Raises:
    ValueError: there is no such run or protocol, or the address cannot be listened at.
  """
  run = restored_run.restore(workdir, checkpoint)
  predictor = Predictor.of_run(run, protocol=protocol)
  viewer = Viewer(
    predictor, num_stages=sum(stage.num_segments > 0 for stage in run.model.vision.stages), max_pixels=max_pixels
  )
  with tempfile.TemporaryDirectory(prefix='groupvit-demo-') as folder:
    examples, uploads = make_examples(run.config, pathlib.Path(folder)), pathlib.Path(folder).resolve() / 'visitors'
    uploads.mkdir()
    os.environ['GRADIO_TEMP_DIR'] = str(uploads)  # the folder of all files that Gradio keeps
    page = build_page(viewer, examples, _about(run, predictor.protocol))
    address = launch(page, uploads, host=host, port=port, max_upload_mb=max_upload_mb)
    print(f'the page is at {address}', flush=True)
    page.block_thread()


def _about(run: restored_run.RestoredRun, protocol: Protocol) -> str:
  """Markdown for visitors who ask what they look at."""
  licence = read_kept(run.workdir)
  return (
    'A [GroupViT](https://arxiv.org/abs/2202.11094) groups the patches of an image into segments, and names each '
    'by the class whose prompts are nearest. Groups do not depend on the class names.\n\n'
    f'- model: `{run.workdir.name}`, step {run.step:,}\n'
    f'- protocol: `{protocol.name}`, windows of {protocol.window} px\n'
    f'- licence of the weights: {licence if any(licence) else "set by whoever trained them"}\n'
  )


def launch(page: gr.Blocks, uploads: pathlib.Path, *, host: str, port: int, max_upload_mb: int) -> str:
  """Starts a server of the page on a thread; returns its address. Visitors' files come into `uploads`.

  Raises:
    UserError: the address cannot be listened at.
  """
  page.queue(max_size=_MAX_WAITING)
  _bypass_proxy(host)
  gate = Middleware(Gate, host=host, uploads=uploads, max_upload=max_upload_mb * 2**20, page=page)
  try:
    # Fonts of the system: the default theme fetches some from elsewhere.
    return page.launch(
      server_name=host,
      server_port=None if port == _ANY_PORT else port,
      share=False,
      quiet=True,
      prevent_thread_lock=True,
      max_file_size=f'{max_upload_mb}mb',
      state_session_capacity=_MAX_VISITORS,
      theme=gr.themes.Base(font=['system-ui', 'sans-serif'], font_mono=['monospace']),
      css=STYLE,
      footer_links=[],
      ssr_mode=False,
      show_error=True,
      app_kwargs=dict(middleware=[gate]),
    )[1]
  except OSError as error:
    raise UserError(f'cannot listen at {host}:{port}; choose another --port, or --port=0 for any') from error
  except ValueError as error:  # Gradio asks itself for the page first
    raise UserError(
      f'the page at {host}:{port} does not answer on this machine ({error}); look at HTTP_PROXY and '
      'NO_PROXY, or name another --host'
    ) from error


def _bypass_proxy(host: str) -> None:
  """Bypasses a proxy for requests to this host: Gradio asks itself for the page."""
  for name in ('NO_PROXY', 'no_proxy'):
    known = os.environ.get(name, '')
    os.environ[name] = ','.join(part for part in (known, 'localhost', '127.0.0.1', host) if part)
