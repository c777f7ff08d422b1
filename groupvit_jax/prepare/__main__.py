"""Converts a data set in its official layout to ArrayRecord files.

  python -m groupvit_jax.prepare voc2012 --manual_dir=FOLDER --data_dir=data

Segmentation, from the official archives unpacked in --manual_dir:
  voc2012             VOCdevkit/VOC2012                                                       (voc21, voc20)
  pascal_context      VOCdevkit/VOC2010 with trainval_merged.json in it                       (context60, context59)
  pascal_context_459  VOCdevkit/VOC2010 with trainval/*.mat in it                             (context459)
  coco_stuff          val2017/*.jpg, stuffthingmaps/val2017/*.png or annotations/val2017/*.png (coco_stuff, coco_object)
  ade20k              ADEChallengeData2016
  ade20k_full         ADE20K_2021_17_01                                                       (ade20k_847)
  cityscapes_fine     leftImg8bit and gtFine

Image-text pairs, from downloads in --manual_dir, by --workers processes; the same command resumes:
  cc3m, cc12m      *.tar as img2dataset writes them, local or remote
  yfcc14m          **/*.zip with HASH.jpg, yfcc100m_dataset.sql, yfcc100m_subset_data.tsv
  redcaps12m       annotations/SUBREDDIT_YEAR.json, images/SUBREDDIT/IMAGE_ID.jpg
"""

import argparse
from collections.abc import Sequence
import os
import sys

from etils import epath

from groupvit_jax import cli
from groupvit_jax.data.tfds import newest_version, open_records
from groupvit_jax.errors import UserError
from groupvit_jax.storage import is_local

SEGMENTATION_SETS = (
  'voc2012',
  'pascal_context',
  'pascal_context_459',
  'coco_stuff',
  'ade20k',
  'ade20k_full',
  'cityscapes_fine',
)
CAPTION_SETS = ('cc3m', 'cc12m', 'yfcc14m', 'redcaps12m')


def build(name: str, manual_dir: epath.PathLike, data_dir: epath.PathLike) -> str:
  """Builds a data set from its archives, unpacked in `manual_dir`, unless it is there; returns a line about it."""
  for flag, folder in (('manual_dir', manual_dir), ('data_dir', data_dir)):
    if not is_local(str(folder)):
      raise UserError(f'--{flag}={folder} is remote; build from a disk onto a disk, then copy the folder')
  if (kept := newest_version(data_dir, name)) is not None:
    return (
      f'{_describe(name, kept)}; it was there before, and --manual_dir={manual_dir} was not looked at: to build '
      f'it again delete {kept}'
    )
  if not epath.Path(manual_dir).is_dir():
    raise UserError(f'there is no folder --manual_dir={manual_dir}; unpack the official archives there')
  if not any(epath.Path(manual_dir).iterdir()):
    raise UserError(f'--manual_dir={manual_dir} is empty; unpack the official archives there')
  import tensorflow_datasets as tfds  # it takes a second to import

  from groupvit_jax.prepare import segmentation_sets

  builder = segmentation_sets.make_builder(name, data_dir)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir)))
  return _describe(name, builder.data_dir)


def _describe(name: str, folder: epath.PathLike) -> str:
  """The number of images, the number expected, and the folder."""
  from groupvit_jax.eval import benchmarks, labelled

  found = len(open_records(folder, labelled.SPLIT, ('image', 'label')))
  benchmark = next(each for each, stored in labelled.STORED_IN.items() if stored == name)
  wanted = benchmarks.find_benchmark(benchmark).num_images
  line = f'{name}: {found:,} of {wanted:,} images, in {folder}'
  return line if found == wanted else f'{line}; published figures are about all {wanted:,}: is the download whole?'


def main(arguments: Sequence[str]) -> int:
  """Runs the command of some arguments; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m groupvit_jax.prepare', description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.error = lambda message: sys.exit(cli.fail(f'{message}; see --help'))
  parser.add_argument('name', choices=[*SEGMENTATION_SETS, *CAPTION_SETS])
  parser.add_argument('--manual_dir', required=True, help='the folder with the official archives, unpacked')
  parser.add_argument('--data_dir', required=True, help='where TFDS data sets are kept')
  parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes, for image-text pairs')
  args = parser.parse_args(arguments)
  try:
    if args.name in CAPTION_SETS:
      from groupvit_jax.prepare import caption_sets

      folder = caption_sets.build(args.name, args.manual_dir, args.data_dir, args.workers)
      print(f'{caption_sets.describe(args.name, folder)}; in {folder}')
      return 0
    print(build(args.name, args.manual_dir, args.data_dir))
  except (ValueError, OSError) as error:
    return cli.fail(error)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
