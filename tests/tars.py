"""Makes webdataset tars for tests."""

from collections.abc import Iterable, Mapping
import io
import pathlib
import tarfile

import ml_collections
import numpy as np
from PIL import Image

from groupvit_jax.data import augment, bad_records, pipeline
from groupvit_jax.data.mixture import Mixture
from groupvit_jax.data.tokenizer import Tokenizer

AUGMENT = augment.Augment((16, 16), (0.5, 1.0), (3 / 4, 4 / 3), 0.5, None, min_side=8, max_pixels=10_000)


def encode(number: int, size: tuple[int, int] = (40, 32), kind: str = 'JPEG') -> bytes:
  """A picture, (width, height), of a colour that tells its number."""
  buffer = io.BytesIO()
  colour = (37 * number % 256, 101 * number % 256, 200)
  pixels = np.broadcast_to(np.uint8(colour), (size[1], size[0], 3))
  Image.fromarray(pixels).save(buffer, kind)
  return buffer.getvalue()


def write_tar(
  path: pathlib.Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT
) -> str:
  """Writes files into a tar in the order given; returns its path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w', format=tar_format) as tar:
    for name, data in members.items() if isinstance(members, Mapping) else members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return str(path)


def samples(numbers: Iterable[int]) -> dict[str, bytes]:
  """Members as img2dataset writes them: picture, JSON and caption 'a dog number N' of each number."""
  members = {}
  for n in numbers:
    members |= {
      f'{n:05}.jpg': encode(n),
      f'{n:05}.json': b'{"caption": "json %d"}' % n,
      f'{n:05}.txt': b'a dog number %d' % n,
    }
  return members


def write_set(folder: pathlib.Path, count: int, per_shard: int = 8) -> str:
  """Writes `count` samples into shards; returns their pattern."""
  starts = range(0, count, per_shard)
  for shard, start in enumerate(starts):
    write_tar(folder / f'{shard:04}.tar', samples(range(start, min(start + per_shard, count))))
  return f'{folder}/{{0000..{len(starts) - 1:04}}}.tar'


def set_config(path: str, **changes: object) -> dict[str, object]:
  """The description of a webdataset set in a config."""
  return dict(format='webdataset', path=path, caption='txt', weight=0.0, expected=0) | changes


def data_config(**sets: dict[str, object]) -> ml_collections.ConfigDict:
  """A config's `data` part over some sets, for pictures of 16 x 16."""
  return ml_collections.ConfigDict(
    dict(
      source='sets',
      sets=sets,
      index_dir='',
      clean_captions=False,
      num_prompts=1,
      max_fault_share=0.5,
      augment=dict(name='plain', area=(0.5, 1.0), ratio=(0.75, 4 / 3), flip=0.5),
      num_threads=0,
      num_workers=0,
      prefetch_batches=2,
    )
  )


class Words(Tokenizer):
  """Ids of the words that are numbers, for telling captions apart."""

  vocab_size, bos_id, eos_id, pad_id = 10_000, None, 1, 0

  def __init__(self):
    super().__init__({})

  def _text_ids(self, text: str) -> list[int]:
    return [2 + int(word) for word in text.split() if word.isdigit()]


def make_examples(source: Mixture, augment: augment.Augment | None = AUGMENT, **changes: object) -> pipeline.Examples:
  """The examples of a run of four batches of 16."""
  fields = dict(seed=0, batch_size=16, num_prompts=1, text_length=4, first_batch=0, num_batches=4)
  fields |= changes
  return pipeline.Examples(source, augment, Words(), **({'rows': range(fields['batch_size'])} | fields))


def bad_record_counts(rows: np.ndarray) -> dict[str, int]:
  """Bad records of a batch [b, causes] by cause, without zeros."""
  return {cause: int(n) for cause, n in zip(bad_records.CAUSES, rows.sum(0), strict=True) if n}
