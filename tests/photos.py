"""Pictures that look like photographs to a codec and to a filter: detail at every scale."""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
  """Noise whose amplitude grows with its scale, uint8 [height, width, 3]; black to white."""
  rng = np.random.default_rng(seed)
  pixels, scale = np.zeros((height, width, 3), np.float32), 1
  while scale < 2 * max(height, width):
    noise = rng.standard_normal((height // scale + 2, width // scale + 2, 3), np.float32)
    pixels += scale**0.3 * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    scale *= 2
  pixels -= pixels.min()
  return np.uint8(255 * pixels / pixels.max())


def encode(pixels: np.ndarray, kind: str = 'JPEG', **options) -> bytes:
  """A file that holds the pixels."""
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, kind, **options)
  return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
  """Pillow's pixels of a file."""
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


def png_header(width: int, height: int) -> bytes:
  """A PNG that claims to be large, in a few bytes."""
  chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
  header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
  return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', b'')
