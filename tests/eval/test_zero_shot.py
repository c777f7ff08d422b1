"""ImageNet zero-shot: crops, hits, tars and TFDS directories."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds

from groupvit_jax.commands import score
from groupvit_jax.commands.score import Request
from groupvit_jax.eval import class_names, labelled, zero_shot
from groupvit_jax.running import sharding
from tests import photos
from tests.tars import write_tar
from tests.tiny import Letters, tiny_model
from tests.trained import trained_workdir

NAMES = ('cat', 'dog', 'cow', 'the', 'a', 'of', 'photo')


def picture(number):
  sizes = ((40, 30), (16, 16), (31, 77), (120, 64))
  return photos.photo(*sizes[number % 4], seed=number)


class Pictures:
  """Eleven pictures of seven classes."""

  def __len__(self):
    return 11

  def __getitem__(self, i):
    return {'image': picture(i), 'label': i % 7, 'key': str(i)}


def test_top1_and_top5_are_those_of_a_plain_loop():
  model = tiny_model()
  variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.full((1, 1, 6), 2))
  encode = jax.jit(lambda x: model.apply(variables, x, method='encode_image').embeds[0])
  mesh = sharding.make_mesh()
  build = lambda mesh, size: zero_shot.ZeroShotEvaluator(
    model, Letters(), mesh, Pictures(), NAMES, 'simple', size, num_threads=2
  )
  found = build(mesh, 8).evaluate(jax.device_put(variables, sharding.replicated(mesh)))
  texts = class_names.embed_classes(model, variables, Letters(), NAMES, 'simple')
  top1 = top5 = 0
  for i in range(11):
    pixels = zero_shot.crop_image(picture(i), (16, 16))
    pixels = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    embed = np.asarray(encode(jnp.asarray(pixels[None], jnp.float32)))
    order = np.argsort(-(texts @ embed))
    top1 += order[0] == i % 7
    top5 += i % 7 in order[:5]
  assert (found.top1, found.top5) == (top1 / 11, top5 / 11) and 0 < top5 < 11
  before = zero_shot.count_hits._cache_size()
  build(mesh, 8).evaluate(jax.device_put(variables, sharding.replicated(mesh)))
  assert zero_shot.count_hits._cache_size() == before  # another evaluation compiles nothing


def test_the_crop_is_the_middle_at_seven_eighths():
  image = np.zeros((512, 1024, 3), np.uint8)
  image[:, 512 - 224 : 512 + 224] = 200  # what a crop of 224 out of 256 sees of it
  crop = zero_shot.crop_image(image, (224, 224))
  assert crop.shape == (224, 224, 3) and (crop[:, 2:-2] == 200).all()
  image = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
  crop = zero_shot.crop_image(image, (224, 224))
  want = np.asarray(Image.fromarray(image).resize((512, 256), Image.Resampling.BILINEAR))[16:240, 144:368]
  np.testing.assert_array_equal(crop, want)
  assert zero_shot.crop_image(image[:5, :3], (224, 224)).shape == (224, 224, 3)
  image = np.broadcast_to((np.arange(259) % 256).astype(np.uint8)[None, :, None], (256, 259, 3))
  crop = zero_shot.crop_image(np.ascontiguousarray(image), (224, 224))
  assert crop[0, 0, 0] == 18  # torchvision rounds 17.5, half of what is left, to the even number


def write_tars(folder):
  members = {}
  for n in range(5):
    members |= {f'{n:05}.jpg': photos.encode(picture(n)), f'{n:05}.cls': str(37 * n).encode()}
  return write_tar(folder / '000000.tar', members)


def test_tars_with_classes_through_the_command(own_cache, tmp_path, capsys):
  write_tars(tmp_path)
  request = Request(
    'imagenet',
    f'{tmp_path}/{{000000..000000}}.tar',
    output=str(tmp_path / 'out'),
    changes={'templates': 'simple'},
    num_pictures=4,
  )
  assert score.evaluate_benchmark(str(trained_workdir()), request) == 0
  report = json.loads((tmp_path / 'out' / 'results.json').read_text())
  assert report['num_images'] == 4 and report['num_classes'] == 1000 and report['complete']
  assert report['protocol'] == dict(
    name='imagenet', crop=[32, 32], short_side=37, resize='bilinear', templates='simple', class_names='clip'
  )
  assert 0 <= report['top1'] <= report['top5'] <= 1 and report['checkpoint']['step'] == 6
  table = capsys.readouterr().out
  assert 'top-1 43.7; other templates; here 4 of 50,000 images' in table
  assert 'imagenet, 4 of 50,000 images, 1000 classes' in table and 'weights trained' in table
  assert (tmp_path / 'out' / 'tensorboard').is_dir()


class Imagenet2012(tfds.core.GeneratorBasedBuilder):
  """Three pictures."""

  VERSION = tfds.core.Version('5.1.0')
  name = 'imagenet2012'
  url_infos, skip_registration = {}, True

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Image(encoding_format='jpeg'),
          'label': tfds.features.ClassLabel(num_classes=1000),
          'file_name': tfds.features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {'validation': self._generate_examples()}

  def _generate_examples(self):
    for n in range(3):
      yield n, {'image': io.BytesIO(photos.encode(picture(n))), 'label': 100 + n, 'file_name': f'{n}.JPEG'}


def test_a_tfds_directory(tmp_path):
  Imagenet2012(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  source = labelled.open_imagenet(str(tmp_path))
  assert sorted(source[i]['label'] for i in range(3)) == [100, 101, 102]
  assert source[0]['image'][:2] == b'\xff\xd8'  # not decoded


def test_mistakes(own_cache, tmp_path):
  with pytest.raises(ValueError, match='holds no .*imagenet2012 with a version'):
    labelled.open_imagenet(str(tmp_path))
  write_tar(tmp_path / 'bad.tar', {'0.jpg': photos.encode(picture(0)), '0.cls': b'tench'})
  with pytest.raises(ValueError, match="cls holds 'tench'; it must hold the class"):
    labelled.open_imagenet(str(tmp_path / 'bad.tar'))[0]
  for options in (dict(masks=True), dict(thresholds='0.5'), dict(changes={'stride': '8'}), dict(protocol='tcl')):
    with pytest.raises(ValueError, match='neither label maps nor windows'):
      score.evaluate_benchmark(str(trained_workdir()), Request('imagenet', str(tmp_path), **options))


def test_classes_are_those_of_clip():
  names = zero_shot.class_names()
  assert len(names) == 1000 and names[0] == 'tench' and names[999] == 'toilet paper'
