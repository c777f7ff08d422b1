"""Times GroupViT-S/16's training step beside transformers' in PyTorch and prints JSON:

  python -m benchmarks.train_step --growth --rounds=5 --output=docs/speed_train.json
  python -m benchmarks.train_step --device=gpu --dtype=bfloat16 --batch=256 --output=gpu_train.json

Ours is the paper's whole recipe; benchmarks/peer_model.py says what the peer's is. Each side is a process of its own
on all cores. On a CPU they take turns. The table in the README is made of the JSON by benchmarks/speed_table.py.
"""

from benchmarks import speed


def main() -> None:
  """Measures and writes."""
  speed.measure('train', __doc__, size=224, batches=(4, 8, 16), sizes=(160, 224, 320))


if __name__ == '__main__':
  main()
