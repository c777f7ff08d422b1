"""Times GroupViT-S/16's image encoder beside transformers' in PyTorch and prints JSON:

  python -m benchmarks.inference --output=docs/speed_inference.json

Pictures in, embeddings out, at 224 and at the 448 pixels of segmentation windows.
"""

from benchmarks import speed


def main() -> None:
  """Measures and writes."""
  speed.measure('encode', __doc__, batches=(1, 8, 32), sizes=(224, 448))


if __name__ == '__main__':
  main()
