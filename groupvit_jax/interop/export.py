"""Takes a run's model elsewhere.

  python -m groupvit_jax.interop.export --workdir=runs/quickstart --format=huggingface --output=exported

Formats: huggingface (a folder `transformers` loads), stablehlo (both towers for jax alone, see
examples/run_exported.py), safetensors (our names, and a JSON of the config).
"""

import json

from absl import flags
from etils import epath
import ml_dtypes
import numpy as np
import safetensors.numpy

from groupvit_jax import cli, trained_run
from groupvit_jax.interop import flat, huggingface_folder, stablehlo, state_dicts
from groupvit_jax.interop.new_folder import check_free, new_folder
from groupvit_jax.losses import clamped_scale
from groupvit_jax.trained_run import TrainedRun

_WEIGHTS = ('.safetensors', '.stablehlo')


def export(workdir: str, form: str, output: str, *, dtype: str = 'float32', scores: str | None = None,
           weights: trained_run.Weights = 'best') -> str:
  """Exports the newest whole checkpoint of a run.

  Args:
    workdir: of the run.
    form: 'huggingface', 'stablehlo' or 'safetensors'.
    output: folder to make; must not exist, or be empty.
    dtype: 'float32' or 'bfloat16'.
    scores: a results.json of `eval.py`, which goes into the model card.
    weights: as for `trained_run.open_run`.

  Returns:
    What was written, a line for each file of weights.

  Raises:
    ValueError: there is no such run, `output` is taken, or the format cannot represent the model.
  """
  check_free('--output', output)
  report = None if scores is None else _read_report(epath.Path(scores))
  run = trained_run.open_run(workdir, weights=weights)
  spec = state_dicts.ModelSpec(run.config.model, run.tokenizer.vocab_size, run.tokenizer.eos_id, run.model.multi_label)
  number_format = np.dtype(ml_dtypes.bfloat16 if dtype == 'bfloat16' else dtype)
  with new_folder('--output', output) as folder:
    notes = {}
    if form == 'huggingface':
      huggingface_folder.write_folder(folder, run, spec, number_format, report)
    elif form == 'stablehlo':
      notes = _write_stablehlo(folder, run, spec, number_format)
    else:
      _write_flat(folder, run, spec, number_format)
    sizes = {path.name: path.stat().length for path in sorted(folder.iterdir()) if path.suffix in _WEIGHTS}
  return '\n'.join(f'{epath.Path(output) / name}: {size / 1e6:.1f} MB{notes.get(name, "")}'
                   for name, size in sizes.items())


def _write_flat(folder: epath.Path, run: TrainedRun, spec: state_dicts.ModelSpec, dtype: np.dtype) -> None:
  state = state_dicts.cast(flat.to_flat(run.variables), dtype)
  safetensors.numpy.save_file(state, str(folder / 'model.safetensors'))
  _write_json(folder / 'config.json', flat.spec_to_json(spec))
  run.tokenizer.save(folder)


def _write_stablehlo(folder: epath.Path, run: TrainedRun, spec: state_dicts.ModelSpec,
                     dtype: np.dtype) -> dict[str, str]:
  """Writes both towers, the tokenizer and what a caller needs to know; returns the latency of each file, in words."""
  towers = {'image.stablehlo': stablehlo.export_image_tower(spec, run.variables, dtype),
            'text.stablehlo': stablehlo.export_text_tower(spec, run.variables, dtype)}
  for name, exported in towers.items():
    (folder / name).write_bytes(exported.serialize())
  run.tokenizer.save(folder / 'tokenizer')
  _write_json(folder / 'bundle.json', dict(
      image_size=list(spec.config.vision.image_size), patch_size=spec.config.vision.patch_size,
      context_length=spec.config.text.context_length, bos_id=run.tokenizer.bos_id, eos_id=run.tokenizer.eos_id,
      pad_id=run.tokenizer.pad_id, vocab_size=spec.vocab_size, dtype=dtype.name, platforms=list(stablehlo.PLATFORMS),
      logit_scale=float(clamped_scale(run.variables['params']['logit_scale'])), **run.provenance))
  return {name: f', {1000 * stablehlo.measure_latency(exported):.1f} ms for one on this machine'
          for name, exported in towers.items()}


def _read_report(path: epath.Path) -> dict[str, object]:
  if not path.exists():
    raise ValueError(f'there is no file {path}; name a results.json that eval.py wrote, or leave --scores out')
  try:
    report = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON ({error}); name a results.json that eval.py wrote') from error
  if not isinstance(report, dict) or not {'benchmark', 'num_images', 'protocol', 'miou'} <= report.keys():
    raise ValueError(f'{path} holds no scores; name the results.json of an evaluation on labelled pictures')
  return report


def _write_json(path: epath.Path, values: object) -> None:
  path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + '\n')


if __name__ == '__main__':
  WORKDIR = flags.DEFINE_string('workdir', None, 'The run; its newest whole checkpoint is exported.')
  FORMAT = flags.DEFINE_enum('format', None, ['huggingface', 'stablehlo', 'safetensors'], 'What to write.')
  OUTPUT = flags.DEFINE_string('output', None, 'Folder to make.')
  DTYPE = flags.DEFINE_enum(
      'dtype', 'float32', ['float32', 'bfloat16'], 'Of the weights; of stablehlo also of the computation.')
  SCORES = flags.DEFINE_string('scores', None, "results.json of eval.py, for huggingface's model card.")
  WEIGHTS = flags.DEFINE_enum(
      'weights', 'best', ['best', 'ema', 'trained'], 'best: the moving average, where the run keeps one.')
  flags.mark_flags_as_required(['workdir', 'format', 'output'])
  cli.run(lambda: print(export(
      WORKDIR.value, FORMAT.value, OUTPUT.value, dtype=DTYPE.value, scores=SCORES.value, weights=WEIGHTS.value)))
