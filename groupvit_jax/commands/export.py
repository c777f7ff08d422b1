"""Exports a run's model as a Hugging Face folder, StableHLO, ONNX, a static page or safetensors.

  python -m groupvit_jax.commands.export --workdir=runs/quickstart --format=huggingface --output=exported

Formats: huggingface (a folder that `transformers` loads), stablehlo (both towers for jax alone, see
examples/run_exported.py), onnx (both towers for ONNX Runtime and OpenVINO), web (the same
with a static page that segments in the browser), safetensors (groupvit_jax's own names, and the config as JSON).
"""

from collections.abc import Callable, Mapping, Sequence
import os
import time
from typing import Any, get_args, Literal

from absl import flags
from etils import epath
import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

from groupvit_jax import cli
from groupvit_jax.commands import model_card, web_folder
from groupvit_jax.commands.huggingface_folder import describe_use, TAGS, write_folder, write_json
from groupvit_jax.data.scenes.scenes import ALL_STUFF, ALL_THINGS, Scenes
from groupvit_jax.errors import UserError
from groupvit_jax.interop import bundle, hub, native, onnx, stablehlo, state_dicts
from groupvit_jax.interop.licence import Licence, read_kept
from groupvit_jax.model import segmentation
from groupvit_jax.model.losses import clamped_scale
from groupvit_jax.storage import atomic_folder, check_free
from groupvit_jax.train import restored_run
from groupvit_jax.train.restored_run import RestoredRun

Form = Literal['huggingface', 'stablehlo', 'onnx', 'web', 'safetensors']
Dtype = Literal['float32', 'bfloat16', 'float16', 'int8']

_ONNX = ('onnx', 'web')
_WEIGHTS = ('.safetensors', '.stablehlo', '.onnx')
_TRIAL_IMAGES = 16
_LARGEST_WINDOW = 2048  # pixels
_TRIAL_TEXTS = ('a dog', 'grass')  # their ids are in bundle.json, to try the text tower with

_FLAT_USE = """\
```python
from groupvit_jax import Predictor

prediction = Predictor.from_pretrained('FOLDER')('image.jpg', ['dog', 'grass'])
prediction.save('out')
```

`model.safetensors` has groupvit_jax's own names; `config.json` says how to build the model.
"""

_BUNDLE_USE = """\
Both towers run with jax and flatbuffers alone, on CPU, CUDA and TPU:

```python
from jax import export
tower = export.deserialize(open('image.stablehlo', 'rb').read())
out = tower.call(pixels)  # uint8 [b, H, W, 3], H and W multiples of the patch size
```

`bundle.json` has the sizes and the special tokens. `groupvit_jax.Predictor.from_pretrained('FOLDER')` opens the folder.
"""

_ONNX_USE = """\
Both towers run with ONNX Runtime, OpenVINO and whatever else reads ONNX:

```python
import onnxruntime
tower = onnxruntime.InferenceSession('image.onnx')
image_embeds, segment_embeds, *assignments = tower.run(None, {{'images': pixels}})  # uint8 [b, {window}, {window}, 3]
```

`bundle.json` has the sizes and the special tokens.
`groupvit_jax.Predictor.from_pretrained('FOLDER', runtime='openvino')` opens the folder.
"""


def export(
  workdir: str,
  form: Form,
  output: str,
  *,
  dtype: Dtype = 'float32',
  window: int | None = None,
  webgpu: bool = False,
  scores: Sequence[str] | None = None,
  weights: restored_run.Weights = 'best',
  checkpoint: str = restored_run.NEWEST,
  licence: str = '',
  push_to_hub: str = '',
) -> str:
  """Exports a checkpoint of a run.

  Args:
    workdir: of the run.
    form: of the folder.
    output: folder to create; must not exist, or be empty.
    dtype: of the weights, and of the computation of stablehlo; of onnx as for `onnx.export_towers`.
    window: of onnx, side of the square images that its towers take; None for that of training.
    webgpu: whether the page of web may compute on a GPU, by another build of ONNX Runtime beside the first.
    scores: results.json files of `eval.py`, of this checkpoint, which go into the model card; None for the one in
      WORKDIR/eval, if it is of this checkpoint.
    weights: as for `restored_run.restore`.
    checkpoint: likewise.
    licence: of weights of one's own, as the Hub names it: 'apache-2.0'; '' for that of the weights that the run started
      from, if any.
    push_to_hub: USER/NAME of a model on the Hub to upload the folder to, which is created if it is not there.

  Returns:
    A line for each file of weights, one about the scores, and one about the upload.
  """
  for name, value, choices in (('format', form, get_args(Form)), ('dtype', dtype, get_args(Dtype))):
    if value not in choices:
      raise UserError(f'{name}={value!r}: use {", ".join(choices)}')
  if dtype not in (get_args(onnx.Dtype) if form in _ONNX else ('float32', 'bfloat16')):
    raise UserError(f'--format={form} has no dtype={dtype!r}; leave it out for float32')
  if window is not None and form not in _ONNX:
    raise UserError(f'window={window} is of --format=onnx and web; leave it out')
  if webgpu and form != 'web':
    raise UserError(f'--webgpu is of --format=web, not {form}; leave it out')
  check_free('--output', output)
  run = restored_run.restore(workdir, checkpoint, weights=weights)
  granted = _choose_licence(run, licence)
  reports, note = _choose_reports(run, scores)
  spec = state_dicts.ModelSpec(run.config.model, run.tokenizer.vocab_size, run.tokenizer.eos_id, run.model.multi_label)
  if push_to_hub:
    hub.create(push_to_hub)  # first of all: may we?
  number_format = np.dtype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype)
  window = window or min(spec.config.vision.image_size)
  if window % spec.config.vision.patch_size or window > _LARGEST_WINDOW:
    patch = spec.config.vision.patch_size
    raise UserError(f'window={window} is no multiple of the patch size, {patch}, or above {_LARGEST_WINDOW}')
  with restored_run.complete_config(run.workdir), atomic_folder('--output', output) as folder:
    notes = {}
    use, tags = _FLAT_USE, ''
    if form == 'huggingface':
      write_folder(folder, run, spec, number_format)
      use, tags = describe_use(run), TAGS
    elif form == 'stablehlo':
      notes = _write_stablehlo(folder, run, spec, number_format)
      use = _BUNDLE_USE
    elif form in _ONNX:
      notes = _write_onnx(folder, run, spec, dtype, window)
      if form == 'web':
        web_folder.add_page(folder, run, window, webgpu)
      use = _ONNX_USE.format(window=window)
    else:
      _write_flat(folder, run, spec, number_format)
    use = use.replace("'FOLDER'", repr(push_to_hub or 'FOLDER'))
    model_card.write(folder, run, licence=granted, use=use, tags=tags, reports=reports)
    sizes = _sizes(folder)
  files = (f'{epath.Path(output) / name}: {size / 1e6:.1f} MB{notes.get(name, "")}' for name, size in sizes.items())
  uploaded = [f'uploaded to {hub.upload(output, push_to_hub)}'] if push_to_hub else []
  return '\n'.join([*files, note, *uploaded])


def _choose_licence(run: RestoredRun, licence: str) -> Licence:
  """The licence of the weights that a run started from, or the one given for one's own."""
  kept = read_kept(run.workdir)
  if licence and any(kept):
    raise UserError(f'--licence={licence}: the run started from weights under another one ({kept}), which holds')
  return Licence(licence) if licence else kept


def _choose_reports(run: RestoredRun, paths: Sequence[str] | None) -> tuple[list[model_card.Report], str]:
  """Reports for the model card, and a line about them."""
  usual = run.workdir / 'eval' / 'results.json'
  if paths is None and not usual.exists():
    return [], f'the model card has no scores: there is no {usual}, and --scores names none'
  chosen = [usual] if paths is None else paths
  try:
    return model_card.read_reports(run, chosen), f'the model card has the scores in {", ".join(map(str, chosen))}'
  except ValueError as error:
    if paths is not None:
      raise
    return [], f'the model card has no scores: {error}'


def _sizes(folder: epath.Path) -> dict[str, int]:
  """Bytes of each file of weights."""
  return {path.name: path.stat().length for path in sorted(folder.iterdir()) if path.suffix in _WEIGHTS}


def _write_flat(folder: epath.Path, run: RestoredRun, spec: state_dicts.ModelSpec, dtype: np.dtype) -> None:
  state = state_dicts.cast(native.to_flat(run.variables), dtype)
  safetensors.numpy.save_file(state, str(folder / 'model.safetensors'))
  write_json(folder / 'config.json', native.spec_to_json(spec))
  run.tokenizer.save(folder)


def _write_stablehlo(
  folder: epath.Path, run: RestoredRun, spec: state_dicts.ModelSpec, dtype: np.dtype
) -> dict[str, str]:
  """Writes both towers, the tokenizer and bundle.json; returns the latency of each file as text."""
  towers = {
    'image.stablehlo': stablehlo.export_image_tower(spec, run.variables, dtype),
    'text.stablehlo': stablehlo.export_text_tower(spec, run.variables, dtype),
  }
  for name, exported in towers.items():
    (folder / name).write_bytes(exported.serialize())
  calls = {name: jax.jit(exported.call) for name, exported in towers.items()}
  metadata = dict(dtype=dtype.name, platforms=list(stablehlo.PLATFORMS))
  return _write_bundle(folder, run, spec, calls, spec.config.vision.image_size, metadata)


def _write_onnx(
  folder: epath.Path, run: RestoredRun, spec: state_dicts.ModelSpec, dtype: onnx.Dtype, window: int
) -> dict[str, str]:
  """Writes both towers, the tokenizer and bundle.json; returns the latency of each file and its agreement as text."""
  calls = {}
  for side, data in onnx.export_towers(spec, run.variables, window, dtype).items():
    (folder / f'{side}.onnx').write_bytes(data)
    calls[f'{side}.onnx'] = onnx.load(data, 'onnxruntime')
  agreement = _agreement(run, calls['image.onnx'], window)
  notes = _write_bundle(folder, run, spec, calls, (window, window), dict(dtype=dtype, window=window, **agreement))
  notes['image.onnx'] += f', {agreement["same_segment"]:.2%} of patches in the same segment as with JAX'
  return notes


def _agreement(run: RestoredRun, tower: Callable, window: int) -> dict[str, float]:
  """On some scenes: the share of patches in the same final segment as with JAX, and the least cosine of a segment."""
  scenes = Scenes(window, ALL_THINGS, ALL_STUFF, seed=0, length=_TRIAL_IMAGES, split='test')
  images = np.stack([scenes[index]['image'] for index in range(_TRIAL_IMAGES)])
  ours = run.model.apply(run.variables, images, method='encode_pixels')
  _, segments, *assignments = tower(images)
  patches = [segmentation.token_affinity(each).argmax(axis=-1) for each in (ours.assignments, assignments)]
  cosines = np.sum(segmentation.normalize(ours.segment_embeds) * segmentation.normalize(segments), axis=-1)
  return dict(same_segment=float(np.mean(patches[0] == patches[1])), least_cosine=float(cosines.min()))


def _write_bundle(
  folder: epath.Path,
  run: RestoredRun,
  spec: state_dicts.ModelSpec,
  calls: Mapping[str, Callable],
  image_size: tuple[int, int],
  metadata: Mapping[str, Any],
) -> dict[str, str]:
  """Writes the tokenizer and bundle.json beside two towers; returns the latency of each file as text."""
  run.tokenizer.save(folder / 'tokenizer')
  length = spec.config.text.context_length
  image, text = calls
  inputs = {image: np.zeros((1, *image_size, 3), np.uint8), text: np.zeros((1, length), np.int32)}
  seconds = {name: _latency(call, inputs[name]) for name, call in calls.items()}
  files = {
    name: dict(bytes=size, input=list(inputs[name].shape), milliseconds=round(1000 * seconds[name], 2))
    for name, size in _sizes(folder).items()
  }
  write_json(
    folder / bundle.FILE,
    dict(
      image_size=list(spec.config.vision.image_size),
      patch_size=spec.config.vision.patch_size,
      context_length=length,
      bos_id=run.tokenizer.bos_id,
      eos_id=run.tokenizer.eos_id,
      pad_id=run.tokenizer.pad_id,
      vocab_size=spec.vocab_size,
      logit_scale=float(clamped_scale(run.variables['params']['logit_scale'])),
      files=files,
      measured_on=dict(device=jax.devices()[0].device_kind, cores=os.cpu_count(), jax=jax.__version__),
      trial_texts=dict(zip(_TRIAL_TEXTS, run.tokenizer.encode(_TRIAL_TEXTS, length).tolist())),
      **metadata,
      **run.provenance,
    ),
  )
  return {name: f', {1000 * each:.1f} ms for one on this machine' for name, each in seconds.items()}


def _latency(call: Callable, x: np.ndarray, repeats: int = 5) -> float:
  """Median seconds of a call, compiled before."""
  jax.block_until_ready(call(x))
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(call(x))
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds))


if __name__ == '__main__':
  WORKDIR = flags.DEFINE_string('workdir', None, 'The run.')
  FORMAT = flags.DEFINE_enum('format', None, get_args(Form), 'What to write.')
  OUTPUT = flags.DEFINE_string('output', None, 'Folder to create.')
  DTYPE = flags.DEFINE_enum(
    'dtype',
    'float32',
    get_args(Dtype),
    'Of the weights; of stablehlo also of the computation. float16 and int8 are of onnx, bfloat16 of the others.',
  )
  WINDOW = flags.DEFINE_integer('window', None, "Of onnx: side of the images that it takes, by default training's.", 1)
  WEBGPU = flags.DEFINE_bool('webgpu', False, 'Of web: also compute on a GPU, where the browser has WebGPU.')
  SCORES = flags.DEFINE_list(
    'scores', None, 'results.json files of eval.py for the model card; by default WORKDIR/eval/results.json.'
  )
  WEIGHTS = flags.DEFINE_enum(
    'weights', 'best', ['best', 'ema', 'trained'], 'best: the moving average, where the run keeps one.'
  )
  CHECKPOINT = flags.DEFINE_enum(
    'checkpoint', 'newest', ['newest', 'best'], 'best: the one that scored best in training.'
  )
  LICENCE = flags.DEFINE_string('licence', '', 'Of weights of your own, for the model card, as in apache-2.0.')
  PUSH = flags.DEFINE_string('push_to_hub', '', 'USER/NAME of a model on the Hugging Face Hub to upload the folder to.')
  flags.mark_flags_as_required(['workdir', 'format', 'output'])
  cli.run(
    lambda: print(
      export(
        WORKDIR.value,
        FORMAT.value,
        OUTPUT.value,
        dtype=DTYPE.value,
        window=WINDOW.value,
        webgpu=WEBGPU.value,
        scores=SCORES.value,
        weights=WEIGHTS.value,
        checkpoint=CHECKPOINT.value,
        licence=LICENCE.value,
        push_to_hub=PUSH.value,
      )
    )
  )
