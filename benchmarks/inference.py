"""Times GroupViT-S/16's image encoder beside transformers' in PyTorch and prints JSON:

  python -m benchmarks.inference --growth --output=docs/speed_inference.json

Pictures in, embeddings out; options as in benchmarks/train_step.py.
"""

from benchmarks import speed


def main() -> None:
  """Measures and writes."""
  speed.measure('encode', __doc__, size=224, batches=(1, 8, 32), sizes=(224, 448))


if __name__ == '__main__':
  main()
