"""What a TensorBoard file says."""

import html
import io
import pathlib

import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2


def read_board(folder: pathlib.Path) -> dict[str, tuple[int, float | str | np.ndarray]]:
  """Tag -> (step, figure, text or picture) of the one file in a folder; of each tag the last."""
  (file,) = folder.iterdir()
  data, found = file.read_bytes(), {}
  while data:  # a length, its checksum, the event, its checksum
    size = int.from_bytes(data[:8], 'little')
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    found |= {value.tag: (event.step, _read(value)) for value in event.summary.value}
    data = data[16 + size :]
  return found


def _read(value: event_pb2.Event) -> float | str | np.ndarray:
  if value.HasField('image'):
    return np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string)))
  return html.unescape(value.tensor.string_val[0].decode()) if value.tensor.string_val else value.simple_value
