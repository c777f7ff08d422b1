"""Damaged and hostile files: each reader reads or refuses, and never crashes, hangs or looks at other files."""

import dataclasses
import gzip
import html.parser
import io
import json
import pathlib
import random

import numpy as np
from PIL import Image
import pytest
import safetensors.numpy

from groupvit_jax.data import clip_bpe, images, tars
from groupvit_jax.data.tokenizer import build_tokenizer, train_sentencepiece
from groupvit_jax.errors import UserError
from groupvit_jax.eval import report
from groupvit_jax.interop import huggingface, native, read, state_dicts, torch_file
from groupvit_jax.prepare.segmentation_layouts import decode_run_lengths
from groupvit_jax.train.workdir import read_config
from tests.eval.test_report import make_result, make_row
from tests.fuzz.mutations import fuzz, mutate, mutate_json, mutated
from tests.photos import photo
from tests.tars import AUGMENT, samples, write_tar
from tests.tiny import tiny_config
from tests.weights import random_variables


def tiny_spec() -> state_dicts.ModelSpec:
  return state_dicts.ModelSpec(tiny_config().model, 20, 3, multi_label=False)


def test_tar(tmp_path):
  seeds = [pathlib.Path(write_tar(tmp_path / f'{n}.tar', samples(range(3)), n)).read_bytes() for n in (0, 1, 2)]

  def mutant(draw: random.Random) -> bytes:
    """Where checksums are right again, what stands in headers is read."""
    data = bytearray(mutate(draw.choice(seeds), draw))
    if draw.random() < 0.5:  # a header: name, mode, owner, group, size, time, checksum, kind
      at, field = 512 * draw.randrange(4), draw.choice((range(100), range(124, 136), range(156, 157), range(345, 500)))
      for offset in draw.sample(field, draw.randrange(1, len(field) + 1)):
        data[at + offset : at + offset + 1] = draw.choice((b'0', b'7', b'/', b'\0', b'\xff', draw.randbytes(1)))
    for at in range(0, len(data) - 511, 512):
      if data[at + 257 : at + 262] == b'ustar':
        data[at + 148 : at + 156] = b' ' * 8
        data[at + 148 : at + 156] = b'%06o\0 ' % sum(data[at : at + 512])
    return bytes(data)

  fuzz('tar', mutant, lambda data: tars.index_tar(lambda at, n: data[at : at + n], len(data), 4096, 'txt'), 300)


def test_torch_file(tmp_path, torch):
  path, state = tmp_path / 'a.pth', {'a': torch.arange(6.0).reshape(2, 3), 'b': torch.ones(4, dtype=torch.bfloat16)}
  torch.save({'model': state, 'epoch': 3}, path)
  fuzz(
    'torch_file',
    mutated([path.read_bytes()]),
    lambda data: path.write_bytes(data) and torch_file.read_state_dict(path),
    300,
  )


def test_weights_folder(tmp_path):
  """config.json, weights and the index of shards; a shard that it lists lies beside it."""
  spec = tiny_spec()
  config, state = native.spec_to_json(spec), native.to_flat(random_variables(spec.build()))
  weights = safetensors.numpy.save(state)
  index = {'weight_map': dict.fromkeys(state, 'shard.safetensors')}
  files = {'model.safetensors': weights, 'shard.safetensors': weights, 'model.safetensors.index.json': b''}

  def mutant(draw: random.Random) -> dict[str, bytes]:
    made = dict(files)
    parts = {'config.json': config, 'model.safetensors.index.json': index}
    which = draw.choice(('config.json', 'model.safetensors', 'model.safetensors.index.json'))
    if which in parts:
      parts[which] = mutate_json(parts[which], draw)
    else:
      head = int.from_bytes(weights[:8], 'little') + 8
      made[which] = mutate(weights[:head], draw) + weights[head:]
    if which == 'model.safetensors.index.json':
      del made['model.safetensors']
    return made | {name: json.dumps(value).encode() for name, value in parts.items()}

  def open_mutant(made: dict[str, bytes]) -> None:
    (tmp_path / 'model.safetensors').unlink(missing_ok=True)
    for name, data in made.items():
      (tmp_path / name).write_bytes(data)
    read.read_weights(tmp_path)

  fuzz('weights_folder', mutant, open_mutant, 20)
  (tmp_path / 'model.safetensors').unlink(missing_ok=True)
  (tmp_path / 'outside.safetensors').write_bytes(weights)
  for name in (f'../{tmp_path.name}/outside.safetensors', str(tmp_path / 'outside.safetensors'), '..', ''):
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': name}}))
    with pytest.raises(UserError, match='to files beside it'):
      read.read_weights(tmp_path)


def test_model_config():
  """Descriptions of models, Hugging Face's and ours: sizes that no machine holds are refused."""
  theirs = huggingface.to_huggingface_config(tiny_spec()._replace(eos_id=19), bos_id=None, pad_id=0, dtype='float32')
  ours = native.spec_to_json(tiny_spec())
  readers = {'theirs': (theirs, huggingface.from_huggingface_config), 'ours': (ours, native.spec_from_json)}

  def mutant(draw: random.Random) -> tuple[str, dict]:
    kind = draw.choice(list(readers))
    return kind, mutate_json(readers[kind][0], draw)

  fuzz('model_config', mutant, lambda made: readers[made[0]][1](made[1]).build(), 200)


def test_run_config(tmp_path):
  """The config of a workdir."""
  seed = json.loads(tiny_config().to_json())

  def mutant(draw: random.Random) -> bytes:
    return (
      json.dumps(mutate_json(seed, draw)).encode() if draw.random() < 0.5 else mutate(json.dumps(seed).encode(), draw)
    )

  for data in (b'[]', b'5', b'{"a.b": 1}'):
    (tmp_path / 'config.json').write_bytes(data)
    with pytest.raises(UserError, match='is not a config'):
      read_config(tmp_path)
  fuzz('run_config', mutant, lambda data: (tmp_path / 'config.json').write_bytes(data) and read_config(tmp_path), 100)


def test_tokenizer(tmp_path):
  """SentencePiece, and CLIP's three forms."""
  captions = [f'a {colour} {thing}' for colour in ('red', 'blue') for thing in ('dog', 'cat', 'cow')] * 5
  train_sentencepiece(captions, tmp_path / 'tokenizer.model', 280)
  vocab = {token: i for i, token in enumerate([*'abc', 'a</w>', 'b</w>', 'c</w>', 'ab', clip_bpe.BOS, clip_bpe.EOS])}
  forms = [
    {'tokenizer.model': (tmp_path / 'tokenizer.model').read_bytes()},
    {'tokenizer.json': json.dumps({'model': {'vocab': vocab, 'merges': ['a b']}}).encode()},
    {'vocab.json': json.dumps(vocab).encode(), 'merges.txt': b'#version\na b\n'},
    {clip_bpe.OPENAI_FILE: b'#version\na b\nab c\n'},
  ]
  names = {name for form in forms for name in form}

  def mutant(draw: random.Random) -> dict[str, bytes]:
    made = dict(draw.choice(forms))
    name = draw.choice(list(made))
    if name.endswith('.json') and draw.random() < 0.5:
      made[name] = json.dumps(mutate_json(json.loads(made[name]), draw)).encode()
    else:
      made[name] = mutate(made[name], draw)
    if name.endswith('.gz'):
      made[name] = gzip.compress(made[name], 1)
      made[name] = mutate(made[name], draw) if draw.random() < 0.3 else made[name]
    return made

  def encode(made: dict[str, bytes]) -> None:
    for name in names:
      (tmp_path / name).unlink(missing_ok=True)
    for name, data in made.items():
      (tmp_path / name).write_bytes(data)
    tokenizer = build_tokenizer(tmp_path)
    ids = tokenizer.encode(['a red dog', 'abc'], 6)
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size

  fuzz('tokenizer', mutant, encode, 200)


def test_image(monkeypatch):
  monkeypatch.setattr(images, 'LARGEST', 2**22)
  seeds = []
  for kind in ('JPEG', 'PNG', 'GIF', 'WEBP', 'TIFF', 'BMP', 'PPM', 'ICO', 'TGA', 'PCX', 'JPEG2000', 'AVIF'):
    data = io.BytesIO()
    Image.fromarray(photo(16, 24)).convert('P' if kind == 'GIF' else 'RGB').save(data, kind)
    seeds.append(data.getvalue())

  def decode(data: bytes) -> None:
    header = images.read_jpeg_header(data, 'a')
    if header is not None and header.height * header.width <= images.LARGEST:
      images.decode_jpeg_rows(data, header, min(8, header.height), 2, 'a')
    assert images.read_image(data, 'a').shape[2] == 3
    assert AUGMENT(data, np.random.default_rng(0), 'a').shape == (16, 16, 3)

  fuzz('image', mutated([*seeds, seeds[0]]), decode, 300)


def test_run_lengths():
  seeds = [b'<', b'66', b'=O', b'07190h0', b'b01n0b01', b'0' * 30]  # '=O' are 13 and -1

  def decode(data: tuple[bytes, tuple[int, int]]) -> None:
    assert decode_run_lengths(*data).shape == data[1]

  mutant = lambda draw: (mutate(draw.choice(seeds), draw), draw.choice(((3, 4), (0, 0), (5, 2), (2**20, 2**20))))
  fuzz('run_lengths', mutant, decode, 500)


def test_report_shows_hostile_names_as_text():
  """No name of a class, an image or a setting becomes an element or an attribute of the page."""
  result, row = make_result(), make_row(8, 8)
  seeds = [
    b'<script>alert(1)</script>',
    b'" onerror="x',
    b"' style='",
    b'&lt;b&gt;',
    b'<!--',
    b'</style><img src=x>',
    b'dog',
  ]

  def elements(page: str) -> list[tuple[str, list[str]]]:
    found = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.append((tag, [name for name, _ in attrs]))
    parser.handle_comment = lambda text: found.append(('comment', [text]))
    parser.feed(page)
    return found

  def make(name: str) -> list:
    benchmark = result.benchmark
    classes = tuple(f'{name}{i}' for i in range(benchmark.num_classes))
    named = dataclasses.replace(
      result, benchmark=dataclasses.replace(benchmark, name=name, classes=classes), provenance={'code': name}
    )
    return elements(report.make_page(named, {'best': [(name, 0.5, row)]}, None, name))

  plain = make('dog')

  def check(name: str) -> None:
    if not name.strip():
      raise UserError('a class has a name')
    assert make(name) == plain

  fuzz('report', lambda draw: mutate(draw.choice(seeds), draw).decode('utf-8', 'replace'), check, 20)
