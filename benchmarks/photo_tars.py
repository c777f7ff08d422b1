"""Tars of captioned photographs as img2dataset writes them, to try a config on:

  python -m benchmarks.photo_tars --photos=FOLDER --captions=captions.json --output=OUT --sets=cc3m,cc12m

`captions.json` maps a file's name without its ending to its captions. Each pair of a photograph and a caption is a
sample; the sets take them in turns.
"""

import argparse
import io
import json
import pathlib
import tarfile

from PIL import Image

from groupvit_jax.data.images import read_image

LONGEST_SIDE, QUALITY = 512, 95  # img2dataset's --resize_mode=keep_ratio_largest --image_size=512


def encode(path: pathlib.Path) -> tuple[bytes, tuple[int, int]]:
  """A photograph, made smaller where it is larger, as JPEG; and its width and height."""
  picture = Image.fromarray(read_image(path, path.name))
  picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
  buffer = io.BytesIO()
  picture.save(buffer, 'JPEG', quality=QUALITY)
  return buffer.getvalue(), picture.size


def write_tars(
  photos: pathlib.Path, captions: dict[str, list[str]], folders: list[pathlib.Path], per_shard: int
) -> list[int]:
  """Writes the pairs into `00000.tar`, `00001.tar`, ... of several folders in turns.

  Args:
    photos: a folder of pictures.
    captions: of each picture, by its name without ending.
    folders: made if they are not there.
    per_shard: samples of a tar.

  Returns:
    How many samples each folder got.

  Raises:
    ValueError: no picture has a caption.
  """
  files = [path for path in sorted(photos.iterdir()) if captions.get(path.stem)]
  if not files:
    raise ValueError(f'no picture in {photos} has a caption')
  counts = [0] * len(folders)
  number = 0
  for path in files:
    picture, (width, height) = encode(path)
    for caption in captions[path.stem]:
      turn = number % len(folders)
      facts = {
        'caption': caption,
        'url': path.name,
        'key': f'{number:09}',
        'status': 'success',
        'width': width,
        'height': height,
      }
      shard = folders[turn] / f'{counts[turn] // per_shard:05}.tar'
      shard.parent.mkdir(parents=True, exist_ok=True)
      with tarfile.open(shard, 'a' if counts[turn] % per_shard else 'w') as tar:
        for ending, data in (('jpg', picture), ('json', json.dumps(facts).encode()), ('txt', caption.encode())):
          member = tarfile.TarInfo(f'{facts["key"]}.{ending}')
          member.size = len(data)
          tar.addfile(member, io.BytesIO(data))
      counts[turn] += 1
      number += 1
  return counts


def main() -> None:
  """Writes and says what."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument('--photos', type=pathlib.Path, required=True)
  parser.add_argument('--captions', type=pathlib.Path, required=True)
  parser.add_argument('--output', type=pathlib.Path, required=True)
  parser.add_argument('--sets', default='photos', help='names of folders in --output, with commas')
  parser.add_argument('--per_shard', type=int, default=100, help='samples of a tar')
  flags = parser.parse_args()
  folders = [flags.output / name for name in flags.sets.split(',')]
  counts = write_tars(flags.photos, json.loads(flags.captions.read_text()), folders, flags.per_shard)
  for folder, count in zip(folders, counts):
    print(f'{folder}: {count} samples in {len(list(folder.glob("*.tar")))} tars')


if __name__ == '__main__':
  main()
