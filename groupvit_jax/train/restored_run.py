"""Restored runs: config, tokenizer, model and variables of a workdir, or of an export, ready for use."""

from collections.abc import Mapping
import contextlib
import functools
import pathlib
import subprocess
from typing import get_args, Literal, NamedTuple

from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import groupvit_jax
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.eval import protocols
from groupvit_jax.interop import bundle, onnx
from groupvit_jax.model.build import build_model
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.running import sharding
from groupvit_jax.running.attention_choice import with_fastest_attention
from groupvit_jax.train import state as train_state
from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.checkpoint import BEST_FOLDER, Checkpoints

Weights = Literal['best', 'ema', 'trained']
NEWEST, BEST = 'newest', 'best'  # checkpoints of a run


class RestoredRun(NamedTuple):
  """What a workdir or a bundle holds, ready for `model.apply`."""

  workdir: epath.Path
  config: ml_collections.ConfigDict  # of a bundle without entries
  tokenizer: Tokenizer
  model: ImageTextModel | bundle.ExportedTowers
  mesh: jax.sharding.Mesh
  variables: dict[str, object]  # {'params': ..., 'batch_stats': ...}, replicated
  weights: Weights  # which of them: 'ema' or 'trained'
  step: int
  skipped: tuple[int, ...]  # newer checkpoints, which are damaged
  provenance: Mapping[str, str]  # see `provenance`

  def parse_protocol(self, name: str, changes: Mapping[str, str]) -> protocols.Protocol:
    """`protocols.parse_protocol` for this model. Raises UserError if it takes no windows of that size."""
    protocol = protocols.parse_protocol(name, self.model.vision.image_size, self.model.vision.patch_size, changes)
    if isinstance(self.model, bundle.ExportedTowers):
      self.model.check_window(protocol.window, protocol.window)
    return protocol


def provenance(
  workdir: epath.PathLike, step: int, weights: Weights, model: ImageTextModel, mesh: jax.sharding.Mesh
) -> dict[str, str]:
  """What metrics of a checkpoint depend on besides their protocol."""
  matmuls = jax.config.jax_default_matmul_precision or 'default'
  return {
    'workdir': str(workdir),
    'step': str(step),
    'weights': weights,
    'code': code_version(),
    'precision': f'{jnp.dtype(model.dtype).name}, matmul precision {matmuls} on {mesh.devices.flat[0].device_kind}',
  }


def open_model(
  path: epath.PathLike, checkpoint: str = NEWEST, *, weights: Weights = 'best', runtime: onnx.Runtime | None = None
) -> RestoredRun:
  """Opens a workdir or, on one device, a folder that `export` wrote with --format=onnx or stablehlo.

  Args:
    path: of the folder.
    checkpoint: of a workdir, as for `restore`.
    weights: likewise.
    runtime: of an ONNX export, see `onnx.load`; None for 'onnxruntime'.

  Raises:
    ValueError: as for `restore`; or an export is damaged, was asked for other weights than its own, or is run by
      several processes.
  """
  folder = epath.Path(path)
  is_bundle = (folder / bundle.FILE).exists()
  if runtime is None and not is_bundle:
    return restore(path, checkpoint, weights=weights)
  if not is_bundle:
    raise UserError(
      f'{folder} is no ONNX export, which runtime={runtime!r} needs; leave it out, and JAX runs the model'
    )
  if weights != 'best' or checkpoint != NEWEST:
    raise UserError(f'{folder} is no workdir and has one set of weights; leave out weights and checkpoint')
  if jax.process_count() > 1:
    raise UserError(f'an export is run by one process and there are {jax.process_count()}; start only one')
  towers, variables, tokenizer, runtime, origin = bundle.read_bundle(folder, runtime)
  config, mesh = ml_collections.ConfigDict({'data': {}}), sharding.make_mesh(devices=jax.devices()[:1])
  metadata = {'workdir': str(folder), **origin, 'code': code_version(), 'runtime': runtime}
  step, weights = int(origin['step']), origin['weights']
  return RestoredRun(folder, config, tokenizer, towers, mesh, variables, weights, step, (), metadata)


def restore(workdir: epath.PathLike, checkpoint: str = NEWEST, *, weights: Weights = 'best') -> RestoredRun:
  """Restores a checkpoint of a workdir onto all devices; nothing is written there.

  Args:
    workdir: of the run.
    checkpoint: 'newest' for the newest readable one, 'best' for the one that scored best in training.
    weights: 'ema' for the moving average, 'trained' for the trained weights, 'best' for the average if the run keeps
      one.

  Raises:
    UserError: there is no such workdir, run, checkpoint or average; none can be read; or parameters are not finite.
  """
  if checkpoint not in (NEWEST, BEST):
    raise UserError(f'--checkpoint={checkpoint}: use {NEWEST} or {BEST}')
  config = workdir_lib.read_config(workdir)
  weights = _choose_weights(workdir, config, weights)
  tokenizer = workdir_lib.load_tokenizer(workdir)
  with complete_config(workdir):
    model = build_model(
      config.model, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, multi_label=config.data.num_prompts > 0
    )
  mesh = sharding.make_mesh()
  model = with_fastest_attention(model, mesh)
  state = train_state.abstract_state(model, optax.identity(), _text_shape(model), mesh, average=weights == 'ema')
  shapes = state.variables if state.ema is None else {'ema': state.ema}
  if checkpoint == BEST and not (epath.Path(workdir) / BEST_FOLDER).exists():
    raise UserError(f'the run in {workdir} kept no best checkpoint; train with --config.checkpoint.best=eval/...')
  folder = {} if checkpoint == NEWEST else {'folder': BEST_FOLDER}
  with contextlib.closing(Checkpoints(workdir, keep=1, read_only=True, **folder)) as checkpoints:
    restored = checkpoints.restore_variables(shapes)
  if restored is None:
    raise UserError(f'the run in {workdir} has no checkpoint yet; let train.py reach its first')
  variables = restored.state if state.ema is None else restored.state['ema']
  if not all(np.isfinite(leaf).all() for leaf in map(np.asarray, jax.tree.leaves(variables))):
    raise UserError(f'step {restored.step} in {workdir} holds parameters that are not finite; train or import it again')
  metadata = provenance(workdir, restored.step, weights, model, mesh)
  return RestoredRun(
    epath.Path(workdir), config, tokenizer, model, mesh, variables, weights, restored.step, restored.skipped, metadata
  )


def _choose_weights(workdir: epath.PathLike, config: ml_collections.ConfigDict, weights: Weights) -> Weights:
  """'ema' or 'trained'."""
  if weights not in get_args(Weights):
    raise UserError(f'weights={weights!r}: use {", ".join(get_args(Weights))}')
  kept = workdir_lib.keeps_average(config)
  if weights == 'ema' and not kept:
    raise UserError(f'the run in {workdir} keeps no moving average; use weights=trained, or train with ema_decay')
  return 'ema' if kept and weights != 'trained' else 'trained'


def complete_config(workdir: epath.PathLike) -> contextlib.AbstractContextManager[None]:
  """Raises UserError, with its name, for an entry that is read and that a run's config lacks."""
  return workdir_lib.complete_config(
    str(epath.Path(workdir) / 'config.json'),
    'the run was made by another version of this code; use that one, or train again',
  )


def untrained_variables(run: RestoredRun) -> dict[str, object]:
  """The variables that the run started from. Raises UserError where these are no longer where its config says."""
  from groupvit_jax.train import initial_weights

  weights = initial_weights.read_source(run.config.init_from) if run.config.init_from else None
  return initial_weights.initial_state(
    run.model, optax.identity(), run.config.seed, _text_shape(run.model), run.mesh, weights=weights
  ).variables


@functools.cache
def code_version() -> str:
  """The commit of this code, with '-dirty' after changes, or the package's version outside git."""
  root = pathlib.Path(__file__).parents[2]
  if (root / '.git').exists():
    command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
    try:
      done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
      return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or it distrusts the folder's owner
      pass
  return groupvit_jax.__version__


def _text_shape(model: ImageTextModel) -> tuple[int, int]:
  """A (T, L) to initialise with: no parameter's shape depends on T."""
  return 1, model.text.context_length
