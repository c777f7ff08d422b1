"""The Hugging Face folder of a model, which `transformers` loads: weights, configs, tokenizer, model card."""

from collections.abc import Sequence
import json
from typing import Any

from etils import epath
import numpy as np
import safetensors.numpy

from groupvit_jax.commands import model_card
from groupvit_jax.data import clip_bpe
from groupvit_jax.data.tokenizer import ClipTokenizer, SENTENCEPIECE_FILE
from groupvit_jax.interop import huggingface, native, state_dicts
from groupvit_jax.interop.read import SIDE_FILE
from groupvit_jax.model.pixels import IMAGE_MEAN, IMAGE_STD
from groupvit_jax.train.open_run import TrainedRun

_BILINEAR = 2  # Pillow's number, which the image processor's config holds

_SENTENCEPIECE_NOTE = f"""\
The tokenizer is the SentencePiece model `{SENTENCEPIECE_FILE}`, for which `transformers` has no class that fits: it
loads the model and the image processor (`AutoModel`, `AutoImageProcessor`) but neither `AutoTokenizer` nor
`AutoProcessor`. Tokenize with `sentencepiece` and append the end of text, where the text is pooled:

```python
import sentencepiece, torch
pieces = sentencepiece.SentencePieceProcessor(model_file='{SENTENCEPIECE_FILE}')
input_ids = torch.tensor([pieces.encode('a photo of a dog') + [pieces.eos_id()]])
```
"""

_CLIP_NOTE = """\
```python
from transformers import AutoModel, AutoProcessor
model, processor = AutoModel.from_pretrained(FOLDER), AutoProcessor.from_pretrained(FOLDER)
```
"""

_RESIZED = """
Images are resized to {height} x {width} px: `transformers` accepts no other size, and its segmentation logits apply
the temperature twice. groupvit_jax reads this folder too (`groupvit_jax.commands.import_weights`) and segments images
of any size.
"""

_TAGS = """\
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [groupvit, zero-shot-segmentation]"""


def write_folder(
  folder: epath.Path,
  run: TrainedRun,
  spec: state_dicts.ModelSpec,
  dtype: np.dtype,
  reports: Sequence[model_card.Report],
) -> None:
  """Writes the files of a run's model into an empty folder; `reports` of evaluations go into the model card.

  Raises:
    ValueError: `transformers` cannot represent the model.
  """
  config = huggingface.to_huggingface_config(
    spec, bos_id=run.tokenizer.bos_id, pad_id=run.tokenizer.pad_id, dtype=dtype.name
  )
  params = dict(run.variables['params'])
  prompts_scale = params.pop('multi_label_logit_scale', None)
  side = native.spec_to_json(spec) | {
    'multi_label_logit_scale': None if prompts_scale is None else float(prompts_scale)
  }
  state = huggingface.to_huggingface(run.variables | {'params': params})
  safetensors.numpy.save_file(
    state_dicts.cast(state, dtype), str(folder / 'model.safetensors'), metadata={'format': 'pt'}
  )
  write_json(folder / 'config.json', config)
  write_json(folder / SIDE_FILE, side)
  write_json(folder / 'preprocessor_config.json', _image_processor(run))
  _write_tokenizer(folder, run)
  height, width = run.model.vision.image_size
  use = _CLIP_NOTE if isinstance(run.tokenizer, ClipTokenizer) else _SENTENCEPIECE_NOTE
  model_card.write(folder, run, use=use + _RESIZED.format(height=height, width=width), tags=_TAGS, reports=reports)


def _image_processor(run: TrainedRun) -> dict[str, Any]:
  height, width = run.model.vision.image_size
  return dict(
    image_processor_type='CLIPImageProcessor',
    processor_class='CLIPProcessor',
    do_resize=True,
    size=dict(height=height, width=width),
    resample=_BILINEAR,
    do_center_crop=False,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    do_convert_rgb=True,
    image_mean=_decimals(IMAGE_MEAN),
    image_std=_decimals(IMAGE_STD),
  )


def _decimals(values: np.ndarray) -> list[float]:
  return [round(float(value), 6) for value in values.ravel()]


def _write_tokenizer(folder: epath.Path, run: TrainedRun) -> None:
  """Writes CLIP's vocabulary in the form every version of `transformers` reads, or the SentencePiece model."""
  run.tokenizer.save(folder)
  if not isinstance(run.tokenizer, ClipTokenizer):
    return
  files = clip_bpe.find_files(folder)
  vocab, merges = clip_bpe.read_bpe({name: path.read_bytes() for name, path in files.items()})
  for path in files.values():
    path.unlink()
  write_json(folder / 'vocab.json', vocab)
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *map(' '.join, merges)]) + '\n')
  special = dict(bos_token=clip_bpe.BOS, eos_token=clip_bpe.EOS, unk_token=clip_bpe.EOS, pad_token=clip_bpe.EOS)
  write_json(
    folder / 'tokenizer_config.json',
    dict(
      tokenizer_class='CLIPTokenizer',
      processor_class='CLIPProcessor',
      do_lower_case=True,
      model_max_length=run.config.model.text.context_length,
      **special,
    ),
  )
  write_json(folder / 'special_tokens_map.json', special)


def write_json(path: epath.Path, values: object) -> None:
  """Writes values as indented JSON."""
  path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + '\n')
