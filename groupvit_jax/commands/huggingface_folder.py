"""The Hugging Face folder of a model, which `transformers` loads: weights, configs, tokenizer, and how to use it."""

import json
from typing import Any

from etils import epath
import numpy as np
import safetensors.numpy

from groupvit_jax.data import clip_bpe
from groupvit_jax.data.tokenizer import ClipTokenizer, SENTENCEPIECE_FILE
from groupvit_jax.interop import huggingface, native, state_dicts
from groupvit_jax.interop.read import SIDE_FILE
from groupvit_jax.model.pixels import IMAGE_MEAN, IMAGE_STD
from groupvit_jax.train.restored_run import RestoredRun

_BILINEAR = 2  # Pillow's number, which the image processor's config holds

_USE = """\
```python
from groupvit_jax import Predictor

prediction = Predictor.from_pretrained('FOLDER')('image.jpg', ['dog', 'grass'])
prediction.save('out')
```

With `transformers`, which resizes images to {height} x {width} px, accepts no other size, and gives the logits of its
segmentation the temperature twice:

{transformers}"""

_CLIP_USE = """\
```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained('FOLDER'), AutoProcessor.from_pretrained('FOLDER')
texts, image = ['a photo of a dog', 'a photo of grass'], Image.open('image.jpg').convert('RGB')
inputs = processor(text=texts, images=image, padding=True, return_tensors='pt')
labels = model(**inputs, output_segmentation=True).segmentation_logits[0].argmax(0)  # of texts, [{height}, {width}]
```
"""

_SENTENCEPIECE_USE = f"""\
```python
from PIL import Image
import sentencepiece
import torch
from transformers import AutoImageProcessor, AutoModel

model, processor = AutoModel.from_pretrained('FOLDER'), AutoImageProcessor.from_pretrained('FOLDER')
texts, image = ['a photo of a dog', 'a photo of grass'], Image.open('image.jpg').convert('RGB')
pieces = sentencepiece.SentencePieceProcessor(model_file='LOCAL_FOLDER/{SENTENCEPIECE_FILE}')
ids = [torch.tensor(pieces.encode(text) + [pieces.eos_id()]) for text in texts]
inputs = processor(images=image, return_tensors='pt')
inputs['input_ids'] = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pieces.eos_id())
labels = model(**inputs, output_segmentation=True).segmentation_logits[0].argmax(0)  # of texts, [{{height}}, {{width}}]
```

The tokenizer is a SentencePiece model, for which `transformers` has no class that fits: neither `AutoTokenizer` nor
`AutoProcessor` loads. `LOCAL_FOLDER` holds this card. Texts are pooled at their first end of text.
"""

TAGS = """\
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [groupvit, zero-shot-segmentation]"""


def write_folder(folder: epath.Path, run: RestoredRun, spec: state_dicts.ModelSpec, dtype: np.dtype) -> None:
  """Writes the files of a run's model, but for the model card, into an empty folder."""
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


def describe_use(run: RestoredRun) -> str:
  """The part of the model card about `FOLDER`: lines that segment an image."""
  height, width = run.model.vision.image_size
  use = _CLIP_USE if isinstance(run.tokenizer, ClipTokenizer) else _SENTENCEPIECE_USE
  return _USE.format(height=height, width=width, transformers=use.format(height=height, width=width))


def _image_processor(run: RestoredRun) -> dict[str, Any]:
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


def _write_tokenizer(folder: epath.Path, run: RestoredRun) -> None:
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
