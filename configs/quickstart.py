"""A GroupViT that learns to segment emoji scenes from their captions, on two CPU cores, in minutes.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Prompts are contrasted with the best segment of each image (`multi_label_loss`), which the paper does not do. Expected
after 7000 steps on test scenes (seed 0): mIoU 77.3, oracle 79.7, pixel accuracy 93.1. During training scenes are one
window, which scores less: validation mIoU is 56 at step 1000, 61 at 2000, 66 at 3500 and 70 at 7000. Captions alone,
without prompts: `--config.data.num_prompts=0`.

With 24 things instead of 12 (mIoU 63.1, oracle 76.5): --config=configs/quickstart.py:24things
With two grouping stages, 32 and then 8 groups (69.6, oracle 75.1): --config=configs/quickstart.py:two_stages
"""

import ml_collections

THINGS = {
  '': (
    'dog',
    'panda',
    'frog',
    'pig',
    'ladybug',
    'butterfly',
    'banana',
    'grapes',
    'watermelon',
    'tractor',
    'rocket',
    'gift',
  )
}
THINGS['24things'] = THINGS[''] + (
  'fox',
  'chicken',
  'turtle',
  'unicorn',
  'mushroom',
  'pineapple',
  'hamburger',
  'star',
  'balloon',
  'robot',
  'house',
  'shirt',
)
THINGS['two_stages'] = THINGS['']
STUFF = ('grass', 'sky', 'sand', 'water', 'brick', 'snow')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The experiment.

  Args:
    variant: '', '24things' or 'two_stages'; written after the file's name and a colon.

  Raises:
    ValueError: there is no such variant.
  """
  if variant not in THINGS:
    raise ValueError(f"no variant {variant!r}; end the config's path in '.py', '.py:24things' or '.py:two_stages'")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.init_from = ''  # a workdir, a Hugging Face folder, a Hub id or a .pth file: weights to start from
  config.profile = False  # True writes a trace of three steps to the workdir: docs/performance.md
  config.dry_run = False  # True checks data, tokenizer, shapes and memory instead of training
  config.total_steps = 7000
  config.batch_size = 64
  config.grad_accum_steps = 1  # micro-batches in the towers; gradients stay those of the whole batch
  config.remat = 'none'  # 'dots' or 'blocks' keep fewer activations and recompute them: docs/train.md
  config.text_budget = 0  # tokens per image in packed rows; 0 pads: docs/performance.md
  config.multi_label_loss = 'best_segment'  # the paper's is 'pooled': groupvit_jax/model/losses.py
  config.ema_decay = 0.0  # above 0: keeps a moving average of the weights, which evaluation and export use
  config.freeze = ''  # parameters that stay as they are, as in 'text|text_projector': docs/train.md

  config.log_every = 50
  # Panels of scenes are drawn with each evaluation, and after these steps: commands/animate.py makes a film of them.
  config.eval = ml_collections.ConfigDict(
    dict(every_steps=500, panel_steps=(0, 25, 50, 75, 100, 150, 200, 250, 300, 400, 600, 700, 800, 900))
  )
  config.checkpoint = ml_collections.ConfigDict(dict(every_steps=500, keep=2, best=''))
  # checkpoint.best='eval/validation/miou' also keeps the checkpoint with the highest value of that metric.
  config.benchmarks = ml_collections.ConfigDict()  # benchmarks to score along the way: docs/evaluation.md

  config.data = ml_collections.ConfigDict(
    dict(
      source='scenes',
      num_prompts=3,
      lowercase_prompts=False,  # captions of scenes have no capitals
      prompt_templates='simple',  # one; 'full': the 80 of the paper
      skipped_words=('image', 'photo', 'picture'),  # words of the captions' frame that no prompt is made of
      num_threads=2,
      num_workers=0,
      prefetch_batches=4,
      augment=dict(name='none'),  # scenes have the model's size and vary without it
      max_fault_share=0.05,  # a larger share of bad records ends the run
      scenes=dict(seed=0, things=THINGS[variant], stuff=STUFF, min_things=1, max_things=3, num_heldout=512),
    )
  )
  config.tokenizer = ml_collections.ConfigDict(
    dict(
      path='',  # '' trains a SentencePiece model on the captions
      vocab_size=512,
      num_captions=5000,
    )
  )
  config.model = ml_collections.ConfigDict(
    dict(
      dtype='float32',
      embed_dim=64,
      projector_dim=64,  # 256 is no better: docs/design.md
      vision=dict(
        image_size=(64, 64),
        patch_size=8,
        width=64,
        num_heads=4,
        depths=(1, 1),
        num_group_tokens=(8, 0),
        num_segments=(8, 0),
        mlp_ratio=4.0,
        drop_path=0.0,
        assignment='gumbel',
        # A small model learns to group only if its assignment is decisive from the first step: docs/design.md.
        init=dict(
          kernel='fan_in:1', assign_kernel='fan_in:8', value_kernel='fan_in:4', tokens_std=0.5, positions_std=0.5
        ),
      ),
      text=dict(context_length=16, width=64, depth=1, num_heads=4, mlp_ratio=4.0),
    )
  )
  # Rates of the reference batch 4096: they scale linearly with the batch.
  config.optim = ml_collections.ConfigDict(
    dict(
      warmup_lr=1e-4 * 64,
      peak_lr=1.2e-3 * 64,
      end_lr=5e-5 * 64,
      warmup_steps=100,
      cosine='after_warmup',  # 'run' would be at most 1.2 % of the peak lower: the warm-up is short
      beta1=0.9,
      beta2=0.999,
      eps=1e-8,
      weight_decay=0.05,
      clip_norm=5.0,
    )
  )
  if variant:  # both name segments better with more features
    config.model.embed_dim = config.model.projector_dim = 128
  if variant == 'two_stages':
    config.model.vision.depths = (1, 1, 1)
    config.model.vision.num_group_tokens = config.model.vision.num_segments = (32, 8, 0)
    config.model.vision.patch_size = 4  # of 64 patches, two stages make too few segments: docs/design.md
    config.optim.peak_lr /= 2  # at the full rate the stages come apart
    config.ema_decay = 0.998
    config.total_steps = 2000  # a step costs three times that of 8 px
  config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, model=1))
  return config
