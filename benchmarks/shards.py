"""Webdataset tars of 512-px JPEGs, as img2dataset writes them: from photographs, or made up."""

from collections.abc import Iterator
import io
import itertools
import json
import pathlib
import tarfile

import cv2
import numpy as np

LONGER_SIDE, QUALITY = 512, 95
SHARDS, SAMPLES = 8, 256  # samples of a shard; all shards hold the same
MADE_UP = 64  # different pictures, where they are made up

_WORDS = (
  'a',
  'man',
  'with',
  'the',
  'small',
  'dog',
  'on',
  'red',
  'bicycle',
  'in',
  'front',
  'of',
  'old',
  'house',
  'people',
  'walking',
  'street',
  'city',
  'sitting',
  'table',
  'and',
  'view',
)


def write_shards(folder: pathlib.Path, photos: str) -> str:
  """Writes the tars unless they are there; returns their pattern.

  Args:
    folder: where to.
    photos: a folder of JPEGs, perhaps with `captions.json`, {file name without ending: captions},
      beside or in it; '' to make pictures up: noise with as much detail at every scale as
      photographs have.
  """
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f'{shard:04}.tar' for shard in range(SHARDS)]
  if not all(path.exists() for path in paths):
    pictures = itertools.cycle(_photographs(pathlib.Path(photos)) if photos else _made_up())
    samples = list(itertools.islice(pictures, SAMPLES))
    for shard, path in enumerate(paths):
      path.write_bytes(_tar([(f'{shard:04}{i:05}', *sample) for i, sample in enumerate(samples)]))
  return f'{folder}/{{0000..{SHARDS - 1:04}}}.tar'


def captions(folder: pathlib.Path) -> list[str]:
  """The captions in the first tar."""
  with tarfile.open(folder / '0000.tar') as tar:
    texts = [member for member in tar if member.name.endswith('.txt')]
    return [tar.extractfile(text).read().decode() for text in texts]


def _photographs(folder: pathlib.Path) -> Iterator[tuple[bytes, str]]:
  files = [path for path in (folder, folder.parent) if (path / 'captions.json').exists()]
  known = json.loads((files[0] / 'captions.json').read_text()) if files else {}
  rng = np.random.default_rng(0)
  for number, path in enumerate(sorted(folder.glob('*.jpg'))[:SAMPLES]):
    pixels = cv2.imread(str(path))
    scale = LONGER_SIDE / max(pixels.shape)
    pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    texts = known.get(path.stem) or [_sentence(rng)]
    yield _jpeg(pixels), texts[number % len(texts)]


def _made_up() -> Iterator[tuple[bytes, str]]:
  rng = np.random.default_rng(0)
  for _ in range(MADE_UP):
    height, width = rng.permutation([LONGER_SIDE, LONGER_SIDE * 3 // 4])
    pixels, scale = np.zeros((height, width, 3), np.float32), 1
    while scale < 2 * LONGER_SIDE:
      noise = rng.standard_normal((height // scale + 2, width // scale + 2, 3), np.float32)
      pixels += scale**0.3 * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
      scale *= 2
    yield _jpeg(np.uint8(np.clip(128 + 4 * pixels, 0, 255))), _sentence(rng)


def _sentence(rng: np.random.Generator) -> str:
  return ' '.join(rng.choice(_WORDS, rng.integers(6, 16)))


def _jpeg(pixels: np.ndarray) -> bytes:
  return cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


def _tar(samples: list[tuple[str, bytes, str]]) -> bytes:
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode='w') as tar:
    for key, picture, caption in samples:
      for ending, data in (('jpg', picture), ('txt', caption.encode())):
        member = tarfile.TarInfo(f'{key}.{ending}')
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
  return buffer.getvalue()
