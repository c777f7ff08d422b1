"""Anyone's pictures, of any size, format and mode, as 8-bit RGB."""

import io
import os
import warnings

from etils import epath
import numpy as np
from PIL import Image, ImageOps

from groupvit_jax.errors import UserError

LARGEST = 100_000_000  # pixels: more is a mistake, or an attack on memory

# What hands a file to another program (EPS to Ghostscript) or is no raster picture is left out.
_FORMATS = (
  'AVIF', 'BMP', 'DIB', 'GIF', 'ICO', 'JPEG', 'JPEG2000', 'MPO', 'PCX', 'PNG', 'PPM', 'TGA', 'TIFF',
  'WEBP',
)  # fmt: skip
_WHITE = 255


def read_image(picture: 'np.ndarray | Image.Image | os.PathLike | str | bytes', key: str) -> np.ndarray:
  """Pixels of a picture, however it comes.

  Turned as its EXIF says; what is transparent shows white; of an animation the first frame; 16 bits
  become 8.

  Args:
    picture: an array (see `pixels_of_array`), a Pillow image, a path, or the bytes of a file.
    key: its name in messages.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ValueError: it is no picture, damaged, empty, or larger than `LARGEST`.
  """
  if isinstance(picture, np.ndarray):
    return pixels_of_array(picture, key)
  if isinstance(picture, Image.Image):
    return _convert(picture, key)
  if not isinstance(picture, bytes):
    picture = _read_file(epath.Path(picture), key)
  return decode_image(picture, key)


def decode_image(data: bytes, key: str) -> np.ndarray:
  """Pixels of an encoded picture, uint8 [H, W, 3]; see `read_image`."""
  if not data:
    raise UserError(f'picture {key!r} is empty; replace or remove it')
  Image.init()
  formats = [name for name in _FORMATS if name in Image.OPEN]
  try:
    with warnings.catch_warnings():
      # Pillow warns of large pictures; ours are refused below, before a pixel is decoded.
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)
      image = Image.open(io.BytesIO(data), formats=formats)
  except Image.DecompressionBombError as error:
    raise UserError(_too_large(key)) from error
  except Exception as error:  # which one depends on the format and on where the damage is
    raise UserError(f'picture {key!r} is not a picture this reads; replace or remove it') from error
  with image:
    return _convert(image, key)


def pixels_of_array(array: np.ndarray, key: str) -> np.ndarray:
  """Pixels uint8 [H, W, 3] of an array that holds a picture.

  Args:
    array: grey [H, W] or [H, W, 1], RGB [H, W, 3] or RGBA [H, W, 4]; uint8, uint16 (all 16 bits in
      use) or bool. What is uint8 RGB already is not copied.
    key: its name in messages.

  Raises:
    ValueError: another shape or type, no pixels, or too many.
  """
  plane = array[:, :, None] if array.ndim == 2 else array
  if plane.ndim != 3 or plane.shape[2] not in (1, 3, 4) or not plane.size:
    raise UserError(f'picture {key!r} has the shape {array.shape}; make it [H, W] or [H, W, 3]')
  if plane.shape[0] * plane.shape[1] > LARGEST:
    raise UserError(_too_large(key))
  if plane.dtype == np.uint16:
    plane = _to_8_bits(plane)
  elif plane.dtype == bool:
    plane = plane.astype(np.uint8) * 255
  elif plane.dtype != np.uint8:
    raise UserError(f'picture {key!r} is {array.dtype}; make it uint8, from 0 to 255')
  if plane.shape[2] == 1:
    return plane.repeat(3, axis=2)
  return plane if plane.shape[2] == 3 else _over_white(plane)


def _read_file(path: epath.Path, key: str) -> bytes:
  try:
    return path.read_bytes()
  except FileNotFoundError as error:
    raise UserError(f'there is no picture {path}') from error
  except OSError as error:
    raise UserError(f'picture {key!r} cannot be read: {error.strerror or error}') from error


def _convert(image: Image.Image, key: str) -> np.ndarray:
  """Decodes a picture that has been opened, and turns it upright."""
  if image.width * image.height > LARGEST:
    raise UserError(_too_large(key))
  try:
    image.load()
    return pixels_of_array(_to_array(_upright(image)), key)
  except Exception as error:
    raise UserError(f'picture {key!r} is damaged ({_line(error)}); replace or remove it') from error


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
  return f'picture {key!r} has more than {LARGEST // 10**6} million pixels; make it smaller'


def _line(error: Exception) -> str:
  """The first line of an error."""
  return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
