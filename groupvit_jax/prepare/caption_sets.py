"""TFDS data sets of image-text pairs: encoded images unchanged, one ArrayRecord file for each input file.

Any number of processes write at once, each a file at a time. Finished files stay: after an interruption the same
command resumes. The metadata that make the folder a data set are written last.
"""

import collections
from collections.abc import Mapping
import concurrent.futures
import concurrent.futures.process
import json
import multiprocessing
import os
import pathlib
import shutil
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter
import tensorflow_datasets as tfds
import tqdm

from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.errors import ResourceError, UserError
from groupvit_jax.prepare import caption_layouts
from groupvit_jax.prepare.caption_layouts import Layout, Part, Record
from groupvit_jax.storage import is_local, write_atomic

VERSION, SPLIT = '1.0.0', 'train'
_TEXTS = ('caption', 'key')
_CONCEPTUAL = 'https://github.com/google-research-datasets/'


class CaptionSet(NamedTuple):
  """A set of image-text pairs."""

  layout: Layout
  expected: int  # records, as the paper has them
  texts: tuple[str, ...]  # features besides the image
  homepage: str


SETS = {
  'cc3m': CaptionSet(caption_layouts.tars, 2_891_445, _TEXTS, f'{_CONCEPTUAL}conceptual-captions'),
  'cc12m': CaptionSet(caption_layouts.tars, 11_156_203, _TEXTS, f'{_CONCEPTUAL}conceptual-12m'),
  'yfcc14m': CaptionSet(
    caption_layouts.yfcc14m,
    14_615_499,
    (*_TEXTS, 'title', 'description'),
    'https://github.com/openai/CLIP/blob/main/data/yfcc100m.md',
  ),
  'redcaps12m': CaptionSet(caption_layouts.redcaps12m, 11_866_987, _TEXTS, 'https://redcaps.xyz'),
}


def build(name: str, manual_dir: str, data_dir: str, workers: int) -> pathlib.Path:
  """Builds a set from its download (see `caption_layouts`), or the files of it that are missing; returns its folder.

  `workers` are processes; 0 uses this one alone.
  """
  if not is_local(data_dir):
    raise UserError(f'--data_dir={data_dir} is remote; build on a disk, then copy the folder')
  described = SETS[name]
  folder = pathlib.Path(data_dir).expanduser() / name / VERSION
  if (folder / 'dataset_info.json').exists():
    return folder
  folder.mkdir(parents=True, exist_ok=True)
  parts = described.layout(manual_dir, folder)
  _check_inputs(folder, parts)
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder, dataset_name=name, split=SPLIT, filetype_suffix='array_record'
  )
  jobs = [
    (part, str(template.sharded_filepath(shard_index=n, num_shards=len(parts))), described.texts)
    for n, part in enumerate(parts)
  ]
  reports = _in_processes(jobs, workers, name)
  _finish(folder, name, template, reports)
  return folder


def describe(name: str, folder: pathlib.Path) -> str:
  """A line about the contents of a built set."""
  report = json.loads((folder / 'build.json').read_text())
  left_out = ', '.join(f'{cause} {n:,}' for cause, n in report['left_out'].items()) or 'none'
  return (
    f'{name}: {report["records"]:,} records (the paper: {SETS[name].expected:,}) in {report["files"]:,} files, '
    f'{report["bytes"] / 1e9:,.2f} GB; left out: {left_out}'
  )


def write_part(part: Part, path: str, texts: tuple[str, ...]) -> dict[str, object]:
  """Writes a file, unless it exists; returns its records, its bytes, and what was left out by cause."""
  done = pathlib.Path(f'{path}.json')
  if done.exists():
    return json.loads(done.read_text())
  features, partial = _features(texts), f'{path}.partial'
  left_out, records = collections.Counter(), 0
  writer = ArrayRecordWriter(partial, 'group_size:1')  # one record a read: they are read in any order
  try:
    for record in part.read():
      cause = record.cause if isinstance(record, BadRecord) else _cause(record)
      if cause:
        left_out[cause] += 1
        continue
      writer.write(features.serialize_example(record))
      records += 1
  finally:
    writer.close()
  os.replace(partial, path)
  report = {'records': records, 'bytes': os.path.getsize(path), 'left_out': dict(left_out)}
  write_atomic(str(done), json.dumps(report).encode())
  return report


def _cause(record: Record) -> str:
  """Why a record cannot be used, as far as that shows without decoding its image; '' if it can."""
  if not record['image']:
    return 'image_missing'
  return '' if record['caption'].strip() else 'caption_empty'


def _features(texts: tuple[str, ...]) -> tfds.features.FeaturesDict:
  return tfds.features.FeaturesDict({'image': tfds.features.Image()} | {text: tfds.features.Text() for text in texts})


def _in_processes(jobs: list[tuple], workers: int, name: str) -> list[Mapping[str, object]]:
  """Writes all parts; the first error ends it, and leaves what is finished."""
  if not workers:
    with tqdm.tqdm(jobs, name, unit='file') as bar:
      return [write_part(*job) for job in bar]
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
    futures = [pool.submit(write_part, *job) for job in jobs]
    try:
      with tqdm.tqdm(concurrent.futures.as_completed(futures), name, len(futures), unit='file') as bar:
        for future in bar:
          future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise ResourceError(
        'a process died (killed, or out of memory?); the same command goes on, perhaps with fewer --workers'
      ) from error
    except BaseException:
      pool.shutdown(wait=False, cancel_futures=True)
      raise
    return [future.result() for future in futures]


def _check_inputs(folder: pathlib.Path, parts: list[Part]) -> None:
  """Records the input files of a build, or raises UserError where it was begun with others."""
  path = folder / 'inputs.json'
  inputs = [[part.name, part.size] for part in parts]
  if not path.exists():
    write_atomic(str(path), json.dumps(inputs).encode())
  elif json.loads(path.read_text()) != inputs:
    raise UserError(f'{folder} was begun from other files; bring those back, or delete the folder')


def _finish(
  folder: pathlib.Path, name: str, template: tfds.core.ShardedFileTemplate, reports: list[Mapping[str, object]]
) -> None:
  """Writes the metadata, and deletes what only the build needed."""
  lengths = [report['records'] for report in reports]
  if not any(lengths):
    raise UserError(f'{name}: none of the {len(lengths)} input files holds a usable record; see {folder}')
  left_out = sum((collections.Counter(report['left_out']) for report in reports), collections.Counter())
  size = sum(report['bytes'] for report in reports)
  summary = {'records': sum(lengths), 'files': len(lengths), 'bytes': size, 'left_out': dict(left_out)}
  write_atomic(str(folder / 'build.json'), json.dumps(summary, indent=2).encode())
  split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=_features(SETS[name].texts),
    split_infos=[split],
    version=VERSION,
    filename_template=template,
    check_data=False,
    homepage=SETS[name].homepage,
  )
  shutil.rmtree(folder / caption_layouts.SCRATCH, ignore_errors=True)
  for path in folder.glob('*.array_record-*.json'):
    path.unlink()
