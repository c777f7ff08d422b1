"""The model card (README.md) of an exported model: licence, use, data, scores and configuration."""

from collections.abc import Mapping, Sequence
import json
from typing import Any

from etils import epath
import ml_collections

from groupvit_jax.errors import UserError
from groupvit_jax.interop.licence import Licence
from groupvit_jax.train.restored_run import RestoredRun

Report = Mapping[str, Any]  # a results.json of eval.py

_CARD = """\
---
{header}
---
# GroupViT

Segments images into named classes, trained on captions alone (Xu et al., CVPR 2022). Written by groupvit_jax {code}
from step {step:,} of its run.

## Use

{use}
## Data

{data}

## Scores

{scores}
## Configuration

```json
{config}
```
"""

_METRICS = {
  'miou': 'mIoU',
  'pixel_accuracy': 'pixel accuracy',
  'oracle_miou': 'oracle mIoU',
  'top1': 'top-1 accuracy',
  'top5': 'top-5 accuracy',
}


def write(
  folder: epath.Path, run: RestoredRun, *, licence: Licence, use: str, tags: str, reports: Sequence[Report]
) -> None:
  """Writes the card into the folder of an exported model.

  `use` is Markdown on how to use the format; `tags` are further lines of the header, as the Hugging Face Hub knows
  them; `reports` are of evaluations of this checkpoint.
  """
  header = '\n'.join(line for line in (licence.header(), tags) if line)
  (folder / 'README.md').write_text(
    _CARD.format(
      header=header,
      code=run.provenance['code'],
      step=run.step,
      use=use,
      data=_describe_data(run.config),
      scores='\n'.join(map(_table, reports)) or 'None were given to the export.\n',
      config=json.dumps(json.loads(run.config.to_json()), indent=2),
    )
  )


def read_reports(run: RestoredRun, paths: Sequence[epath.PathLike]) -> list[Report]:
  """Reads reports; raises UserError for one that is not there, holds no scores, or is of another checkpoint."""
  return [_check(_read(epath.Path(path)), run, path) for path in paths]


def _read(path: epath.Path) -> Report:
  if not path.exists():
    raise UserError(f'there is no file {path}; name a results.json that eval.py wrote, or leave --scores out')
  try:
    report = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error}); name a results.json that eval.py wrote') from error
  known = isinstance(report, dict) and {'benchmark', 'num_images', 'protocol', 'provenance'} <= report.keys()
  if not known or not any(name in report for name in _METRICS):
    raise UserError(f'{path} holds no scores; name the results.json of an evaluation on labelled images')
  return report


def _check(report: Report, run: RestoredRun, path: epath.PathLike) -> Report:
  ours = run.provenance
  for name in ('step', 'weights'):
    theirs = report['provenance'].get(name)
    if theirs != ours[name]:
      raise UserError(
        f'{path} has the scores of {name}={theirs}, and what is exported is {name}={ours[name]}; '
        'evaluate it again, or name another report with --scores'
      )
  return report


def _describe_data(config: ml_collections.ConfigDict) -> str:
  """The sources and numbers of the training pairs, and the texts of an image."""
  if 'imported' in config:
    return f'Not known: the weights were imported from {config.imported.source} ({config.imported.form}).'
  data, lines = config.data, []
  if data.source == 'scenes':
    scenes = data.scenes
    lines.append(
      f'Scenes made while training, with captions: {len(scenes.things)} things ({", ".join(scenes.things)}) '
      f'on {len(scenes.stuff)} kinds of stuff ({", ".join(scenes.stuff)}).'
    )
  elif data.source == 'pairs':
    lines.append(f'Image-text pairs of `{data.path}`.')
  else:
    lines += ['| set | format | pairs expected | weight |', '| --- | --- | --: | --: |']
    lines += [
      f'| {name} | {each.format} | {f"{each.expected:,}" if each.expected else "unknown"} | '
      f'{each.weight or "by size"} |'
      for name, each in data.sets.items()
    ]
    lines.append('')
  prompts = f'and {data.num_prompts} prompts made of it' if data.num_prompts else 'alone'
  lines.append(
    f'Texts of an image: its caption {prompts}; {config.total_steps:,} steps of {config.batch_size:,} images.'
  )
  if 'init_from' in config and config.init_from:
    lines.append(f'Training started from the weights in {config.init_from}.')
  return '\n'.join(lines)


def _table(report: Report) -> str:
  """The metrics of a report, with their protocol."""
  scores = {title: report[key] for key, title in _METRICS.items() if report.get(key) is not None}
  rows = ''.join(f'| {title} | {score:.1%} |\n' for title, score in scores.items())
  return (
    f'{report["benchmark"]}, {report["num_images"]:,} images:\n\n| metric | value |\n| --- | --- |\n{rows}\n'
    f'Protocol:\n\n```json\n{json.dumps(report["protocol"], indent=2)}\n```\n'
  )
