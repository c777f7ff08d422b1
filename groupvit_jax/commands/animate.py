"""Animates the panels of a run: how its groups and their names emerge, step by step.

  python -m groupvit_jax.commands.animate --workdir=runs/quickstart --output=emergence.webp

The panels are those that train.py draws with each evaluation and at the config's `eval.panel_steps`.
"""

import io
import json
import os
from pathlib import Path

from absl import flags
from etils import epath
from PIL import Image, ImageDraw, ImageFont, ImageOps

from groupvit_jax import cli
from groupvit_jax.errors import UserError
from groupvit_jax.storage import write_atomic
from groupvit_jax.train.log import panel_path
from groupvit_jax.train.workdir import read_config

FORMATS = ('.webp', '.gif')

_TITLE = 28  # pixels above each panel
_LAST_FRAME = 4  # the last frame stays so many times as long
_QUALITY = 60  # of WebP


def animate(workdir: epath.PathLike, output: str, *, name: str, width: int, frame_ms: int) -> str:
  """Writes the panels of a run as one animated image.

  Args:
    workdir: the run.
    output: file to write, .webp or .gif.
    name: of the evaluation, as in the names of its metrics: 'validation', or that of a benchmark of the config.
    width: of the animation, in pixels.
    frame_ms: how long a panel is shown.

  Returns:
    A line about what was written.
  """
  if Path(output).suffix not in FORMATS:
    raise UserError(f'--output={output}: end it in {" or ".join(FORMATS)}')
  read_config(workdir)
  tag = f'eval/{name}'
  folder = panel_path(workdir, tag, 0).parent
  steps = sorted(int(path.stem) for path in folder.glob('*.png')) if folder.exists() else []
  if len(steps) < 2:
    others = sorted(path.name for path in folder.parent.iterdir()) if folder.parent.exists() else []
    known = f'there are panels of {", ".join(others)}' if others else 'train.py draws them: see eval.panel_steps'
    raise UserError(f'{workdir} has {len(steps)} panels of {name!r}, two are needed; {known}')
  scores = _scores(epath.Path(workdir) / 'metrics.jsonl', f'{tag}/miou')
  score, frames = None, []
  for step in steps:
    score = scores.get(step, score)
    title = f'step {step:,}' + (f'   mIoU {100 * score:.0f}' if score is not None else '')
    path = panel_path(workdir, tag, step)
    try:
      frames.append(_frame(Image.open(io.BytesIO(path.read_bytes())), title, width))
    except OSError as error:
      raise UserError(f'{path} is damaged ({error}); delete it to leave this step out') from error
  height = max(frame.height for frame in frames)  # legends list the classes that occur, and so differ
  frames = [ImageOps.pad(frame, (width, height), color='white', centering=(0, 0)) for frame in frames]
  encoded = io.BytesIO()
  durations = [frame_ms] * (len(frames) - 1) + [_LAST_FRAME * frame_ms]
  options = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0)
  frames[0].save(encoded, Path(output).suffix[1:], quality=_QUALITY, method=6, **options)
  write_atomic(output, encoded.getvalue())
  return f'{output}: {len(frames)} panels from step {steps[0]} to {steps[-1]}, {encoded.tell() / 1e6:.1f} MB'


def _frame(panel: Image.Image, title: str, width: int) -> Image.Image:
  """A panel as wide as asked, under its title."""
  panel = panel.convert('RGB').resize((width, round(panel.height * width / panel.width)), Image.Resampling.LANCZOS)
  frame = Image.new('RGB', (width, panel.height + _TITLE), 'white')
  frame.paste(panel, (0, _TITLE))
  ImageDraw.Draw(frame).text((8, _TITLE / 2), title, 'black', ImageFont.load_default(17), anchor='lm')
  return frame


def _scores(path: epath.Path, metric: str) -> dict[int, float]:
  """Values of a metric by step, from a run's metrics.jsonl."""
  lines = map(json.loads, path.read_text().splitlines())
  return {line['step']: line[metric] for line in lines if metric in line}


if __name__ == '__main__':
  WORKDIR = flags.DEFINE_string('workdir', None, 'The run.')
  OUTPUT = flags.DEFINE_string('output', None, 'File to write: .webp or .gif.')
  NAME = flags.DEFINE_string('name', 'validation', 'The evaluation whose panels to take.')
  WIDTH = flags.DEFINE_integer('width', 640, 'Pixels.', lower_bound=64)
  FRAME_MS = flags.DEFINE_integer('frame_ms', 400, 'How long a panel is shown.', lower_bound=20)
  flags.mark_flags_as_required(['workdir', 'output'])
  options = lambda: dict(name=NAME.value, width=WIDTH.value, frame_ms=FRAME_MS.value)
  cli.run(lambda: print(animate(os.path.expanduser(WORKDIR.value), OUTPUT.value, **options())))
