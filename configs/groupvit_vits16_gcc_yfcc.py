"""GroupViT-S/16 on CC3M + CC12M + YFCC14M with three noun prompts: the paper's first released model.

  python train.py --config=configs/groupvit_vits16_gcc_yfcc.py --workdir=runs/gcc_yfcc
  python train.py --config=configs/groupvit_vits16_gcc_yfcc.py:8gpu --workdir=runs/gcc_yfcc
  python train.py --config=configs/groupvit_vits16_gcc_yfcc.py:1gpu --workdir=runs/gcc_yfcc

All three train on the same batches of 4096 and compute the same gradients up to rounding; the first is for 16 devices
or more, on any number of hosts. Before a run: `--config.dry_run=True`, and the audit of docs/data.md.

With the multi-label loss of the best segment (groupvit_jax/model/losses.py) instead of the paper's:

  python train.py --config=configs/groupvit_vits16_gcc_yfcc.py:named --workdir=runs/gcc_yfcc_named

and `.py:8gpu_named`, `.py:1gpu_named`. No run of it at this scale has been made.

With CLIP's tokenizer, as the authors: `.py:clip_tokenizer` or `.py:8gpu_clip_tokenizer`, and
`--config.tokenizer.path=FOLDER`, a folder with `vocab.json` and `merges.txt`, or another form of docs/import_export.md.

Point `data.sets.*.path` at your copies: `--config.data.sets.cc3m.path='gs://bucket/cc3m/{00000..00331}.tar'`.

Hardware and time: the authors trained for two days on 16 V100.
Expected, by the authors' weights and protocol `groupvit`:
mIoU on VOC 52.3, Context 22.4, COCO-Object 24.3; top-1 accuracy on ImageNet 43.7.
Variance is large: two runs of one recipe gave 11.6 and 25.8 on COCO with equal ImageNet accuracy. Watch
`train/stage*/entropy` and `segments_in_use`, not the loss alone. Batch 2048 costs about 5 mIoU.
"""

import ml_collections

CLIP = 'clip_tokenizer'
CLIP_FOLDER = '/data/clip'  # like those of the sets, to be pointed at your copy
EPOCHS, WARMUP_EPOCHS = 30, 2

# Memory per pair on an H100, beside parameters: 36 MiB (53 with XLA's attention), with remat='dots' 19 MiB. Workers are
# per host.
MACHINES = {
  '': dict(grad_accum_steps=1, num_workers=8),  # at most 256 pairs a device, 5 GiB
  '8gpu': dict(grad_accum_steps=1, num_workers=12),  # 512 a device, 10 GiB
  '1gpu': dict(grad_accum_steps=16, num_workers=4),  # 4096, of which 256 at a time: 5 GiB
}


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """The experiment.

  Args:
    variant: '', '8gpu' or '1gpu', then 'clip_tokenizer', then 'named', joined by '_'; written after the file's name and
      a colon.

  Raises:
    ValueError: there is no such variant.
  """
  paper = variant.removesuffix('named').removesuffix('_')
  config = build(paper)
  if variant != paper:
    config.multi_label_loss = 'best_segment'
    config.data.skipped_words = ('image', 'images', 'photo', 'photos', 'picture', 'pictures')
  return config


def build(variant: str) -> ml_collections.ConfigDict:
  """The paper's experiment, for a machine of `MACHINES` and with either tokenizer."""
  clip, machine = variant.endswith(CLIP), variant.removesuffix(CLIP).removesuffix('_')
  if machine not in MACHINES:
    raise ValueError(f"no variant {variant!r}; end the config's path in '.py', '.py:8gpu', '.py:1gpu' or '.py:{CLIP}'")
  config = ml_collections.ConfigDict(
    dict(
      seed=0,
      profile=False,  # True writes a trace of three steps to the workdir: docs/performance.md
      dry_run=False,  # True checks data, tokenizer, shapes and memory instead of training
      batch_size=4096,
      grad_accum_steps=MACHINES[machine]['grad_accum_steps'],
      remat='dots',
      text_budget=64,  # tokens per image in packed rows; CC12M's captions and prompts take 57: docs/performance.md
      multi_label_loss='pooled',  # the paper's
      init_from='',
      ema_decay=0.0,
      freeze='',
    )
  )

  config.log_every = 50
  config.eval = ml_collections.ConfigDict(dict(every_steps=5000, panel_steps=()))
  config.checkpoint = ml_collections.ConfigDict(dict(every_steps=1000, keep=3, best=''))  # or best='eval/voc21/miou'
  config.benchmarks = ml_collections.ConfigDict(
    dict(
      voc21=benchmark('voc21'),
      context60=benchmark('context60'),
      coco_object=benchmark('coco_object'),
      imagenet=benchmark('imagenet'),
    )
  )

  config.data = ml_collections.ConfigDict(
    dict(
      source='sets',
      sets=dict(
        cc3m=tars('/data/cc3m/{00000..00331}.tar', expected=2_891_445),
        cc12m=tars('/data/cc12m/{00000..01242}.tar', expected=11_156_203),
        yfcc14m=records('/data/tfds/yfcc14m/1.0.0', expected=14_615_499),
      ),
      index_dir='',
      clean_captions=True,  # mis-decoded characters, HTML entities and white space, as before CLIP's BPE
      num_prompts=3,
      lowercase_prompts=False,  # words are tagged as they are written, as in the paper
      prompt_templates='full',  # the 80 that a prompt's is drawn from, as in the paper
      skipped_words=(),  # words that no prompt is made of
      # The paper's: RandAugment m9 mstd0.5 inc1 after crop and flip, random erasing in the step.
      augment=dict(
        name='rand_augment',
        area=(0.08, 1.0),
        ratio=(3 / 4, 4 / 3),
        flip=0.5,
        op_probability=0.5,
        magnitude=9.0,
        magnitude_std=0.5,
        erase=0.25,
      ),
      max_fault_share=0.05,
      num_threads=4,
      num_workers=MACHINES[machine]['num_workers'],
      prefetch_batches=8,
    )
  )
  config.tokenizer = ml_collections.ConfigDict(
    dict(
      # '' trains a SentencePiece model on the captions; the authors' is CLIP's BPE, of 49,408, with a token to begin.
      path=CLIP_FOLDER if clip else '',
      vocab_size=32_000,
      num_captions=300_000,
    )
  )
  config.model = ml_collections.ConfigDict(
    dict(
      dtype='bfloat16',  # parameters, norms, softmaxes and losses stay float32
      embed_dim=256,
      projector_dim=4096,
      vision=dict(
        image_size=(224, 224),
        patch_size=16,
        width=384,
        num_heads=6,
        depths=(6, 3, 3),
        num_group_tokens=(64, 8, 0),
        num_segments=(64, 8, 0),
        mlp_ratio=4.0,
        drop_path=0.1,
        assignment='gumbel',
        init=dict(
          kernel='normal:0.02',
          assign_kernel='normal:0.02',
          value_kernel='normal:0.02',
          tokens_std=0.02,
          positions_std=0.02,
        ),
      ),
      text=dict(context_length=77, width=256, depth=12, num_heads=4, mlp_ratio=4.0),
    )
  )
  config.optim = ml_collections.ConfigDict(
    dict(
      warmup_lr=4e-6,
      peak_lr=1.6e-3,
      end_lr=4e-5,  # at batch 4096: they scale linearly with the batch
      cosine='run',  # over all steps, the warm-up's included, as in the published runs
      beta1=0.9,
      beta2=0.999,
      eps=1e-8,
      weight_decay=0.05,
      clip_norm=5.0,
    )
  )
  set_epochs(config)
  config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, model=1))
  return config


def benchmark(name: str) -> dict[str, object]:
  """An evaluation during training with the published protocol; off until every_steps is set."""
  return dict(benchmark=name, data_dir='/data/tfds', every_steps=0, num_pictures=0, protocol='', changes={})


def set_epochs(config: ml_collections.ConfigDict) -> None:
  """Sets the steps of `EPOCHS` epochs over the records that the sets are expected to have."""
  steps_per_epoch = sum(described.expected for described in config.data.sets.values()) // config.batch_size
  config.total_steps = EPOCHS * steps_per_epoch
  config.optim.warmup_steps = WARMUP_EPOCHS * steps_per_epoch


def tars(path: str, expected: int) -> dict[str, object]:
  """A set of tars as img2dataset writes them, mixed by its size."""
  return dict(format='webdataset', path=path, caption='txt', weight=0.0, expected=expected)


def records(path: str, expected: int) -> dict[str, object]:
  """A set that `python -m groupvit_jax.prepare` wrote, mixed by its size."""
  return dict(format='tfds', path=path, split='train', image='image', caption='caption', weight=0.0, expected=expected)
