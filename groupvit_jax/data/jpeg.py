"""JPEGs, decoded no further than a crop needs.

Three quarters of a decode's time are spent on undoing the entropy code, which no reduced scale
saves. The rows below the crop can be saved: a picture that claims to end there is decoded only so
far.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image
import simplejpeg

from groupvit_jax.data.bad_records import BadRecord

_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # Huffman tables, reserved, arithmetic conditioning
_TALLEST_UNIT = 16  # rows that are decoded together, at the usual subsamplings


class Header(NamedTuple):
  """What a JPEG says of itself."""

  height: int
  width: int
  height_at: int  # the place of the height in the file
  one_scan: bool  # all of a row's data is in one place


class _Frame(NamedTuple):
  marker: int
  at: int
  precision: int
  height: int
  width: int
  components: int


def read_header(data: bytes, key: str) -> Header | None:
  """Reads what `decode_rows` must know, in a few microseconds.

  Args:
    data: a file.
    key: its name in errors.

  Returns:
    None for what `decode_rows` does not read: other formats, CMYK, arithmetic coding, lossless,
    pictures that their EXIF turns.

  Raises:
    BadRecord: the file ends before the picture does.
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
      frame = _Frame(marker, at, data[at + 4], _number(data, at + 5), _number(data, at + 7), data[at + 9])
    if marker == _APP1 and data[at + 4 : at + 10] == b'Exif\0\0' and _is_turned(data):
      return None
    at += 2 + length
  raise BadRecord('image_truncated', key)


def decode_rows(data: bytes, header: Header, bottom: int, reduction: int, key: str) -> np.ndarray:
  """Decodes the rows above `bottom`, and perhaps some more.

  Args:
    data: a JPEG.
    header: its header.
    bottom: how many rows are needed, at most H.
    reduction: 1, 2, 4 or 8: how many times smaller the inverse transform makes the picture.
    key: its name in errors.

  Returns:
    uint8 [at least bottom / reduction, ceil(W / reduction), 3], RGB.

  Raises:
    BadRecord: it is damaged.
  """
  height = header.height
  if header.one_scan:
    # One row more: the colour of a row's pixels depends on the row below.
    height = min(height, -(-(bottom + 1) // _TALLEST_UNIT) * _TALLEST_UNIT)
    at = header.height_at
    data = b''.join((data[:at], height.to_bytes(2, 'big'), data[at + 2 :]))
  # The scale is the smallest that gives this size. Not strict: data that remains is no fault.
  least = (-(-height // reduction), -(-header.width // reduction))
  try:
    return simplejpeg.decode_jpeg(data, 'RGB', min_height=least[0], min_width=least[1], strict=False)
  except ValueError as error:
    raise BadRecord('image_corrupt', key) from error


def _checked_header(data: bytes, frame: _Frame | None, scan_at: int, key: str) -> Header | None:
  """The header of a file whose first scan starts at `scan_at`."""
  if frame is None or frame.precision != 8 or not frame.height or not frame.width:
    return None
  if frame.marker not in (_BASELINE, _EXTENDED, _PROGRESSIVE) or frame.components not in (1, 3):
    return None
  if data.rfind(b'\xff\xd9') < scan_at:  # the end's marker, which picture data cannot hold
    raise BadRecord('image_truncated', key)
  one_scan = frame.marker != _PROGRESSIVE and data[scan_at + 4] == frame.components
  return Header(frame.height, frame.width, frame.at + 5, one_scan)


def _number(data: bytes, at: int) -> int:
  return data[at] << 8 | data[at + 1]


def _is_turned(data: bytes) -> bool:
  try:
    with Image.open(io.BytesIO(data)) as image:
      return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
  except Exception:  # damaged EXIF, of which Pillow raises whatever it meets: the rest may be good
    return False
