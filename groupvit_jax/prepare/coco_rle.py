"""Masks as COCO's tools write them: compressed run lengths."""

import numpy as np

from groupvit_jax.errors import UserError


def decode(counts: str | bytes, size: tuple[int, int]) -> np.ndarray:
  """The mask of compressed run lengths.

  Runs alternate between outside and inside, column by column. From the third on a run is stored as its difference
  to the last but one; a number takes groups of 5 bits, low ones first, in characters from '0' on, of which the sixth
  bit says that another follows and the last one's fifth is the sign.

  Args:
    counts: the runs.
    size: (H, W).

  Returns:
    bool [H, W].

  Raises:
    ValueError: the runs do not fill the mask.
  """
  runs: list[int] = []
  value = shift = 0
  for char in counts if isinstance(counts, bytes) else counts.encode():
    bits = char - ord('0')
    value |= (bits & 0x1F) << shift
    shift += 5
    if bits & 0x20:
      continue
    if bits & 0x10:
      value -= 1 << shift
    runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    value = shift = 0
  if sum(runs) != size[0] * size[1] or min(runs, default=0) < 0:
    raise UserError(f'run lengths of {sum(runs)} pixels do not fill a mask of {size[0]} x {size[1]}')
  inside = np.arange(len(runs)) % 2 == 1
  return np.repeat(inside, runs).reshape(size[::-1]).T
