"""Decoding of images: of any size, format and mode to 8-bit RGB, and of JPEGs no further than a crop needs.

Three quarters of a JPEG's decoding time undo the entropy code, which no reduced scale saves. The rows below a crop can
be saved: a JPEG whose header claims to end there is decoded only so far.
"""

import http.client
import io
import os
import re
import time
from typing import BinaryIO, NamedTuple, Protocol
import urllib.request
import warnings

from etils import epath
import numpy as np
from PIL import ExifTags, Image, ImageOps
import simplejpeg

from groupvit_jax.data.bad_records import BadRecord
from groupvit_jax.errors import UserError

LARGEST = 100_000_000  # pixels: more is a mistake, or an attack on memory
_MOST_BYTES = 100_000_000  # of an image at an address
_MOST_SECONDS = 30  # for all of it
_READ = 1 << 16  # bytes at a time

# What hands a file to another program (EPS to Ghostscript) or is no raster image is left out.
_FORMATS = (
  'AVIF', 'BMP', 'DIB', 'GIF', 'ICO', 'JPEG', 'JPEG2000', 'MPO', 'PCX', 'PNG', 'PPM', 'TGA', 'TIFF',
  'WEBP',
)  # fmt: skip
_WHITE = 255

# Markers of a JPEG's segments.
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # Huffman tables, reserved, arithmetic conditioning
_TALLEST_UNIT = 16  # rows that are decoded together, at the usual subsamplings
_END = '0xd9'  # the end's marker in libjpeg's messages


class Array(Protocol):
  """An array of numpy, JAX, or whatever numpy can view."""

  def __array__(self) -> np.ndarray: ...


AnyImage = np.ndarray | Array | Image.Image | os.PathLike[str] | str | bytes | BinaryIO


def is_one_image(images: object) -> bool:
  """Whether something is one of `AnyImage`, and not a list of them."""
  return isinstance(images, str | bytes | os.PathLike | Image.Image) or any(
    hasattr(images, name) for name in ('read', '__array__')
  )


def read_image(image: AnyImage, key: str) -> np.ndarray:
  """Pixels of an image, uint8 [H, W, 3].

  Turned as its EXIF says; what is transparent shows white; of an animation the first frame; 16 bits become 8.

  Args:
    image: a path, an https:// address, a Pillow image, an array (see `pixels_of_array`), the bytes of a file, or a
      file that is open for reading bytes.
    key: its name in errors.

  Raises:
    UserError: it is none of these, or no image, damaged, empty, or larger than `LARGEST`; or an address gives no
      file of at most 100 MB within 30 s.
  """
  if isinstance(image, Image.Image):
    return _convert(image, key)
  if isinstance(image, str) and re.match('https?://', image):
    return decode_image(_download(image), key)
  if isinstance(image, str | os.PathLike):
    return decode_image(_read_file(epath.Path(image), key), key)
  if hasattr(image, 'read') and not isinstance(image, io.TextIOBase):
    image = image.read()
  if isinstance(image, bytes):
    return decode_image(image, key)
  if hasattr(image, '__array__'):
    return pixels_of_array(np.asarray(image), key)
  raise UserError(
    f'image {key!r} is of type {type(image).__name__}; give a path, an https:// address, a Pillow image, an array '
    '[H, W, 3], bytes, or a file opened with mode rb'
  )


def decode_image(data: bytes, key: str) -> np.ndarray:
  """Pixels of an encoded image, uint8 [H, W, 3]; see `read_image`."""
  if not data:
    raise UserError(f'image {key!r} is empty; replace or remove it')
  Image.init()
  formats = [name for name in _FORMATS if name in Image.OPEN]
  try:
    with warnings.catch_warnings():
      # Pillow warns of large images; they are refused below, before a pixel is decoded.
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      image = Image.open(io.BytesIO(data), formats=formats)
  except Image.DecompressionBombError as error:
    raise UserError(_too_large(key)) from error
  except Exception as error:  # which one depends on the format and on where the damage is
    raise UserError(f'image {key!r} has no format that can be read; replace or remove it') from error
  with image:
    is_jpeg = image.format in ('JPEG', 'MPO') and image.mode in ('L', 'RGB')
    return _convert(image, key, data if is_jpeg else None)


def pixels_of_array(array: np.ndarray, key: str) -> np.ndarray:
  """Pixels uint8 [H, W, 3] of an array that holds an image.

  It is grey [H, W] or [H, W, 1], RGB [H, W, 3] or RGBA [H, W, 4]; uint8, uint16 (all 16 bits in use) or bool. What is
  uint8 RGB already is not copied. `key` is its name in errors.
  """
  plane = array[:, :, None] if array.ndim == 2 else array
  if plane.ndim != 3 or plane.shape[2] not in (1, 3, 4) or not plane.size:
    raise UserError(f'image {key!r} has the shape {array.shape}; make it [H, W] or [H, W, 3]')
  if plane.shape[0] * plane.shape[1] > LARGEST:
    raise UserError(_too_large(key))
  if plane.dtype == np.uint16:
    plane = _to_8_bits(plane)
  elif plane.dtype == bool:
    plane = plane.astype(np.uint8) * 255
  elif plane.dtype != np.uint8:
    raise UserError(f'image {key!r} is {array.dtype}; make it uint8, from 0 to 255')
  if plane.shape[2] == 1:
    return plane.repeat(3, axis=2)
  return plane if plane.shape[2] == 3 else _over_white(plane)


class JpegHeader(NamedTuple):
  """What `decode_jpeg_rows` must know of a JPEG."""

  height: int
  width: int
  height_at: int  # offset of the height in the file
  one_scan: bool  # all of a row's data is in one place


def read_jpeg_header(data: bytes, key: str) -> JpegHeader | None:
  """Reads a JPEG's header in a few microseconds. Raises BadRecord where the file ends before the image does.

  Returns None for what `decode_jpeg_rows` does not read: other formats, CMYK, arithmetic coding, lossless, images that
  their EXIF turns.
  """
  if data[:2] != b'\xff\xd8':
    return None
  frame, at = None, 2
  while at + 10 <= len(data):
    if data[at] != 0xFF:
      return None
    marker, length = data[at + 1], _number(data, at + 2)
    if marker == 0xFF:  # padding
      at += 1
      continue
    if marker == _START_OF_SCAN:
      return _checked_header(data, frame, at, key)
    if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
      frame = at
    if marker == _APP1 and data[at + 4 : at + 10] == b'Exif\0\0' and _is_turned(data):
      return None
    at += 2 + length
  raise BadRecord('image_truncated', key)


def decode_jpeg_rows(data: bytes, header: JpegHeader, bottom: int, reduction: int, key: str) -> np.ndarray:
  """Decodes the rows above `bottom`, and perhaps some more.

  Args:
    data: a JPEG.
    header: its header.
    bottom: how many rows are needed, at most H.
    reduction: 1, 2, 4 or 8: how many times smaller the inverse transform makes the image.
    key: its name in errors.

  Returns:
    uint8 [at least bottom / reduction, ceil(W / reduction), 3], RGB.
  """
  height = header.height
  if header.one_scan:
    # One row more: the colour of a row's pixels depends on the row below.
    height = min(height, -(-(bottom + 1) // _TALLEST_UNIT) * _TALLEST_UNIT)
    at = header.height_at
    data = b''.join((data[:at], height.to_bytes(2, 'big'), data[at + 2 :]))
  try:
    size = (-(-height // reduction), -(-header.width // reduction))
    return _decode_strictly(data, size, is_cut=height < header.height)
  except ValueError as error:
    raise BadRecord('image_corrupt', key) from error


def _decode_strictly(data: bytes, size: tuple[int, int], is_cut: bool) -> np.ndarray:
  """Decodes a JPEG whose data libjpeg does not doubt; Pillow and OpenCV show noise where it does.

  `size` is (H', W') of the result: H / r and W / r, rounded up, where r is 1, 2, 4 or 8. `is_cut` tells that the header
  claims fewer rows than there are. Raises ValueError where it is damaged.
  """
  pixels = np.empty((*size, 3), np.uint8)
  try:  # the scale is the smallest that gives this size
    simplejpeg.decode_jpeg(data, 'RGB', min_height=size[0], min_width=size[1], buffer=pixels)
  except ValueError as error:
    # The first doubt comes after all rows: bytes that remain before the end are no damage.
    if 'extraneous bytes' not in str(error) or not (is_cut or str(error).endswith(_END)):
      raise
  return pixels


def _checked_header(data: bytes, frame: int | None, scan: int, key: str) -> JpegHeader | None:
  """The header of a file whose frame's segment starts at `frame` and whose first scan at `scan`."""
  if frame is None:
    return None
  marker, precision, components = data[frame + 1], data[frame + 4], data[frame + 9]
  height, width = _number(data, frame + 5), _number(data, frame + 7)
  if precision != 8 or not height or not width or components not in (1, 3):
    return None
  if marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE):
    return None
  if data.rfind(b'\xff\xd9') < scan:  # the end's marker, which image data cannot hold
    raise BadRecord('image_truncated', key)
  return JpegHeader(height, width, frame + 5, marker != _PROGRESSIVE and data[scan + 4] == components)


def _number(data: bytes, at: int) -> int:
  return data[at] << 8 | data[at + 1]


def _is_turned(data: bytes) -> bool:
  try:
    with Image.open(io.BytesIO(data)) as image:
      return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
  except Exception:  # damaged EXIF, of which Pillow raises whatever it meets: the rest may be good
    return False


def _read_file(path: epath.Path, key: str) -> bytes:
  try:
    return path.read_bytes()
  except FileNotFoundError as error:
    raise UserError(f'there is no image {path}') from error
  except OSError as error:
    raise UserError(f'image {key!r} cannot be read: {error.strerror or error}') from error


def _download(url: str) -> bytes:
  """The file at an address, within bounds of size and time."""
  end, data = time.monotonic() + _MOST_SECONDS, bytearray()
  request = urllib.request.Request(url, headers={'User-Agent': 'groupvit_jax'})  # some servers refuse Python's own
  try:
    with urllib.request.urlopen(request, timeout=_MOST_SECONDS) as response:
      while chunk := response.read1(_READ):
        data += chunk
        if len(data) > _MOST_BYTES:
          raise UserError(f'image {url!r} has more than {_MOST_BYTES // 10**6} MB; download and shrink it')
        if time.monotonic() > end:
          raise TimeoutError(f'not complete after {_MOST_SECONDS} s')
      if response.length:  # read1 tells of no end that comes too early
        raise ConnectionError(f'{response.length:,} bytes are missing')
  except (OSError, http.client.HTTPException, UnicodeError) as error:  # also a name that is none
    reason = getattr(error, 'reason', None) or error
    raise UserError(f'image {url!r} cannot be downloaded: {reason}; open it in a browser') from error
  return bytes(data)


def _convert(image: Image.Image, key: str, jpeg: bytes | None = None) -> np.ndarray:
  """Decodes an image that has been opened, and turns it upright; `jpeg` is the file of one that is grey or RGB."""
  if image.width * image.height > LARGEST:
    raise UserError(_too_large(key))
  try:
    if jpeg is None:
      image.load()
    else:
      metadata, image = image.info, Image.fromarray(_decode_strictly(jpeg, image.size[::-1], is_cut=False))
      image.info = metadata  # with its EXIF
    return pixels_of_array(_to_array(_upright(image)), key)
  except Exception as error:
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    raise UserError(f'image {key!r} is damaged ({line}); replace or remove it') from error


def _upright(image: Image.Image) -> Image.Image:
  try:
    return ImageOps.exif_transpose(image)
  except Exception:  # damaged EXIF, of which Pillow raises whatever it meets: the pixels are good
    return image


def _to_array(image: Image.Image) -> np.ndarray:
  """Grey, RGB or RGBA, of 8 or 16 bits."""
  if image.mode.startswith('I;16'):
    return np.asarray(image).astype(np.uint16)
  if image.mode in ('I', 'F'):
    return _scale_to_8_bits(np.asarray(image))
  if image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info:
    return np.asarray(image.convert('RGBA'))
  return np.asarray(image.convert('RGB'))


def _scale_to_8_bits(values: np.ndarray) -> np.ndarray:
  """Grey values of unknown range: 8 bits, 16 bits, or from 0 to 1."""
  low, high = float(values.min()), float(values.max())
  if not (low >= 0 and high < 2**16):
    raise UserError(f'its values go from {low:g} to {high:g}')
  if high > 255:
    return _to_8_bits(values)
  unit = values.dtype.kind == 'f' and high <= 1
  return np.rint(values * 255 if unit else values).astype(np.uint8)


def _to_8_bits(values: np.ndarray) -> np.ndarray:
  """0..65535 -> 0..255, rounded."""
  return np.rint(values / 257.0).astype(np.uint8)


def _over_white(rgba: np.ndarray) -> np.ndarray:
  alpha = rgba[:, :, 3:].astype(np.uint32)
  return ((rgba[:, :, :3] * alpha + _WHITE * (255 - alpha) + 127) // 255).astype(np.uint8)


def _too_large(key: str) -> str:
  return f'image {key!r} has more than {LARGEST // 10**6} million pixels; make it smaller'
