"""Makes ArrayRecord files of a data set in its official layout.

  python -m groupvit_jax.datasets.build voc2012 --manual_dir=FOLDER --data_dir=data

Segmentation, from the official archives unpacked in --manual_dir:
  voc2012          VOCdevkit/VOC2012                                                         (voc21, voc20)
  pascal_context   VOCdevkit/VOC2010 with trainval_merged.json in it                         (context60, context59)
  coco_stuff       val2017/*.jpg, stuffthingmaps/val2017/*.png or annotations/val2017/*.png  (coco_stuff, coco_object)
  ade20k           ADEChallengeData2016
  cityscapes_fine  leftImg8bit and gtFine

Image-text pairs, from downloads in --manual_dir, by --workers processes; the same command goes on where one ended:
  cc3m, cc12m      *.tar as img2dataset writes them, local or remote
  yfcc14m          **/*.zip with HASH.jpg, yfcc100m_dataset.sql, yfcc100m_subset_data.tsv
  redcaps12m       annotations/SUBREDDIT_YEAR.json, images/SUBREDDIT/IMAGE_ID.jpg
"""

import argparse
from collections.abc import Sequence
import importlib
import os
import sys

from etils import epath

from groupvit_jax import cli

# Data set -> module and class of its builder, imported when asked for.
BUILDERS = {
    'voc2012': ('segmentation_sets', 'Voc2012'),
    'pascal_context': ('segmentation_sets', 'PascalContext'),
    'coco_stuff': ('segmentation_sets', 'CocoStuff'),
    'ade20k': ('segmentation_sets', 'Ade20k'),
    'cityscapes_fine': ('segmentation_sets', 'CityscapesFine'),
}
CAPTION_SETS = ('cc3m', 'cc12m', 'yfcc14m', 'redcaps12m')


def build(name: str, manual_dir: epath.PathLike, data_dir: epath.PathLike) -> epath.Path:
  """Builds a data set, unless it is there already.

  Args:
    name: one of `BUILDERS`.
    manual_dir: where its archives were unpacked, local or in a bucket.
    data_dir: where TFDS data sets are kept, likewise.

  Returns:
    The folder of the data set's version.

  Raises:
    ValueError: there is no such folder, or it has another layout.
  """
  if not epath.Path(manual_dir).is_dir():
    raise ValueError(f'there is no folder --manual_dir={manual_dir}; unpack the official archives there')
  import tensorflow_datasets as tfds  # it takes a second to import
  module, builder_class = BUILDERS[name]
  module = importlib.import_module(f'groupvit_jax.datasets.{module}')
  builder = getattr(module, builder_class)(data_dir=str(data_dir), file_format='array_record')
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir)))
  return epath.Path(builder.data_dir)


def main(arguments: Sequence[str]) -> int:
  """Runs the command; see this module.

  Args:
    arguments: without the program's name.

  Returns:
    The exit code: 0, or 2 after one line on stderr that names the mistake.
  """
  parser = argparse.ArgumentParser(
      prog='python -m groupvit_jax.datasets.build', description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('name', choices=[*BUILDERS, *CAPTION_SETS])
  parser.add_argument('--manual_dir', required=True, help='the folder with the official archives, unpacked')
  parser.add_argument('--data_dir', required=True, help='where TFDS data sets are kept')
  parser.add_argument('--workers', type=int, default=os.cpu_count(), help='processes, for image-text pairs')
  args = parser.parse_args(arguments)
  try:
    if args.name in CAPTION_SETS:
      from groupvit_jax.datasets import caption_sets  # TFDS takes a second to import
      folder = caption_sets.build(args.name, args.manual_dir, args.data_dir, args.workers)
      print(f'{caption_sets.describe(args.name, folder)}; in {folder}')
      return 0
    print(f'{args.name} is in {build(args.name, args.manual_dir, args.data_dir)}')
  except (ValueError, OSError) as error:
    return cli.fail(str(error))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
