"""A GroupViT on your own image-text pairs, from scratch.

  python train.py --config=configs/own_pairs.py --workdir=runs/own --config.data.path='pairs/*.tar'
  python train.py --config=configs/own_pairs.py:tiny --workdir=runs/own_tiny --config.data.path=pairs

`data.path` is all that it needs: tars as img2dataset writes them; a folder of images, each with a .txt caption; or a
.csv, .jsonl or .parquet file with columns path and caption. Steps and warm-up follow from the number of pairs and
`data.epochs`. See docs/data.md.

Without a variant: the paper's GroupViT-S/16 for one GPU, with batches of 1024 instead of 4096. With fewer than some
million pairs start from trained weights instead: `--config.init_from=nvidia/groupvit-gcc-yfcc`, with
`--config.tokenizer.path` and sizes as docs/train.md has them. `tiny`: the quickstart's model at 96 px for two CPU
cores, to try the data with. No score of either on photographs is known.
"""

import ml_collections

from configs import groupvit_vits16_gcc_yfcc, quickstart


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The experiment.

  Args:
    variant: '' or 'tiny'; written after the file's name and a colon.

  Raises:
    ValueError: there is no such variant.
  """
  if variant not in ('', 'tiny'):
    raise ValueError(f"no variant {variant!r}; end the config's path in '.py' or '.py:tiny'")
  config = groupvit_vits16_gcc_yfcc.get_config('1gpu')
  config.batch_size, config.grad_accum_steps = 1024, 4
  config.benchmarks = ml_collections.ConfigDict()  # docs/evaluation.md
  config.eval.every_steps = 1000  # panels of training images
  with config.unlocked():
    del config.data['sets']
    config.data.update(source='pairs', path='', epochs=30.0)
  config.data.lowercase_prompts = True  # words in capitals would pass for nouns: docs/data.md
  config.total_steps, config.optim.warmup_steps = 0, -1  # as many as the epochs have, and a fifteenth of them
  if variant == 'tiny':
    small = quickstart.get_config()
    config.batch_size, config.grad_accum_steps, config.remat, config.text_budget = 64, 1, 'none', 0
    config.multi_label_loss = small.multi_label_loss
    config.data.augment.name = 'plain'
    config.data.update(num_workers=0, num_threads=2, prefetch_batches=4)
    config.tokenizer.vocab_size = 2048
    config.model, config.optim = small.model, small.optim
    config.model.vision.image_size, config.model.text.context_length = (96, 96), 32
    config.optim.warmup_steps = -1
  return config
