"""Tars of captioned 512-pixel JPEGs, as img2dataset writes them: from photographs, or made up."""

from collections.abc import Iterator, Sequence
import io
import itertools
import json
import pathlib
import tarfile

import cv2
import numpy as np

LONGER_SIDE, QUALITY = 512, 95  # img2dataset's --resize_mode=keep_ratio_largest --image_size=512
SHARDS, SAMPLES = 8, 256  # samples of a shard; all shards hold the same
MADE_UP = 64  # different images, where they are made up
_WORDS = (
  'a man with the small dog on red bicycle in front of old house people walking street city sitting table and view'
).split()


def write_shards(folder: pathlib.Path, photos: str) -> str:
  """Writes the tars unless they are there; returns their pattern.

  Args:
    folder: to write.
    photos: a folder of JPEGs, with `captions.json`, {file name without ending: captions}, beside or in it, or without;
      '' for made-up images: noise with as much detail at every scale as photographs have.
  """
  folder.mkdir(parents=True, exist_ok=True)
  paths = [folder / f'{shard:04}.tar' for shard in range(SHARDS)]
  if not all(path.exists() for path in paths):
    samples = itertools.cycle(_photographs(pathlib.Path(photos)) if photos else _made_up())
    samples = list(itertools.islice(samples, SAMPLES))
    for shard, path in enumerate(paths):
      with tarfile.open(path, 'w') as tar:
        for i, (jpeg, caption) in enumerate(samples):
          add_sample(tar, f'{shard:04}{i:05}', jpg=jpeg, txt=caption.encode())
  return f'{folder}/{{0000..{SHARDS - 1:04}}}.tar'


def add_sample(tar: tarfile.TarFile, key: str, **files: bytes) -> None:
  """Adds files of one key, by their endings."""
  for ending, data in files.items():
    member = tarfile.TarInfo(f'{key}.{ending}')
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def read_captions(folder: pathlib.Path) -> list[str]:
  """The captions in the first tar."""
  with tarfile.open(folder / '0000.tar') as tar:
    return [tar.extractfile(member).read().decode() for member in tar if member.name.endswith('.txt')]


def resized_jpeg(pixels: np.ndarray) -> tuple[bytes, tuple[int, int]]:
  """An image uint8 [H, W, 3], made smaller where it is larger, as a JPEG; and its width and height."""
  scale = min(LONGER_SIDE / max(pixels.shape[:2]), 1)
  size = [max(round(scale * side), 1) for side in reversed(pixels.shape[:2])]
  pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
  data = cv2.imencode('.jpg', cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
  return data.tobytes(), tuple(size)


def noise(rng: np.random.Generator, height: int, width: int, scales: Sequence[int], power: float) -> np.ndarray:
  """An image float32 [H, W, 3] with detail at every scale."""
  pixels = np.zeros((height, width, 3), np.float32)
  for scale in scales:
    coarse = rng.standard_normal((height // scale + 2, width // scale + 2, 3), np.float32)
    pixels += scale**power * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
  return pixels


def _photographs(folder: pathlib.Path) -> Iterator[tuple[bytes, str]]:
  files = [path for path in (folder, folder.parent) if (path / 'captions.json').exists()]
  known = json.loads((files[0] / 'captions.json').read_text()) if files else {}
  rng = np.random.default_rng(0)
  for number, path in enumerate(sorted(folder.glob('*.jpg'))[:SAMPLES]):
    captions = known.get(path.stem) or [_sentence(rng)]
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    yield resized_jpeg(pixels)[0], captions[number % len(captions)]


def _made_up() -> Iterator[tuple[bytes, str]]:
  rng = np.random.default_rng(0)
  for _ in range(MADE_UP):
    height, width = rng.permutation([LONGER_SIDE, LONGER_SIDE * 3 // 4])
    pixels = noise(rng, height, width, [2**i for i in range(10)], 0.3)
    yield resized_jpeg(np.uint8(np.clip(128 + 4 * pixels, 0, 255)))[0], _sentence(rng)


def _sentence(rng: np.random.Generator) -> str:
  return ' '.join(rng.choice(_WORDS, rng.integers(6, 16)))
