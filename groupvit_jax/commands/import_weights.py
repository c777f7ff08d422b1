"""Imports weights into a new workdir.

  python -m groupvit_jax.commands.import_weights --from=groupvit-gcc-yfcc --workdir=runs/released

`--from` is a Hugging Face folder, a folder of `export --format=safetensors`, the id of one on the Hub as
nvidia/groupvit-gcc-yfcc, or an authors' `.pth`; the last needs `--tokenizer`, a folder or file with CLIP's vocabulary.
"""

import contextlib

from absl import flags
from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import optax

from groupvit_jax import cli
from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer
from groupvit_jax.errors import UserError
from groupvit_jax.interop import hub, licence
from groupvit_jax.interop.read import check_tokenizer, read_weights, Weights
from groupvit_jax.storage import atomic_folder, check_free, check_local
from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.checkpoint import Checkpoints
from groupvit_jax.train.state import TrainState


def import_weights(source: str, workdir: str, tokenizer: str | None = None) -> str:
  """Imports weights into a new workdir, which evaluation and `Predictor` open like any other.

  Args:
    source: folder or file with the weights, or their id on the Hub.
    workdir: folder to create; must not exist, or be empty.
    tokenizer: tokenizer files, where `source` has none.

  Returns:
    A line about the weights, and one about their licence.
  """
  check_free('--workdir', workdir)
  check_local(source)
  path = hub.fetch(source)
  if tokenizer is None and not path.is_dir() and path.exists():
    raise UserError(f"{source} comes without a tokenizer; name CLIP's vocabulary with --tokenizer=")
  weights = read_weights(path)
  loaded = build_tokenizer(path if tokenizer is None else tokenizer)
  check_tokenizer(
    loaded,
    vocab_size=weights.spec.vocab_size,
    eos_id=weights.spec.eos_id,
    remedy='name the one they were trained with, with --tokenizer=',
  )
  with atomic_folder('--workdir', workdir) as folder:
    _write(folder, weights, loaded, source)
  count = sum(leaf.size for leaf in jax.tree.leaves(weights.variables['params']))
  return (
    f'{workdir}: {count:,} parameters, imported from {source} ({weights.form})\n'
    f'licence of the weights: {weights.licence}'
  )


def _write(folder: epath.Path, weights: Weights, tokenizer: Tokenizer, source: str) -> None:
  """Writes config, tokenizer and a checkpoint at step 0, without an optimiser's state."""
  workdir_lib.write_config(
    folder,
    ml_collections.ConfigDict(
      dict(
        seed=0,
        model=weights.spec.config,
        tokenizer=dict(path=''),
        # The paper makes three prompts of a caption, for models that have a temperature for them.
        data=dict(num_prompts=3 if weights.spec.multi_label else 0),
        imported=dict(source=source, form=weights.form),
      )
    ),
  )
  licence.keep(folder, weights.licence)
  tokenizer.save(folder / 'tokenizer')
  variables = jax.tree.map(jnp.asarray, weights.variables)
  state = TrainState.start(variables, optax.identity().init(variables['params']), jax.random.key(0))
  with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
    checkpoints.save(state, workdir_lib.read_config(folder))
    checkpoints.wait()


if __name__ == '__main__':
  SOURCE = flags.DEFINE_string('from', None, 'Folder or .pth file with the weights, or their id on the Hub.')
  WORKDIR = flags.DEFINE_string('workdir', None, 'Folder to create.')
  TOKENIZER = flags.DEFINE_string('tokenizer', None, "Tokenizer files; by default those in the weights' folder.")
  flags.mark_flags_as_required(['from', 'workdir'])
  cli.run(lambda: print(import_weights(SOURCE.value, WORKDIR.value, TOKENIZER.value)))
