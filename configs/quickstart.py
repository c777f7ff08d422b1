"""A GroupViT that learns to segment emoji scenes from their captions, on two CPU cores, in minutes.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart

With 24 things instead of 12: --config=configs/quickstart.py:24things
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
STUFF = ('grass', 'sky', 'sand', 'water', 'brick', 'snow')


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The experiment.

  Args:
    variant: '' or '24things'; written after the file's name and a colon.

  Raises:
    ValueError: there is no such variant.
  """
  if variant not in THINGS:
    raise ValueError(f"no variant {variant!r}; end the config's path in '.py' or '.py:24things'")
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.init_from = ''  # a workdir, a Hugging Face folder or a .pth file whose weights to start from
  config.profile = False  # True writes a trace of three steps to the workdir: docs/performance.md
  config.dry_run = False  # True checks data, tokenizer, shapes and memory instead of training
  config.total_steps = 7000
  config.batch_size = 64
  config.grad_accum_steps = 1  # the towers see the batch in so many parts; gradients stay those of the whole
  config.remat = 'none'  # 'dots' or 'blocks' forget more activations and compute them again: docs/train.md
  config.scan_layers = False  # True: blocks of one shape are a loop, of which the compiler sees one turn (docs/pods.md)
  config.text_budget = 0  # tokens an image that the text tower computes at once; 0 pads: docs/performance.md
  config.multi_label_weight = 1.0
  config.ema_decay = 0.0  # above 0 a moving average of the weights is kept, and is what evaluation and exports use

  config.log_every = 50
  config.max_skipped_in_a_row = 10
  config.eval = ml_collections.ConfigDict(dict(every_steps=500))
  config.checkpoint = ml_collections.ConfigDict(dict(every_steps=500, keep=2, best=''))
  # checkpoint.best='eval/validation/miou' keeps the checkpoint with the highest such figure, too.
  config.benchmarks = ml_collections.ConfigDict()  # benchmarks to score along the way: docs/evaluation.md

  config.data = ml_collections.ConfigDict(
    dict(
      source='scenes',
      num_prompts=0,  # with so few words every batch holds each prompt many times over: docs/design.md
      noun_phrases=False,  # prompts of words, as in the paper; True: of whole noun phrases
      num_threads=2,
      num_workers=0,
      prefetch_batches=4,
      augment=dict(name='none'),  # scenes have the model's size and vary by themselves
      max_fault_share=0.05,  # more records that cannot be used end the run
      scenes=dict(
        seed=0, things=THINGS[variant], stuff=STUFF, min_things=1, max_things=3, partial_captions=0.5, num_heldout=512
      ),
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
      projector_dim=64,  # a wider one names segments worse: docs/design.md
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
      beta1=0.9,
      beta2=0.999,
      eps=1e-8,
      weight_decay=0.05,
      clip_norm=5.0,
    )
  )
  config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, model=1))
  return config
