"""Pictures of ImageNet with their class: a prepared TFDS directory, or webdataset tars with `.cls` files."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

from etils import epath

from groupvit_jax.data import prepared
from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.data.webdataset import open_webdataset, WebDataset
from groupvit_jax.errors import UserError

_NAME, _SPLIT = 'imagenet2012', 'validation'


@dataclasses.dataclass(frozen=True)
class PreparedPictures:
  """Pictures of a prepared TFDS data set with the features 'image' and 'label'."""

  path: str

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': bytes, 'label': int, 'key': name}."""
    record = self._records[index]
    return {'image': record['image'], 'label': int(record['label']), 'key': f'{_SPLIT}[{index}]'}

  @functools.cached_property
  def _records(self) -> Sequence[dict[str, object]]:
    return prepared.open_records(self.path, _SPLIT, ('image',))


@dataclasses.dataclass(frozen=True)
class TarPictures:
  """Pictures of webdataset tars, the class of each in its `.cls` file."""

  tars: WebDataset

  def __len__(self) -> int:
    return len(self.tars)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """Returns {'image': bytes, 'label': int, 'key': name}."""
    try:
      record = self.tars[index]
      return {'image': record['image'], 'label': int(record['text']), 'key': record['key']}
    except BadRecord as fault:
      raise UserError(f'{fault.key}: {fault.cause}; a benchmark leaves no picture out, so fetch it again') from fault
    except ValueError as error:
      text = record['text'][:40]
      raise UserError(f'{record["key"]}.cls holds {text!r}; it must hold the class, 0 to 999') from error


def open_imagenet(data_dir: str) -> PreparedPictures | TarPictures:
  """ImageNet's validation pictures, with classes numbered in the order of their WordNet ids.

  Args:
    data_dir: where TFDS data sets are kept, one of which is `imagenet2012` in ArrayRecord files; or a pattern of tars.

  Raises:
    ValueError: there is neither, or it is not whole.
  """
  if data_dir.endswith('.tar'):
    return TarPictures(open_webdataset((data_dir,), 'cls', '', f'--data_dir={data_dir}'))
  newest = prepared.newest_version(data_dir, _NAME)
  if newest is None:
    raise UserError(
      f'--data_dir={data_dir} holds no {epath.Path(data_dir) / _NAME} with a version in it; prepare it '
      "with TFDS (file_format='array_record'), or name tars with .cls files: "
      '--data_dir=FOLDER/{000000..000063}.tar'
    )
  pictures = PreparedPictures(str(newest))
  len(pictures)  # what is damaged shows here, not in a thread
  return pictures
