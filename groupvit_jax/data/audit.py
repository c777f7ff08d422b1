"""Audit of a config's data before training: usable and duplicate records, caption lengths, speed, sample pages.

  python -m groupvit_jax.data.audit --config=configs/EXPERIMENT.py --output=audits/EXPERIMENT

Writes `audit.json` and, for each set, a page of samples as the model sees them. Ends with exit code 3
when more records cannot be used than the config's `data.max_fault_share`.
"""

import base64
import collections
from collections.abc import Iterator, Mapping
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import html
import io
import json
import pathlib
import tempfile
import time

from absl import flags
import ml_collections
from ml_collections import config_flags
import numpy as np
from PIL import Image
import tqdm

from groupvit_jax import cli, config_entries
from groupvit_jax.data import bad_records, pipeline, prompts
from groupvit_jax.data.mixture import Mixture
from groupvit_jax.data.sources import build_source, sample_captions
from groupvit_jax.data.tokenizer import build_tokenizer, Tokenizer, train_sentencepiece
from groupvit_jax.storage import write_atomic

_THREADS = 16
_LISTED = 100  # bad records named in the report, for each set
_SHOWN = 24  # images on a page
_PAGE = """<!doctype html><meta charset="utf-8"><title>Samples</title><style>
body { font: 14px sans-serif; display: grid; grid-template-columns: repeat(auto-fill, 224px); gap: 12px; }
figure { margin: 0; overflow-wrap: anywhere; } img { width: 224px; } p { margin: 2px 0; } small { color: #666; }
</style>
"""
_TIMED = 128  # examples
_PERCENTILES = (0, 5, 50, 95, 100)


@dataclasses.dataclass
class RecordStats:
  """Statistics of one record."""

  key: str = ''
  cause: str = ''  # why it cannot be used
  image: bytes = b''  # digests, to tell duplicates
  caption: bytes = b''
  tokens: int = 0
  words: int = 0


def audit(config: ml_collections.ConfigDict, output: pathlib.Path, samples: int) -> dict[str, object]:
  """Audits a config's data; returns the report, which it writes into a folder with the pages.

  `samples` are the records read in each set, spread evenly; 0 reads all.
  """
  config_entries.check(config)
  source = build_source(config.data, tuple(config.model.vision.image_size))
  tokenizer = _tokenizer(config.tokenizer, source)
  report = source.metadata()
  for part in source.sets:
    examples = _examples(config, Mixture((dataclasses.replace(part, weight=0.0),)), tokenizer)
    found = list(_look_at(examples, samples or len(part.source)))
    expected = config.data.sets[part.name].expected if config.data.source == 'sets' else 0
    report['sets'][part.name] |= {'expected': expected, 'size': part.describe(expected)} | summarize(
      found, config.data.num_prompts, config.model.text.context_length
    )
    report['sets'][part.name]['examples_per_core_second'] = round(_rate(examples), 1)
    _write_page(output / f'{part.name}.html', examples)
  write_atomic(str(output / 'audit.json'), (json.dumps(report, indent=2) + '\n').encode())
  return report


def summarize(found: list[RecordStats], num_prompts: int, text_length: int) -> dict[str, object]:
  """Counts over the records of a set: for M prompts and a text length of L tokens."""
  good = [record for record in found if not record.cause]
  bad = [record for record in found if record.cause]
  tokens = [record.tokens for record in good]
  words = [record.words for record in good]
  return {
    'looked_at': len(found),
    'unusable': dict(collections.Counter(record.cause for record in bad).most_common()),
    'unusable_share': len(bad) / max(len(found), 1),
    'unusable_keys': [f'{record.key}: {record.cause}' for record in bad[:_LISTED]],
    'duplicate_images': _duplicates(record.image for record in good),
    'duplicate_captions': _duplicates(record.caption for record in good),
    'tokens_percentiles': _percentiles(tokens),
    'captions_cut': sum(n > text_length for n in tokens) / max(len(good), 1),
    'words_percentiles': _percentiles(words),
    'words_mean': float(np.mean(words)) if words else 0.0,
    'captions_with_too_few_words': sum(n < num_prompts for n in words) / max(len(good), 1),
  }


def describe(report: Mapping[str, object]) -> str:
  """A set's report in a few lines, for people."""
  causes = ', '.join(f'{cause} {n:,}' for cause, n in report['unusable'].items()) or 'none'
  spread = lambda values: ' / '.join(map(str, values))
  return '\n'.join(
    [
      f'{report["size"]}, digest {report["digest"]}',
      f'  looked at           {report["looked_at"]:,}',
      f'  unusable            {report["unusable_share"]:.2%} ({causes})',
      f'  duplicates          {report["duplicate_images"]:,} images, {report["duplicate_captions"]:,} captions',
      f'  tokens per caption  {spread(report["tokens_percentiles"])} (least, 5 %, median, 95 %, most); '
      f'{report["captions_cut"]:.1%} are cut',
      f'  words for prompts   {spread(report["words_percentiles"])}, {report["words_mean"]:.1f} on average; '
      f'{report["captions_with_too_few_words"]:.1%} have too few',
      f'  examples per core   {report["examples_per_core_second"]:.0f}/s, decoded, cropped and tagged',
    ]
  )


def _look_at(examples: pipeline.Examples, count: int) -> Iterator[RecordStats]:
  """Reads records spread evenly over a set of one; threads, because shards may be far away."""
  size = len(examples.source)
  count = min(count, size)
  look = lambda number: _look(examples, number * size // count)
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    with tqdm.tqdm(total=count, unit='record', disable=None) as bar:
      for start in range(0, count, 64 * _THREADS):  # the pool would otherwise read ahead without end
        for found in pool.map(look, range(start, min(start + 64 * _THREADS, count))):
          bar.update()
          yield found


def _look(examples: pipeline.Examples, index: int) -> RecordStats:
  try:
    record = examples.source[index]
    examples.image(record, position=index)
  except bad_records.BadRecord as error:
    return RecordStats(error.key, error.cause)
  text, image = record['text'], record['image']
  pixels = image if isinstance(image, bytes) else image.tobytes()
  tokens = examples.tokenizer.encode([text], len(text.encode()) + 8)[0]
  length = int(np.argmax(tokens == examples.tokenizer.eos_id)) + 1
  return RecordStats(
    record['key'], '', _digest(pixels), _digest(text.encode('utf-8', 'replace')), length, len(prompts.nouns(text))
  )


def _rate(examples: pipeline.Examples) -> float:
  """Examples that one core makes in a second, reading left out and nothing else running in this process."""
  seconds, count = 0.0, min(_TIMED, len(examples.source))
  for number in range(count):
    with contextlib.suppress(bad_records.BadRecord):
      record = examples.source[number * len(examples.source) // count]
      started = time.thread_time()
      examples.image(record, position=number)
      examples.texts(record['text'], position=number)
      seconds += time.thread_time() - started
  return count / seconds if seconds else 0.0


def _write_page(path: pathlib.Path, examples: pipeline.Examples) -> None:
  """Writes an HTML page of examples as the model sees them: images with their captions and, in grey, prompts."""
  figures = []
  for number in range(min(_SHOWN, len(examples))):
    example, image = examples.load(number), io.BytesIO()
    Image.fromarray(example.image).save(image, 'WEBP', quality=90)
    caption, *prompts = map(html.escape, examples.texts(example.caption, example.position))
    source = f'data:image/webp;base64,{base64.b64encode(image.getvalue()).decode()}'
    figures.append(f'<figure><img src="{source}"><p>{caption}</p><small>{"<br>".join(prompts)}</small></figure>')
  write_atomic(str(path), (_PAGE + '\n'.join(figures)).encode('utf-8', 'replace'))


def _examples(config: ml_collections.ConfigDict, source: Mixture, tokenizer: Tokenizer) -> pipeline.Examples:
  """A run's examples, over one of its sets, on one host, in batches that no set is too small for."""
  config = config.copy_and_resolve_references()
  config.batch_size, config.total_steps = 1, _SHOWN
  return pipeline.build_examples(config, source, tokenizer, first_batch=0)


def _tokenizer(config: ml_collections.ConfigDict, source: Mixture) -> Tokenizer:
  """The tokenizer a config names, or one like that which its run would train."""
  if config.path:
    return build_tokenizer(config.path)
  with tempfile.TemporaryDirectory() as folder:
    return train_sentencepiece(
      sample_captions(source, config.num_captions), f'{folder}/tokenizer.model', config.vocab_size
    )


def _duplicates(digests: Iterator[bytes]) -> int:
  """How many occurrences are not the first."""
  counts = collections.Counter(digests)
  return counts.total() - len(counts)


def _digest(data: bytes) -> bytes:
  return hashlib.blake2b(data, digest_size=8).digest()


def _percentiles(values: list[int]) -> list[int]:
  return [round(float(value)) for value in np.percentile(values, _PERCENTILES)] if values else []


def main() -> int:
  """Runs the command; see this module."""
  config, output = _CONFIG.value, pathlib.Path(_OUTPUT.value).expanduser()
  report = audit(config, output, _SAMPLES.value)
  for part in report['sets'].values():
    print(describe(part))
  print(f'fingerprint {report["fingerprint"]}; report and samples in {output}')
  worst = max(report['sets'], key=lambda name: report['sets'][name]['unusable_share'])
  share = report['sets'][worst]['unusable_share']
  if share > config.data.max_fault_share:
    print(f'{worst} has {share:.1%} unusable records, more than data.max_fault_share={config.data.max_fault_share}')
    return cli.EXIT_PARTIAL
  return 0


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', None, 'The experiment; --config.x.y=value overrides an entry.')
  _OUTPUT = flags.DEFINE_string('output', None, 'Folder for the report and the pages of samples.')
  _SAMPLES = flags.DEFINE_integer('samples', 2000, 'Records looked at in each set; 0 for all.', lower_bound=0)
  flags.mark_flags_as_required(['config', 'output'])
  cli.run(main)
