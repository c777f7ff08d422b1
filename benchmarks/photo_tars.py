"""Tars of captioned photographs, to try a config on.

  python -m benchmarks photo_tars --photos=FOLDER --captions=captions.json --output=OUT --sets=cc3m,cc12m

`captions.json` maps a file's name without its ending to its captions. Each pair of a photograph and a caption is a
sample; the sets take them in turns.
"""

import argparse
import json
import pathlib
import tarfile

from benchmarks import tars
from groupvit_jax.data.images import read_image


def write_tars(
  photos: pathlib.Path, captions: dict[str, list[str]], folders: list[pathlib.Path], per_shard: int
) -> list[int]:
  """Writes the pairs into `00000.tar`, `00001.tar`, ... of several folders in turns.

  Args:
    photos: a folder of images.
    captions: of each image, by its name without ending.
    folders: created if they are not there.
    per_shard: samples of a tar.

  Returns:
    How many samples each folder got.

  Raises:
    ValueError: no image has a caption.
  """
  files = [path for path in sorted(photos.iterdir()) if captions.get(path.stem)]
  if not files:
    raise ValueError(f'no picture in {photos} has a caption')
  counts = [0] * len(folders)
  for path in files:
    jpeg, (width, height) = tars.resized_jpeg(read_image(path, path.name))
    for caption in captions[path.stem]:
      number = sum(counts)
      turn = number % len(folders)
      metadata = dict(caption=caption, url=path.name, key=f'{number:09}', status='success', width=width, height=height)
      shard = folders[turn] / f'{counts[turn] // per_shard:05}.tar'
      shard.parent.mkdir(parents=True, exist_ok=True)
      with tarfile.open(shard, 'a' if counts[turn] % per_shard else 'w') as tar:
        tars.add_sample(tar, f'{number:09}', jpg=jpeg, json=json.dumps(metadata).encode(), txt=caption.encode())
      counts[turn] += 1
  return counts


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--photos', type=pathlib.Path, required=True)
  parser.add_argument('--captions', type=pathlib.Path, required=True)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--sets', default='photos', help='names of folders in --output, with commas')
  parser.add_argument('--per_shard', type=int, default=100, help='samples of a tar')
  args = parser.parse_args()
  folders = [args.output / name for name in args.sets.split(',')]
  counts = write_tars(args.photos, json.loads(args.captions.read_text()), folders, args.per_shard)
  for folder, count in zip(folders, counts):
    print(f'{folder}: {count} samples in {len(list(folder.glob("*.tar")))} tars')
