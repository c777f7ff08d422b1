"""TFDS builders of segmentation data sets: images and label maps unchanged, in one split 'validation'.

Labels are mapped to a benchmark's classes when they are read, so VOC20, Context59 and COCO-Object need no copy.
Those of more than 255 classes have 16 bits.
"""

from collections.abc import Callable, Iterator
import io

from etils import epath
import tensorflow_datasets as tfds

from groupvit_jax.data.images import read_image
from groupvit_jax.errors import UserError
from groupvit_jax.eval.benchmarks import find_benchmark
from groupvit_jax.eval.labelled import decode_label, SPLIT, STORED_IN
from groupvit_jax.model.metrics import label_dtype
from groupvit_jax.prepare import segmentation_layouts


class _SegmentationSet(tfds.core.GeneratorBasedBuilder):
  """Labelled images of one split: 'image' and 'label' are files, 'key' is the image's name."""

  VERSION = tfds.core.Version('1.0.0')
  MANUAL_DOWNLOAD_INSTRUCTIONS = 'Unpack the official archives in --manual_dir.'
  url_infos = {}  # nothing is downloaded: TFDS need not look for checksums beside this file
  find_files: Callable[[epath.PathLike], list[segmentation_layouts.LabelledFile]]

  def _info(self) -> tfds.core.DatasetInfo:
    classes = max(find_benchmark(name).num_classes for name, stored in STORED_IN.items() if stored == self.name)
    features = tfds.features.FeaturesDict(
      {
        'image': tfds.features.Image(),
        'label': tfds.features.Image(shape=(None, None, 1), dtype=label_dtype(classes), encoding_format='png'),
        'key': tfds.features.Text(),
      }
    )
    return tfds.core.DatasetInfo(builder=self, description=self.find_files.__doc__, features=features)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
    return {SPLIT: self._generate_examples(self.find_files(dl_manager.manual_dir))}

  def _generate_examples(
    self, files: list[segmentation_layouts.LabelledFile]
  ) -> Iterator[tuple[str, dict[str, object]]]:
    for file in files:
      image, label = file.image.read_bytes(), file.read_label()
      height, width = read_image(image, str(file.image)).shape[:2]
      found = decode_label(label, f'the label map of {file.image}').shape
      if found != (height, width):
        raise UserError(
          f'{file.image} is {height} x {width} px, its label map {found[0]} x {found[1]}; '
          'unpack the official archives again'
        )
      yield file.key, {'image': io.BytesIO(image), 'label': io.BytesIO(label), 'key': file.key}


def make_builder(name: str, data_dir: epath.PathLike) -> tfds.core.DatasetBuilder:
  """The builder of a set, in ArrayRecord files, whose layout is the function of its name."""
  layout = getattr(segmentation_layouts, name)
  fields = {'name': name, 'find_files': staticmethod(layout)}
  builder = type(name, (_SegmentationSet,), fields, skip_registration=True)
  return builder(data_dir=str(data_dir), file_format='array_record')
