"""The dry run: checks data, tokenizer, shapes and memory of a run, trains nothing and keeps nothing.

python train.py --config=configs/EXPERIMENT.py --workdir=runs/EXPERIMENT --config.dry_run=True
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import math
import time
from typing import NamedTuple
import uuid

from etils import epath
import jax
import ml_collections
import numpy as np

from groupvit_jax import config_entries
from groupvit_jax.data import bad_records, pipeline
from groupvit_jax.errors import UserError
from groupvit_jax.model import text_packing
from groupvit_jax.running import processes, sharding
from groupvit_jax.train import optim
from groupvit_jax.train import state as train_state
from groupvit_jax.train import workdir as workdir_lib
from groupvit_jax.train.run import jit_step, read_batches, Run, set_up, with_vocabulary

_CAPTIONS = 2000  # to train a tokenizer on
_GIB = 2**30


class Memory(NamedTuple):
  """Bytes of one device."""

  state: int
  batch: int
  temporaries: int  # of a step, as the compiler plans it
  limit: int | None  # what the device has; None where it does not say

  @property
  def together(self) -> int:
    """What a step needs."""
    return self.state + self.batch + self.temporaries


def check(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> int:
  """Runs everything that precedes training, prints a report, and leaves the workdir as it is; returns exit code 0.

  Indices of shards are kept for the run. Raises the error that the run would have ended with.
  """
  config_entries.check(config)
  config = config.copy_and_resolve_references()
  config.dry_run = False
  report = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda _: None
  run = _set_up(config, workdir)
  changed = workdir_lib.check_config(workdir, run.config)
  workdir_lib.check_data(workdir, run.source.metadata())
  for line in _data_lines(run):
    report(line)
  batch = _first_batch(run, report)
  report(_text_line(run, batch['tokens']))
  report('compiling the step')
  memory = measure_memory(run, batch)
  for line in _model_lines(run, batch, memory):
    report(line)
  check_memory(memory)
  for line in changed:
    report(f'workdir    changed since the first start: {line}')
  holds_run = (epath.Path(workdir) / 'config.json').exists()
  report(f'workdir    {workdir} {"holds a run to go on with" if holds_run else "would be new"}')
  report('all is well; nothing was trained, nothing written but indices of shards')
  return 0


def measure_memory(run: Run, batch: dict[str, np.ndarray]) -> Memory:
  """What a step of batches such as this host's rows needs of a device: compiles it for the run's mesh."""
  state = train_state.abstract_state(run.model, run.tx, run.text_shape, run.mesh, run.averages)
  place = sharding.batch_sharding(run.mesh)
  rows = {
    name: jax.ShapeDtypeStruct((run.config.batch_size, *value.shape[1:]), value.dtype, sharding=place)
    for name, value in batch.items()
  }
  try:
    step = jit_step(run, state).lower(state, rows).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise UserError(f'a step does not fit into a device; {_ADVICE} ({str(error)[:200]})') from error
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  return Memory(_bytes(state), _bytes(rows), step.memory_analysis().temp_size_in_bytes, limit)


def check_memory(memory: Memory) -> None:
  """Raises ValueError when a step needs more than a device has."""
  if memory.limit is not None and memory.together > memory.limit:
    raise UserError(
      f'a step needs {memory.together / _GIB:.1f} GiB of a device, which has {memory.limit / _GIB:.1f}; {_ADVICE}'
    )


_ADVICE = "set remat='dots' or 'blocks', raise grad_accum_steps, or use more devices: docs/train.md"


def _set_up(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> Run:
  """The run as it would be, but for a tokenizer that is trained on fewer captions."""
  probe = config.copy_and_resolve_references()
  kept = epath.Path(workdir) / 'tokenizer'
  if kept.exists():
    probe.tokenizer.path = str(kept)
  if workdir_lib.holds_checkpoint(workdir):
    probe.init_from = ''  # what the run began with is not needed any more, and may be gone
  probe.tokenizer.num_captions = min(_CAPTIONS, config.tokenizer.num_captions)
  with _scratch(workdir) as scratch:
    run = set_up(probe, scratch)
  if not probe.tokenizer.path and not probe.init_from:  # the run's own may find more pieces
    run = run._replace(model=with_vocabulary(run.model, config.tokenizer.vocab_size, run.tokenizer.eos_id))
  return run._replace(config=optim.steps_from_pairs(config, len(run.source)))


@contextlib.contextmanager
def _scratch(workdir: epath.PathLike) -> Iterator[epath.Path]:
  """A folder that is gone afterwards, where all processes find it: near the workdir."""
  near = next((folder for folder in epath.Path(workdir).parents if folder.exists()), epath.Path())
  folder = epath.Path(processes.all_gather_objects(str(near / f'.dry-run-{uuid.uuid4().hex[:8]}'))[0])
  try:
    yield folder
    processes.barrier('dry run')
  finally:
    if jax.process_index() == 0 and folder.exists():
      folder.rmtree()


def _first_batch(run: Run, report: Callable[[str], None]) -> dict[str, np.ndarray]:
  """Reads one batch in the way of the run, and two of its examples in a way to look at."""
  started = time.perf_counter()
  with contextlib.closing(read_batches(run, 0)) as batches:
    batch = {name: np.array(value) for name, value in next(batches).items()}
  found = batch.pop('bad_records').sum(0)
  replaced = ', '.join(f'{cause} {n}' for cause, n in zip(bad_records.CAUSES, found) if n) or 'none'
  shapes = ', '.join(f'{name} {value.dtype} {list(value.shape)}' for name, value in batch.items())
  report(f'batch      {shapes} of this host after {time.perf_counter() - started:.1f} s; records replaced: {replaced}')
  examples = pipeline.build_examples(run.config, run.source, run.tokenizer, first_batch=0)
  for number in range(2):
    example = examples.load(number)
    report(f'example    {examples.texts(example.caption, example.position)}')
  return batch


def _text_line(run: Run, tokens: np.ndarray) -> str:
  """What this host's texts [B, T, L] of a batch need of `text_budget`."""
  eos_id, budget = run.model.text.eos_id, run.config.text_budget
  of_a_device = run.config.batch_size // sharding.data_parallel_size(run.mesh)
  groups = run.config.grad_accum_steps * len(tokens) // of_a_device
  load = text_packing.text_load(tokens, eos_id=eos_id, budget=budget, groups=groups)
  needed = text_packing.needed_budget(tokens, eos_id=eos_id, groups=groups)
  verdict = (
    'pads them'
    if not budget
    else 'holds them'
    if not load.turns
    else f'does not hold them: {load.turns} turns of a loop compute the rest'
  )
  return (
    f'texts      {load.tokens / len(tokens):.1f} tokens an image on average; text_budget={budget} {verdict}; '
    f'text_budget={needed} would do for this batch'
  )


def _data_lines(run: Run) -> list[str]:
  """What the data are, set by set."""
  config, lines = run.config, []
  for part in run.source.sets if config.data.source != 'scenes' else ():
    expected = config.data.sets[part.name].expected if 'sets' in config.data else 0
    lines.append(f'data       {part.describe(expected)}')
  pairs = config.total_steps * config.batch_size
  epochs = f'{pairs / len(run.source):.3g} epochs of ' if config.data.source != 'scenes' else ''
  lines.append(
    f'data       {config.total_steps:,} steps of {config.batch_size:,} pairs: {epochs}{run.source.describe_size()}; '
    f'fingerprint {run.source.metadata()["fingerprint"]}'
  )
  origin = 'of the config' if config.tokenizer.path else f'tried on {_CAPTIONS:,} captions at most'
  return [*lines, f'tokenizer  {type(run.tokenizer).__name__}, {run.tokenizer.vocab_size:,} pieces, {origin}']


def _model_lines(run: Run, batch: dict[str, np.ndarray], memory: Memory) -> list[str]:
  """Parameters, mesh and memory."""
  state = train_state.abstract_state(run.model, run.tx, run.text_shape, run.mesh)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  data = run.config.data
  waiting = 2 * (data.prefetch_batches + max(data.num_workers, 1)) * sum(value.nbytes for value in batch.values())
  mib = lambda size: f'{size / 2**20:,.1f} MiB'
  limit = 'unknown' if memory.limit is None else mib(memory.limit)
  return [
    f'model      {parameters:,} parameters on {dict(run.mesh.shape)} x {run.mesh.devices.flat[0].device_kind}',
    f'memory     of a device: state {mib(memory.state)}, batch {mib(memory.batch)}, temporaries of a step '
    f'{mib(memory.temporaries)}: {mib(memory.together)} of {limit}',
    f'memory     of this host: up to {mib(waiting)} of batches that wait',
  ]


def _bytes(tree: object) -> int:
  """What abstract arrays take of one device."""
  size = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return sum(map(size, jax.tree.leaves(tree)))
