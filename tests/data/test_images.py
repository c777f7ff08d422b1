"""Whatever people call a picture becomes 8-bit RGB, or one line that names it."""

import http.server
import io
import struct
import threading
import time
import zlib

import jax
import numpy as np
from PIL import Image
import pytest

from groupvit_jax.data import images
from groupvit_jax.data.bad_records import BadRecord
from tests.photos import decode, encode, photo, png_header

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = 'PNG', **options) -> bytes:
  data = io.BytesIO()
  (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(data, kind, **options)
  return data.getvalue()


def read(data: bytes) -> np.ndarray:
  pixels = images.read_image(data, 'a')
  assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
  return pixels


@pytest.mark.parametrize('kind', ['PNG', 'BMP', 'PPM', 'TIFF', 'TGA'])
def test_formats_without_loss_come_back_exactly(kind):
  assert np.array_equal(read(encoded(RGB, kind)), RGB)


def test_grey_and_black_and_white():
  grey = RGB[:, :, 0]
  assert np.array_equal(read(encoded(grey)), np.dstack([grey] * 3))
  bilevel = Image.fromarray(grey).convert('1', dither=Image.Dither.NONE)
  assert np.array_equal(read(encoded(bilevel))[:, :, 0], np.where(grey >= 128, 255, 0))


def test_alpha_lies_over_white():
  rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 51]]], np.uint8)
  assert read(encoded(rgba)).tolist() == [[[10, 20, 30], [255, 255, 255], [204, 224, 244]]]
  grey_alpha = Image.fromarray(rgba).convert('LA')
  assert read(encoded(grey_alpha))[0, 1].tolist() == [255, 255, 255]


def test_palettes_with_and_without_transparency():
  image = Image.fromarray(np.array([[0, 1]], np.uint8)).convert('P')
  image.putpalette([255, 0, 0, 0, 0, 255])
  assert read(encoded(image)).tolist() == [[[255, 0, 0], [0, 0, 255]]]
  assert read(encoded(image, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_sixteen_bits():
  deep = np.array([[0, 200, 257, 128 * 257, 65535]], np.uint16)
  assert read(encoded(deep))[0, :, 0].tolist() == [0, 1, 1, 128, 255]
  assert read(encoded(deep, 'TIFF'))[0, :, 0].tolist() == [0, 1, 1, 128, 255]
  # RGB of 16 bits, which Pillow cannot write: one pixel by hand.
  rows = b'\0' + struct.pack('>3H', 65535, 128 * 257, 257)
  chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  header = struct.pack('>IIBBBBB', 1, 1, 16, 2, 0, 0, 0)
  data = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows))
  assert read(data + chunk(b'IEND', b'')).tolist() == [[[255, 128, 1]]]


def test_floats_from_zero_to_one():
  image = Image.fromarray(np.array([[0, 0.2, 1]], np.float32))
  assert read(encoded(image, 'TIFF'))[0, :, 0].tolist() == [0, 51, 255]
  wild = Image.fromarray(np.array([[-1, 7]], np.float32))
  with pytest.raises(ValueError, match="image 'a' is damaged .its values go from -1 to 7"):
    read(encoded(wild, 'TIFF'))


def test_cmyk_jpeg():
  red = Image.new('RGB', (16, 16), (200, 30, 40))
  got = read(encoded(red.convert('CMYK'), 'JPEG', quality=95))
  np.testing.assert_allclose(got.reshape(-1, 3).mean(axis=0), (200, 30, 40), atol=6)


def test_exif_turns_the_picture():
  exif = Image.Exif()
  exif[0x0112] = 6  # the camera was turned: rotate clockwise to see it upright
  image = Image.fromarray(RGB)
  assert np.array_equal(read(encoded(image, exif=exif)), np.rot90(RGB, -1))
  assert read(encoded(image, 'JPEG', exif=exif)).shape == (7, 5, 3)


def test_a_damaged_exif_block_is_no_reason_to_refuse_the_pixels():
  exif = b'Exif\0\0not the header of EXIF'
  assert np.array_equal(read(encoded(RGB, exif=exif)), RGB)


@pytest.mark.parametrize('kind', ['GIF', 'PNG', 'WEBP'])
def test_animations_show_their_first_frame(kind):
  frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'blue')]
  data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
  assert read(data)[0, 0].tolist() == [255, 0, 0]


def test_arrays_images_files_and_paths(tmp_path):
  path = tmp_path / 'a.png'
  path.write_bytes(encoded(RGB))
  with path.open('rb') as file:
    for picture in (path, str(path), Image.fromarray(RGB), RGB, jax.numpy.asarray(RGB), encoded(RGB), file):
      assert images.is_one_image(picture)
      assert np.array_equal(images.read_image(picture, 'a'), RGB)
  assert not images.is_one_image([RGB])
  assert images.read_image(RGB, 'a') is RGB
  assert images.read_image(RGB[:, :, 0], 'a').shape == (5, 7, 3)
  assert images.read_image(np.ones((2, 2), bool), 'a').max() == 255


@pytest.mark.parametrize(
  'picture, message',
  [
    (b'', "image 'a' is empty"),
    (b'not a picture', "image 'a' has no format that can be read"),
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'has no format that can be read'),
    (encoded(RGB)[:70], "image 'a' is damaged"),
    (encoded(RGB.repeat(9, axis=0), 'JPEG')[:-200], "image 'a' is damaged"),
    ('/nowhere/a.png', 'there is no image /nowhere/a.png'),
    ('/', "image 'a' cannot be read: Is a directory"),
    (np.zeros((4, 4, 3)), 'is float64; make it uint8'),
    (np.zeros((4, 4, 2), np.uint8), r'has the shape \(4, 4, 2\)'),
    (np.zeros((0, 4, 3), np.uint8), r'has the shape \(0, 4, 3\)'),
    (jax.numpy.zeros((2, 4, 4, 3), 'uint8'), r'has the shape \(2, 4, 4, 3\)'),
    (None, "'a' is of type NoneType; give a path, an https:// address"),
    (io.StringIO('a'), "'a' is of type StringIO; .* a file opened with mode rb"),
    ('http://', 'cannot be downloaded: '),
    ('http://127.0.0.1:1/a.png', 'cannot be downloaded: .*refused'),
  ],
)
def test_what_is_no_picture_gets_one_line(picture, message):
  with pytest.raises(ValueError, match=message) as caught:
    images.read_image(picture, 'a')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('side', [10_001, 20_000])
def test_bombs_are_refused_before_they_go_off(side, recwarn):
  with pytest.raises(ValueError, match="'a' has more than 100 million pixels; make it smaller"):
    read(png_header(side, side))
  assert not recwarn


PIXELS = photo(83, 70)
FORMS = {
  '4:2:0': dict(subsampling='4:2:0'),
  '4:4:4': dict(subsampling='4:4:4'),
  'progressive': dict(progressive=True),
  'restarts': dict(restart_marker_rows=1),
  'optimised': dict(optimize=True, quality=95),
}  # fmt: skip


@pytest.mark.parametrize('bottom', [1, 15, 16, 33, 83])
@pytest.mark.parametrize('form', FORMS)
def test_rows_are_those_of_the_whole_picture(form, bottom):
  data = encode(PIXELS, **FORMS[form])
  header = images.read_jpeg_header(data, '')
  assert header[:2] == (83, 70)
  rows = images.decode_jpeg_rows(data, header, bottom, 1, '')
  np.testing.assert_array_equal(rows[:bottom], decode(data)[:bottom])
  if header.one_scan:
    assert len(rows) <= bottom + 16  # the rest is not decoded
  assert header.one_scan == (form != 'progressive')


@pytest.mark.parametrize('reduction', [2, 4, 8])
@pytest.mark.parametrize('form', ['4:2:0', 'progressive'])
def test_a_reduced_picture_is_that_many_times_smaller(form, reduction):
  data = encode(photo(160, 131), **FORMS[form])
  rows = images.decode_jpeg_rows(data, images.read_jpeg_header(data, ''), 81, reduction, '')
  image = Image.open(io.BytesIO(data))
  image.draft('RGB', (131 // reduction, 160 // reduction))
  expected = np.asarray(image)
  assert rows.shape[1] == expected.shape[1] == -(-131 // reduction)
  assert np.abs(rows[: 80 // reduction].astype(int) - expected[: 80 // reduction]).mean() < 1


@pytest.mark.parametrize('exif', [1, 6])
@pytest.mark.parametrize('form', ['4:2:0', '4:4:4', 'restarts', 'optimised'])
def test_random_bytes_in_the_data_are_damage(form, exif):
  """Pillow shows them as noise."""
  orientation = Image.Exif()
  orientation[0x0112] = exif
  data = encode(photo(160, 131), exif=orientation, **FORMS[form])
  surplus = data[:-2] + b'garbage' + data[-2:]
  assert np.array_equal(read(surplus), read(data)) and read(data).shape[:2] == ((160, 131) if exif == 1 else (131, 160))
  at = data.index(b'\xff\xda') + 300
  damaged = data[:at] + np.random.default_rng(1).bytes(1024) + data[at + 1024 :]
  assert decode(damaged).shape == (160, 131, 3)
  with pytest.raises(ValueError, match="'a' is damaged .Corrupt JPEG data: .*replace or remove it"):
    read(damaged)
  if exif == 1:
    with pytest.raises(BadRecord, match='key: image_corrupt'):
      images.decode_jpeg_rows(damaged, images.read_jpeg_header(damaged, 'key'), 140, 1, 'key')
    rows = images.decode_jpeg_rows(surplus, images.read_jpeg_header(surplus, ''), 140, 1, '')
    np.testing.assert_array_equal(rows[:140], decode(data)[:140])


def test_what_is_left_to_pillow():
  cmyk = io.BytesIO()
  Image.new('CMYK', (20, 20)).save(cmyk, 'JPEG')
  others = (encode(PIXELS, 'PNG'), encode(PIXELS, 'WEBP'), cmyk.getvalue(), b'', b'\xff\xd8ab' * 9)
  for data in others:
    assert images.read_jpeg_header(data, '') is None
  exif = Image.Exif()
  exif[0x0112] = 6
  assert images.read_jpeg_header(encode(PIXELS, exif=exif), '') is None
  exif[0x0112] = 1
  assert images.read_jpeg_header(encode(PIXELS, exif=exif), '') is not None


class Pages(http.server.BaseHTTPRequestHandler):
  """What a server may answer, by path."""

  protocol_version = 'HTTP/1.1'

  def do_GET(self) -> None:
    data = encoded(RGB)
    if self.path == '/missing.png':
      return self.send_error(404)
    self.send_response(200)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    if self.path == '/slow.png':
      for byte in data:
        self.wfile.write(bytes([byte]))
        time.sleep(0.05)
    self.close_connection = True
    self.wfile.write(data[: len(data) // 2] if self.path == '/half.png' else data)

  def log_message(self, *_: object) -> None:
    pass


def test_addresses_within_bounds_of_time_and_size(monkeypatch):
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Pages) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f'http://127.0.0.1:{server.server_port}'
    assert np.array_equal(images.read_image(f'{address}/a.png', 'a'), RGB)
    monkeypatch.setattr(images, '_MOST_SECONDS', 0.2)
    for name, message in (
      ('missing', 'Not Found'),
      ('half', 'bytes are missing|IncompleteRead'),
      ('slow', 'not complete after 0.2 s'),
    ):
      with pytest.raises(ValueError, match=f'{name}.png. cannot be downloaded: .*({message})'):
        images.read_image(f'{address}/{name}.png', 'a')
    monkeypatch.setattr(images, '_MOST_BYTES', 100)
    with pytest.raises(ValueError, match='has more than 0 MB'):
      images.read_image(f'{address}/a.png', 'a')
    server.shutdown()
