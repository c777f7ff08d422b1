"""Every entry of a config: what it means and which values it takes; their check, and their table.

python -m groupvit_jax.config_entries > docs/config.md
"""

from collections.abc import Callable, Iterator
import importlib
import math
import numbers
import re
from typing import NamedTuple

import ml_collections

from groupvit_jax.errors import UserError

_SHOWN = 80  # characters of a refused value
_BILLION = 10**9

_PAGE = """# Config

Every entry of a config: the values it takes, its meaning, and its values in `configs/quickstart.py` and
`configs/groupvit_vits16_gcc_yfcc.py`. `--config.ENTRY=VALUE` changes one, as in `--config.optim.peak_lr=0.01`. All are
checked before anything is written. NAME is the name of a set or of a benchmark, and yours to choose.
This page is written by `python -m groupvit_jax.config_entries > docs/config.md`.

| entry | values | meaning | quickstart | paper's |
|:--|:--|:--|:--|:--|
"""


class Kind(NamedTuple):
  """A set of values."""

  words: str  # which they are, as in 'a whole number from 1 to 4'
  accepts: Callable[[object], bool]


class Entry(NamedTuple):
  """What an entry takes and means."""

  kind: Kind
  meaning: str


def whole(low: int, high: int, *, also: int | None = None) -> Kind:
  """Whole numbers of a range, and perhaps one more."""
  words = f'a whole number from {low:,} to {high:,}' + (f', or {also}' if also is not None else '')
  return Kind(words, lambda x: _is(x, numbers.Integral) and (low <= x <= high or x == also))


def number(low: float, high: float, *, above: bool = False, below: bool = False, infinite: bool = False) -> Kind:
  """Finite numbers of a range, without its lower end if `above`, without its upper end if `below`; perhaps inf."""
  bounds = 'above' if above else 'of at least', 'below' if below else 'at most'
  words = f'a finite number {bounds[0]} {low:,} and {bounds[1]} {high:,}'

  def accepts(x: object) -> bool:
    if not _is(x, numbers.Real):
      return False
    return low <= x <= high and not (above and x == low) and not (below and x == high) or infinite and x == math.inf

  return Kind(words + (', or inf' if infinite else ''), accepts)


def _is(x: object, kind: type) -> bool:
  return isinstance(x, kind) and not isinstance(x, bool)


def choice(*values: str) -> Kind:
  """Some texts."""
  return Kind('one of ' + ', '.join(map(repr, values)), lambda x: type(x) is str and x in values)


def matching(pattern: str, words: str) -> Kind:
  """Texts that match a regular expression; numbers in its groups are finite and above 0."""

  def accepts(x: object) -> bool:
    match = re.fullmatch(pattern, x) if type(x) is str else None
    return match is not None and all(0 < float(group) < math.inf for group in match.groups())

  return Kind(words, accepts)


def several(item: Kind, words: str, fewest: int, most: int | None = None, *, rising: bool = False) -> Kind:
  """Tuples or lists of one kind, perhaps in rising order."""

  def accepts(x: object) -> bool:
    fits = isinstance(x, tuple | list) and fewest <= len(x) <= (most or len(x)) and all(map(item.accepts, x))
    return fits and (not rising or list(x) == sorted(x))

  return Kind(words, accepts)


SWITCH = Kind('True or False', lambda x: type(x) is bool)
_TEXT = Kind('text', lambda x: type(x) is str)
_NAME = matching('.+', 'text that is not empty')
_NAMES = several(_NAME, 'texts between parentheses, as in ("dog", "grass")', 0)
_PATHS = Kind('a path, or several between parentheses', lambda x: _NAME.accepts(x) or (_NAMES.accepts(x) and bool(x)))
_CHANGES = Kind('names with values, as in dict(stride=112)', lambda x: isinstance(x, dict | ml_collections.ConfigDict))
_SHARE = number(0, 1)
_RATE = number(0, 100)
_STEPS, _STEPS_OR_NEVER = whole(1, _BILLION), whole(0, _BILLION)
_WIDTH, _HEADS = whole(2, 65_536), whole(1, 1024)
_DEPTH, _TOKENS = whole(1, 256), whole(0, 65_536)
_RATIO = number(0, 64, above=True)
_STD = number(0, 100, above=True)
_INIT = matching(
  r'(?:normal|fan_in):(\d+\.?\d*(?:e-?\d+)?|\.\d+)', "'normal:STD' or 'fan_in:SCALE' with a positive number"
)
_SIDE = whole(1, 8192)

ENTRIES = {
  'seed': Entry(whole(0, 2**32 - 1), 'of parameters, data order and all other randomness'),
  'init_from': Entry(_TEXT, "path or Hub id of weights to start from: docs/train.md; '' for random ones"),
  'profile': Entry(SWITCH, 'whether a trace of three steps is written: docs/performance.md'),
  'dry_run': Entry(SWITCH, 'whether data, tokenizer, shapes and memory are checked instead of training'),
  'total_steps': Entry(whole(0, 10**8), 'optimiser steps of the run; 0 for data.epochs'),
  'batch_size': Entry(whole(1, 2**20), 'image-text pairs of a step, over all devices, which must divide it'),
  'grad_accum_steps': Entry(whole(1, 2**20), 'micro-batches of the towers; divides the batch size per device'),
  'remat': Entry(choice('none', 'dots', 'blocks'), 'activations that are recomputed: docs/train.md'),
  'text_budget': Entry(_TOKENS, 'tokens per image in packed rows; 0 pads: docs/performance.md'),
  'multi_label_loss': Entry(
    choice('pooled', 'pooled_distinct', 'best_segment'), 'what prompts are contrasted with: docs/design.md'
  ),
  'ema_decay': Entry(number(0, 1, below=True), 'of the moving average of the weights; 0 keeps none'),
  'freeze': Entry(_TEXT, "regular expression of parameters that stay as they are: docs/train.md; '' for none"),
  'log_every': Entry(_STEPS, 'steps between lines of the log'),
  'eval.every_steps': Entry(_STEPS_OR_NEVER, 'steps between evaluations of held-out scenes, or panels; 0 for never'),
  'eval.panel_steps': Entry(
    several(_STEPS_OR_NEVER, 'whole numbers between parentheses, as in (0, 25)', 0), 'further steps with a panel'
  ),
  'checkpoint.every_steps': Entry(_STEPS, 'steps between checkpoints'),
  'checkpoint.keep': Entry(whole(1, 1000), 'newest checkpoints that are kept'),
  'checkpoint.best': Entry(_TEXT, "metric whose best checkpoint is kept too, as in 'eval/voc21/miou'; '' for none"),
  'benchmarks.NAME.benchmark': Entry(_NAME, 'which one: docs/evaluation.md'),
  'benchmarks.NAME.data_dir': Entry(_NAME, 'folder of its data set'),
  'benchmarks.NAME.every_steps': Entry(_STEPS_OR_NEVER, 'steps between evaluations; 0 for never'),
  'benchmarks.NAME.num_pictures': Entry(_STEPS_OR_NEVER, 'images, spread evenly; 0 for all'),
  'benchmarks.NAME.protocol': Entry(_TEXT, "how images are labelled; '' for the published result's protocol"),
  'benchmarks.NAME.changes': Entry(_CHANGES, 'to that protocol'),
  'data.source': Entry(choice('scenes', 'sets', 'pairs'), 'embedded scenes, the sets below, or the pairs of data.path'),
  'data.path': Entry(_TEXT, "one's own pairs: tars, a folder or a table: docs/data.md"),
  'data.epochs': Entry(number(0, 10**6, above=True), 'passes over them, where total_steps is 0'),
  'data.sets.NAME.format': Entry(choice('webdataset', 'tfds'), 'tars, or a TFDS folder: docs/data.md'),
  'data.sets.NAME.path': Entry(_PATHS, 'tars, as in /data/{000..331}.tar, or the TFDS folder'),
  'data.sets.NAME.split': Entry(_NAME, 'of TFDS'),
  'data.sets.NAME.image': Entry(_NAME, "the images' feature in TFDS"),
  'data.sets.NAME.caption': Entry(_NAME, "the captions' feature in TFDS; of tars 'txt', 'cls' or 'json:FIELD'"),
  'data.sets.NAME.weight': Entry(number(0, _BILLION), "share relative to other sets'; 0 for all mixes by size"),
  'data.sets.NAME.expected': Entry(whole(0, 10**12), 'records it should have, for reports; 0 if unknown'),
  'data.index_dir': Entry(_TEXT, "folder of the tars' indices; '' for beside local tars, else the user's cache"),
  'data.clean_captions': Entry(SWITCH, "whether captions are cleaned as before CLIP's BPE"),
  'data.num_prompts': Entry(whole(0, 100), 'prompts made of each caption; 0 trains on captions alone'),
  'data.lowercase_prompts': Entry(SWITCH, 'whether prompts are made of captions in lower case: docs/data.md'),
  'data.prompt_templates': Entry(choice('full', 'subset', 'simple', 'identity'), 'sentences around the prompts'),
  'data.skipped_words': Entry(_NAMES, 'words that no prompt is made of'),
  'data.augment.name': Entry(choice('none', 'plain', 'rand_augment'), 'nothing, crop and flip, or RandAugment as well'),
  'data.augment.area': Entry(
    several(number(0, 1, above=True), 'two shares above 0 and at most 1, the smaller first', 2, 2, rising=True),
    'share of the image that a crop covers',
  ),
  'data.augment.ratio': Entry(
    several(number(0, 1000, above=True), 'two numbers above 0 and at most 1000, the smaller first', 2, 2, rising=True),
    'width / height of a crop',
  ),
  'data.augment.flip': Entry(_SHARE, 'probability of mirroring'),
  'data.augment.op_probability': Entry(_SHARE, 'of each of the two operations of RandAugment'),
  'data.augment.magnitude': Entry(number(0, 10), 'of each of them'),
  'data.augment.magnitude_std': Entry(number(0, 10), 'standard deviation of the magnitude'),
  'data.augment.erase': Entry(_SHARE, 'probability of random erasing'),
  'data.max_fault_share': Entry(_SHARE, 'share of bad records above which the run ends'),
  'data.num_threads': Entry(whole(0, 1024), 'threads that make examples, in each process; 0 for its own'),
  'data.num_workers': Entry(whole(0, 1024), 'processes that make examples, on each host; 0 for its own'),
  'data.prefetch_batches': Entry(whole(1, 1024), 'batches kept ready'),
  'data.scenes.seed': Entry(whole(0, 2**64 - 1), 'of the scenes'),
  'data.scenes.things': Entry(_NAMES, 'things of the scenes'),
  'data.scenes.stuff': Entry(_NAMES, 'their backgrounds'),
  'data.scenes.min_things': Entry(whole(1, 16), 'fewest things in a scene'),
  'data.scenes.max_things': Entry(whole(1, 16), 'most things in a scene'),
  'data.scenes.num_heldout': Entry(whole(1, 10**6), 'scenes of the validation split, and of the test split'),
  'tokenizer.path': Entry(_TEXT, "a tokenizer's file or folder; '' trains one on the captions"),
  'tokenizer.vocab_size': Entry(whole(260, 10**6), 'tokens of one that is trained'),
  'tokenizer.num_captions': Entry(whole(1, 10**7), 'captions that it is trained on'),
  'model.dtype': Entry(choice('float32', 'bfloat16'), "of the towers' matmuls"),
  'model.embed_dim': Entry(_WIDTH, "of the towers' joint space"),
  'model.projector_dim': Entry(_WIDTH, 'hidden units of the projectors'),
  'model.vision.image_size': Entry(several(_SIDE, 'two whole numbers from 1 to 8,192', 2, 2), 'height and width, px'),
  'model.vision.patch_size': Entry(_SIDE, 'side of a patch, px; divides the image size'),
  'model.vision.width': Entry(_WIDTH, 'of tokens; a multiple of num_heads'),
  'model.vision.num_heads': Entry(_HEADS, 'of attention'),
  'model.vision.depths': Entry(
    several(_DEPTH, 'two to eight whole numbers from 1 to 256', 2, 8), 'blocks of each stage'
  ),
  'model.vision.num_group_tokens': Entry(
    several(_TOKENS, 'whole numbers from 0 to 65,536, as many as stages', 2, 8), 'of each stage; 0 in the last'
  ),
  'model.vision.num_segments': Entry(
    several(_TOKENS, 'whole numbers from 0 to 65,536, as many as stages', 2, 8), 'of each stage; 0 in the last'
  ),
  'model.vision.mlp_ratio': Entry(_RATIO, 'hidden units of an MLP / width'),
  'model.vision.drop_path': Entry(number(0, 1, below=True), 'rate of stochastic depth in the last block'),
  'model.vision.assignment': Entry(choice('gumbel', 'hard', 'soft'), 'of tokens to groups, in training'),
  'model.vision.init.kernel': Entry(_INIT, 'how weights start; `normal:` has the biases of torch, too: docs/design.md'),
  'model.vision.init.assign_kernel': Entry(_INIT, "how the assignment's query and key start"),
  'model.vision.init.value_kernel': Entry(_INIT, "how the assignment's value and output start"),
  'model.vision.init.tokens_std': Entry(_STD, 'standard deviation of group tokens at the start'),
  'model.vision.init.positions_std': Entry(_STD, 'standard deviation of position embeddings at the start'),
  'model.text.context_length': Entry(whole(3, 65_536), 'tokens of a text, at most'),
  'model.text.width': Entry(_WIDTH, 'of tokens; a multiple of num_heads'),
  'model.text.depth': Entry(_DEPTH, 'blocks'),
  'model.text.num_heads': Entry(_HEADS, 'of attention'),
  'model.text.mlp_ratio': Entry(_RATIO, 'hidden units of an MLP / width'),
  'optim.warmup_lr': Entry(_RATE, 'learning rate at step 0, of batch 4096: rates scale linearly with the batch'),
  'optim.peak_lr': Entry(number(0, 100, above=True), 'learning rate after the warm-up, of batch 4096'),
  'optim.end_lr': Entry(_RATE, 'learning rate at the end, of batch 4096'),
  'optim.warmup_steps': Entry(
    whole(0, _BILLION, also=-1), 'steps of the warm-up, fewer than total_steps; -1 for a fifteenth'
  ),
  'optim.cosine': Entry(choice('run', 'after_warmup'), 'steps that the cosine spans'),
  'optim.beta1': Entry(number(0, 1, below=True), 'decay of the first moment'),
  'optim.beta2': Entry(number(0, 1, below=True), 'decay of the second moment'),
  'optim.eps': Entry(number(0, 1, above=True), 'of AdamW'),
  'optim.weight_decay': Entry(number(0, 10), 'of AdamW, times the learning rate'),
  'optim.clip_norm': Entry(number(0, _BILLION, above=True, infinite=True), 'of all gradients together; inf for none'),
  'mesh.data': Entry(whole(1, _BILLION, also=-1), 'devices with samples of their own; -1 for what the others leave'),
  'mesh.fsdp': Entry(whole(1, _BILLION), 'devices that parameters and samples are sharded over'),
  'mesh.model': Entry(whole(1, _BILLION), 'devices that heads and hidden units are sharded over'),
}

_SECTIONS = {name.rpartition('.')[0] for name in ENTRIES} | {'data', 'data.sets', 'benchmarks', 'model.vision', ''}


def check(config: ml_collections.ConfigDict, section: str = '', *, complete: bool = False) -> None:
  """Checks each entry of a config by itself.

  Args:
    config: today's; see `workdir.upgrade_config`.
    section: of which it is; '' for a whole one.
    complete: whether all entries of the section must be there.

  Raises:
    UserError: names all entries with a value that they do not take, and what they take.
  """
  found = list(flatten(config, section))
  mistakes = [mistake for name, path, value in found if (mistake := _mistake(name, path, value))]
  if complete:
    names = {name for name, _, _ in found}
    mistakes += [f'config.{name} is missing' for name in ENTRIES if name.startswith(section) and name not in names]
  if mistakes:
    raise UserError('; '.join(mistakes))


def check_value(what: str, value: object, kind: Kind) -> None:
  """Raises UserError about `what` unless a value is of a kind."""
  if not kind.accepts(value):
    raise UserError(f'{what}={_show(value)}: must be {kind.words}')


def flatten(config: ml_collections.ConfigDict, section: str = '') -> Iterator[tuple[str, str, object]]:
  """Yields the name in `ENTRIES`, the path and the value of each entry that is no section."""
  for key in config:
    path = f'{section}.{key}'.lstrip('.')
    name = re.sub(r'^(benchmarks|data\.sets)\.[^.]+', r'\1.NAME', path)
    if isinstance(config[key], ml_collections.ConfigDict) and name not in ENTRIES:
      yield from flatten(config[key], path)
    else:
      yield name, path, config[key]


def _mistake(name: str, path: str, value: object) -> str:
  """What is wrong with an entry; '' if nothing."""
  if name not in ENTRIES:
    known = 'is a section, not a value' if name in _SECTIONS or name.endswith('.NAME') else 'there is no such entry'
    return f'config.{path}={_show(value)}: {known}; docs/config.md lists all'
  try:
    check_value(f'config.{path}', value, ENTRIES[name].kind)
  except UserError as error:
    return str(error)
  return ''


def _show(value: object) -> str:
  text = repr(value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value)
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}...'


def page() -> str:
  """docs/config.md."""
  values = []
  for experiment in ('quickstart', 'groupvit_vits16_gcc_yfcc'):
    config = importlib.import_module(f'configs.{experiment}').get_config()
    found = {name: value for name, _, value in flatten(config) if '.NAME.' not in name}
    values.append({name: f'`{_show(value)}`' for name, value in found.items()})
  rows = [
    f'| `{name}` | {entry.kind.words} | {entry.meaning} | {" | ".join(each.get(name, "") for each in values)} |'
    for name, entry in ENTRIES.items()
  ]
  return _PAGE + '\n'.join(rows) + '\n'


if __name__ == '__main__':
  print(page(), end='')
