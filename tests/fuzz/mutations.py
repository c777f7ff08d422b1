"""Mutations of valid files: what fuzzing feeds to readers."""

import random

_TOKENS = (
  b'',
  b'\0',
  b'\xff',
  b'/',
  b'..',
  b'%00',
  b'"',
  b'\\',
  b'\xf0\x9f\x90\xb6',
  b'-1',
  b'1e999',
  b'null',
  b'{}',
  b'[',
)
_NUMBERS = (0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def mutate(data: bytes, draw: random.Random) -> bytes:
  """Changes a few bytes: overwritten, deleted, repeated, cut off, or replaced by what readers trip over."""
  for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
    start = draw.randrange(len(data) + 1)
    end = min(len(data), start + draw.choice((0, 1, 1, 2, 4, 8, draw.randrange(len(data) + 1))))
    data = data[:start] + _replacement(data[start:end], draw) + data[end:]
  return data[: draw.randrange(len(data) + 1)] if draw.random() < 0.05 else data


def _replacement(piece: bytes, draw: random.Random) -> bytes:
  match draw.randrange(6):
    case 0:
      return draw.randbytes(min(len(piece), 64))
    case 1:
      return bytes(byte ^ 1 << draw.randrange(8) for byte in piece[:8]) + piece[8:]
    case 2:
      return b''
    case 3:
      return piece * draw.choice((2, 3, 50))
    case 4:
      return draw.choice(_TOKENS)
    case _:
      number = draw.choice((*_NUMBERS, draw.randrange(2**16)))
      return number.to_bytes(8, draw.choice(('little', 'big')))[-max(1, len(piece)) :]
