"""The folder of a run: its config, data and tokenizer, and whether a command fits them."""

from collections.abc import Iterator, Mapping
import contextlib
import importlib.util
import json
import re

from etils import epath
from flax import traverse_util
import fsspec
import jax
import ml_collections

from groupvit_jax import storage
from groupvit_jax.data import augment, images, rand_augment
from groupvit_jax.data.mixture import Mixture
from groupvit_jax.data.sources import sample_captions
from groupvit_jax.data.tokenizer import build_tokenizer, SENTENCEPIECE_FILE, Tokenizer, train_sentencepiece
from groupvit_jax.errors import UserError
from groupvit_jax.interop import licence as licence_lib

# Buckets that can hold a run, and the package that reads and writes there.
_BUCKETS = {'gs': 'gcsfs', 's3': 's3fs'}

# Entries of earlier configs, and the value that replaced them.
_BUILT_IN = {
  'multi_label_weight': 1.0,
  'max_skipped_in_a_row': 10,
  'data.noun_phrases': False,
  'data.augment.num_ops': rand_augment.NUM_OPS,
  'data.augment.min_side': augment.MIN_SIDE,
  'data.augment.max_pixels': images.LARGEST,
}
# Entries that earlier configs and those of imported weights lack, and what they did.
_ADDED = {
  'multi_label_loss': 'pooled',
  'init_from': '',
  'freeze': '',
  'data.prompt_templates': 'full',
  'data.skipped_words': (),
  'data.lowercase_prompts': False,
  'eval.panel_steps': (),
  'optim.cosine': 'after_warmup',
}

_CONFIG_FILE = 'config.json'  # written last: what a start prepares is complete with it
_DATA_FILE = 'data.json'  # which records the run was started on; written first
_PREPARED = (licence_lib.FILE, 'tokenizer', _DATA_FILE)
# All that a run writes before its first step.
_WRITTEN = (*_PREPARED, 'panels', _CONFIG_FILE, 'checkpoints', 'best', 'metrics.jsonl', 'tensorboard', 'programs')

# Parts of the config that decide whether a checkpoint fits; others may change from one start to the next.
_FITTING = ('model', 'tokenizer', 'freeze')


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """Reads the config a workdir's run was started with. Raises UserError where there is none."""
  check_location(workdir)
  workdir = epath.Path(workdir)
  importing = f'make a workdir of it: python -m groupvit_jax.commands.import_weights --from={workdir} --workdir=...'
  if workdir.exists() and not workdir.is_dir():
    raise UserError(f'{workdir} is a file and no workdir; if it holds weights, {importing}')
  if not workdir.is_dir():
    raise UserError(f'there is no workdir {workdir}; train one with train.py --config=... --workdir={workdir}')
  path = workdir / _CONFIG_FILE
  if (workdir / 'bundle.json').exists():
    raise UserError(
      f'{workdir} is a bundle of export --format=stablehlo and no workdir; groupvit_jax.Predictor.from_pretrained '
      'takes it; name the workdir that it was exported from'
    )
  if not path.exists():
    raise UserError(f'{workdir} holds no run (it has no config.json); name the folder train.py wrote')
  config = _read_json(path)
  if not isinstance(config, dict):
    raise UserError(f'{path} is not a config: it is not a JSON object')
  if 'model_type' in config:  # as in config.json of Hugging Face folders, and of ours in that manner
    raise UserError(f'{workdir} holds weights and no run; {importing}')
  try:
    config = ml_collections.ConfigDict(config)
  except ValueError as error:  # a name with a dot
    raise UserError(f'{path} is not a config: {error}') from error
  return upgrade_config(config)


def upgrade_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A config of an earlier version in today's form; configs of today come back as they are.

  Raises UserError where an entry that there is no more holds another value than the one that is built in.
  """
  entries = traverse_util.flatten_dict(config.to_dict(), keep_empty_nodes=True, sep='.')
  entries = {re.sub(r'^evals\b', 'benchmarks', path): value for path, value in entries.items()}
  for path, value in _BUILT_IN.items():
    if (found := entries.pop(path, value)) != value:
      raise UserError(f'{path}={found}: there is no such entry any more; {value} is built in')
  entries.pop('scan_layers', None)  # the same parameters and the same function
  entries.pop('data.scenes.partial_captions', None)  # resuming such a run is refused: its data have another digest
  sets = {'data.clean_captions': False} if entries.get('data.source') == 'sets' else {}
  for path, value in (_ADDED | sets).items():
    section = path[: path.rfind('.') + 1]
    if any(other.startswith(section) for other in entries):
      entries.setdefault(path, value)
  return ml_collections.ConfigDict(traverse_util.unflatten_dict(entries, sep='.'))


def _read_json(path: epath.Path) -> dict[str, object]:
  try:
    return json.loads(path.read_text())
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not a config: {error}') from error


@contextlib.contextmanager
def complete_config(source: str, remedy: str) -> Iterator[None]:
  """Raises UserError, with its name, for an entry that is read and that a config lacks.

  Args:
    source: name of the config in the message.
    remedy: what to do about it.
  """
  try:
    yield
  except AttributeError as error:
    if not error.args or not isinstance(error.args[0], KeyError):  # what ConfigDict makes it from; others are defects
      raise
    key = str(error.args[0].args[0]).splitlines()[0]  # and then, what else might have been meant
    raise UserError(f'{source} has no entry {key}: {remedy}') from error


def holds_checkpoint(workdir: epath.PathLike) -> bool:
  """Whether a run has saved something that goes on; a start that has not binds nobody."""
  folder = epath.Path(workdir) / 'checkpoints'
  return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


def forget_other_start(
  workdir: epath.PathLike, config: ml_collections.ConfigDict, metadata: Mapping[str, object]
) -> None:
  """Deletes what another start prepared that ended without a checkpoint: in its midst, or with another config or data.

  `config` and `metadata` (see `Mixture.metadata`) are those of this start.
  """
  workdir = epath.Path(workdir)
  data, complete = workdir / _DATA_FILE, (workdir / _CONFIG_FILE).exists()
  if not (data.exists() or complete) or holds_checkpoint(workdir):
    return
  same_data = data.exists() and json.loads(data.read_text()) == metadata
  if complete and same_data and not _differences(read_config(workdir), config):
    return
  for name in (_CONFIG_FILE, *_PREPARED):  # the file that shows that they are a run's goes last
    _delete(workdir / name)


def undo_start(workdir: epath.PathLike) -> contextlib.ExitStack:
  """A context that deletes what a run wrote into its workdir since, where an error ends it before its first step.

  `pop_all()` ends that. A signal deletes nothing: the same command will resume.
  """
  workdir = epath.Path(workdir)
  new = [workdir / name for name in _WRITTEN if not (workdir / name).exists()] if jax.process_index() == 0 else []

  def undo(kind: type | None, error: BaseException | None, trace: object) -> None:
    if isinstance(error, Exception):
      for path in new:
        with contextlib.suppress(OSError):  # the disk may be the reason for the error
          _delete(path)

  stack = contextlib.ExitStack()
  stack.push(undo)
  return stack


def _delete(path: epath.Path) -> None:
  """Deletes a file or a folder, if it is there."""
  if path.exists():
    path.rmtree() if path.is_dir() else path.unlink()


def write_config(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> None:
  """Writes the config of a run that starts into its workdir; that of a run that resumes is there already."""
  path = epath.Path(workdir) / _CONFIG_FILE
  if path.exists():
    return
  if jax.process_index():
    raise UserError(
      f'process {jax.process_index()} does not see what process 0 wrote in {workdir}; name a folder '
      'that all hosts share: a network disk, or a bucket'
    )
  storage.write_atomic(str(path), (config.to_json(indent=2) + '\n').encode())


def check_location(workdir: epath.PathLike) -> None:
  """Raises UserError for a location where a run cannot be kept."""
  if not str(workdir).strip():
    raise UserError('--workdir is empty; name the folder of the run')
  scheme, bucket, _ = str(workdir).partition('://')
  if not bucket:
    return
  if scheme not in _BUCKETS:
    raise UserError(
      f'--workdir={workdir}: a run is kept on a disk, or in a bucket, {" or ".join(f"{name}://" for name in _BUCKETS)}'
    )
  if importlib.util.find_spec(_BUCKETS[scheme]) is None:
    raise UserError(f'--workdir={workdir} needs {_BUCKETS[scheme]}: pip install {_BUCKETS[scheme]}')
  if scheme == 'gs':  # other processes write there, too
    fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False


def check_config(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> list[str]:
  """Checks that a config fits the run in a workdir, if there is one.

  Returns:
    Keys that differ from the first start without making the checkpoints unusable, with both values.

  Raises:
    UserError: `workdir` holds a run from whose checkpoints this config cannot resume, or can hold none.
  """
  check_location(workdir)
  if not (epath.Path(workdir) / _CONFIG_FILE).exists():
    return []
  before = read_config(workdir)
  if not holds_checkpoint(workdir):
    return []
  differences = _differences(before, config)
  unfit = [text for key, text in differences.items() if key.split('.')[0] in _FITTING]
  if keeps_average(before) != keeps_average(config):
    unfit.append(differences['ema_decay'])
  if (before.data.num_prompts > 0) != (config.data.num_prompts > 0):  # prompts have a temperature of their own
    unfit.append(differences['data.num_prompts'])
  if unfit:
    raise UserError(
      f'the config does not fit the run in {workdir}: '
      + '; '.join(unfit)
      + '; use another --workdir, or the values of that run'
    )
  return list(differences.values())


def record_data(workdir: epath.PathLike, metadata: Mapping[str, object]) -> None:
  """Writes metadata of the training data (see `Mixture.metadata`) into a workdir, unless they are there."""
  path = epath.Path(workdir) / _DATA_FILE
  if not path.exists():
    storage.write_atomic(str(path), (json.dumps(metadata, indent=2) + '\n').encode())


def check_data(workdir: epath.PathLike, metadata: Mapping[str, object]) -> None:
  """Checks that the training data are those of the run in a workdir, if there is one.

  Where records lie and when they were written does not matter, only which they are, in what order. Raises UserError
  where the run was started on other data: its order of records would be another one.
  """
  path = epath.Path(workdir) / _DATA_FILE
  before = json.loads(path.read_text()) if path.exists() and holds_checkpoint(workdir) else metadata
  cure = f'use another --workdir, or delete {path} to go on with another order of records'
  if before['fingerprint'] == metadata['fingerprint']:
    if before.get('epochs') != metadata['epochs'] and any(part['shards'] for part in metadata['sets'].values()):
      raise UserError(f'the run in {workdir} began with an order of epochs that earlier versions had; {cure}')
    return
  old, new = before['sets'], metadata['sets']
  changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
  then, now = (_count_records(sets, changed) for sets in (old, new))
  how = 'as many records, but others' if then == now else f'{then} records then, {now} now'
  raise UserError(
    f'the data changed since the run in {workdir} started: {", ".join(changed)} ({how}); bring the old data back, '
    + cure
  )


def _count_records(sets: Mapping[str, Mapping[str, object]], names: list[str]) -> str:
  return ' + '.join(f'{sets[name]["records"]:,}' if name in sets else '0' for name in names)


def keeps_average(config: ml_collections.ConfigDict) -> bool:
  """Whether the checkpoints of a run hold a moving average; runs from before there were any lack the entry."""
  return 'ema_decay' in config and config.ema_decay > 0


def load_tokenizer(workdir: epath.PathLike) -> Tokenizer:
  """The tokenizer a run was trained with. Raises UserError if it has none."""
  return build_tokenizer(epath.Path(workdir) / 'tokenizer')


def prepare_tokenizer(workdir: epath.PathLike, config: ml_collections.ConfigDict, source: Mixture) -> Tokenizer:
  """The run's tokenizer: the one in its workdir, or else a copy of the one named, or else one trained on captions.

  `config` is the `tokenizer` part of the run's; `source` has the captions.
  """
  folder = epath.Path(workdir) / 'tokenizer'
  if folder.exists():  # whole, for `forget_other_start` deletes one that a killed start was writing
    return load_tokenizer(workdir)
  if config.path:
    build_tokenizer(config.path).save(folder)
  else:
    train_sentencepiece(sample_captions(source, config.num_captions), folder / SENTENCEPIECE_FILE, config.vocab_size)
  return load_tokenizer(workdir)


def _differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> dict[str, str]:
  """Keys whose values differ, with a sentence each. Compared as JSON: tuples and lists are the same thing."""
  before, after = (traverse_util.flatten_dict(json.loads(config.to_json()), sep='.') for config in (old, new))
  text = lambda values, key: repr(values[key]) if key in values else 'absent'
  return {
    key: f'{key} is {text(after, key)} here and {text(before, key)} there'
    for key in sorted(before.keys() | after.keys())
    if text(before, key) != text(after, key)
  }
