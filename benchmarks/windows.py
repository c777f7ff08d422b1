"""Times the encoder's pass over segmentation windows beside transformers' in PyTorch and prints JSON:

  python -m benchmarks.windows --output=docs/speed_windows.json

Windows of 448 pixels in; the segment of each pixel, and the embeddings that classes are compared with, out: what the
evaluator keeps of a window (`encode_windows`). Options as in benchmarks/train_step.py.
"""

from benchmarks import speed


def main() -> None:
  """Measures and writes."""
  speed.measure('windows', __doc__, size=448, batches=(1, 8, 16), sizes=(448,))


if __name__ == '__main__':
  main()
