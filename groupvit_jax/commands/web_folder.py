"""A static page that segments images in the browser, from an ONNX export."""

from collections.abc import Iterable, Mapping
import gzip
import importlib.resources
import pathlib
import subprocess
import tarfile
import tempfile
from typing import Any

from etils import epath
from PIL import Image

from groupvit_jax.commands.huggingface_folder import write_json
from groupvit_jax.data import prompts
from groupvit_jax.data.sources import build_scenes
from groupvit_jax.data.tokenizer import ClipTokenizer, Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval import draw, protocols
from groupvit_jax.interop import licence
from groupvit_jax.train.restored_run import RestoredRun

_RUNTIME = 'onnxruntime-web@1.30.0'
# Of a build: the module, what it loads, and its WebAssembly. The second one is for WebGPU.
_BUILDS = {
  'wasm': ('ort.wasm.min.mjs', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm'),
  'webgpu': ('ort.jspi.min.mjs', 'ort-wasm-simd-threaded.jspi.mjs', 'ort-wasm-simd-threaded.jspi.wasm'),
}
_NUM_EXAMPLES = 4
_CLASS_NAMES = ('person', 'dog', 'cat', 'car', 'building', 'tree', 'grass', 'sky', 'water')  # to begin with
# Of the native protocol segmenter.js has these alone.
_PROTOCOL = dict(class_filter=5, double_softmax=True, threshold_mode='window', refine=None)


def add_page(folder: epath.Path, run: RestoredRun, window: int, webgpu: bool) -> None:
  """Adds the page to the folder of an export with image.onnx, which takes images of side `window`, and text.onnx.

  `webgpu` adds a build of ONNX Runtime for it. Of a run that was trained on scenes some held-out ones are examples.
  """
  protocol = protocols.native_protocol((window, window))
  assert all(getattr(protocol, name) == value for name, value in _PROTOCOL.items())
  for path in importlib.resources.files('groupvit_jax').joinpath('web').iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  runtimes = _fetch_runtimes(folder, ('wasm', 'webgpu') if webgpu else ('wasm',))
  class_names, examples = _write_examples(folder, run)
  weights = licence.read_kept(run.workdir)
  page = dict(
    tokenizer=tokenizer_to_json(run.tokenizer),
    templates=prompts.template_set(protocol.templates),
    class_names=class_names,
    palette=dict(zip(class_names, draw.class_palette(class_names))),
    num_stages=sum(stage.num_segments > 0 for stage in run.model.vision.stages),
    examples=examples,
    model_mb=_size_mb(folder, ['image.onnx', 'text.onnx']),
    runtimes=runtimes,
    about=f'{run.workdir.name}, step {run.step:,}; windows of {window} px. Licence of the weights: '
    f'{weights if any(weights) else "set by whoever trained them"}.',
  )
  write_json(folder / 'page.json', page)


def tokenizer_to_json(tokenizer: Tokenizer) -> Mapping[str, Any]:
  """What tokenizer.js needs to know of a tokenizer."""
  special = dict(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id)
  if isinstance(tokenizer, ClipTokenizer):
    vocab, merges = tokenizer.bpe()
    return dict(type='clip', vocab=vocab, merges=[' '.join(pair) for pair in merges], **special)
  model = tokenizer.model
  ids = range(model.get_piece_size())
  is_text = lambda id: not (model.is_control(id) or model.is_unknown(id) or model.is_byte(id) or model.is_unused(id))
  return dict(
    type='sentencepiece',
    pieces=[model.id_to_piece(id) for id in ids],
    scores=[model.get_score(id) for id in ids],
    normal=[is_text(id) for id in ids],
    **special,
  )


def _write_examples(folder: epath.Path, run: RestoredRun) -> tuple[tuple[str, ...], list[str]]:
  """Class names to begin with, and the files of the examples."""
  if 'source' not in run.config.data or run.config.data.source != 'scenes':
    return _CLASS_NAMES, []
  scenes = build_scenes(run.config.data.scenes, tuple(run.config.model.vision.image_size), 'test')
  files = [f'scene{index}.png' for index in range(min(_NUM_EXAMPLES, len(scenes)))]
  for index, file in enumerate(files):
    Image.fromarray(scenes[index]['image']).save(folder / file)
  return tuple(scenes.classes), files


def _fetch_runtimes(folder: epath.Path, builds: Iterable[str]) -> dict[str, Mapping[str, Any]]:
  """Copies builds of ONNX Runtime for browsers, of a fixed version, into a folder; their WebAssembly compressed."""
  with tempfile.TemporaryDirectory() as scratch:
    try:
      command = ['npm', 'pack', _RUNTIME, f'--pack-destination={scratch}', '--silent']
      done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
      raise UserError(f'npm is not installed, which fetches {_RUNTIME} for the page: install Node.js') from error
    if done.returncode:
      raise UserError(f'npm cannot fetch {_RUNTIME}: {" ".join(done.stderr.split())[:300]}')
    (package,) = pathlib.Path(scratch).glob('*.tgz')
    found = {}
    with tarfile.open(package) as tar:
      for build in builds:
        module, loader, binary = _BUILDS[build]
        read = lambda name: tar.extractfile(f'package/dist/{name}').read()
        files = {module: read(module), loader: read(loader)}
        files[f'{binary}.gz'] = gzip.compress(read(binary), mtime=0)  # segmenter.js unpacks it
        for name, data in files.items():
          (folder / name).write_bytes(data)
        found[build] = dict(module=module, binary=f'{binary}.gz', mb=_size_mb(folder, files))
  return found


def _size_mb(folder: epath.Path, names: Iterable[str]) -> float:
  return round(sum((folder / name).stat().length for name in names) / 1e6, 1)
