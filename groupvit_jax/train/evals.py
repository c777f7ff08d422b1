"""Evaluations and pictures of a run while it trains: when they are due, and which an earlier start left."""

from collections.abc import Callable, Mapping, Sequence
import json
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from groupvit_jax.data import pipeline
from groupvit_jax.data.mixture import Mixture
from groupvit_jax.data.tokenizer import Tokenizer
from groupvit_jax.eval import draw as visualize
from groupvit_jax.eval import zero_shot
from groupvit_jax.eval.evaluator import build_scene_evaluator, Evaluator
from groupvit_jax.eval.prefetch import BadImage
from groupvit_jax.eval.protocols import native_protocol
from groupvit_jax.eval.result import Result
from groupvit_jax.eval.window_encoder import group_maps
from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.running import processes
from groupvit_jax.running.interrupts import Interrupts, Preempted
from groupvit_jax.train import in_training
from groupvit_jax.train.checkpoint import BestCheckpoint
from groupvit_jax.train.log import RunLog
from groupvit_jax.train.state import TrainState

SCENES = 'validation'  # the held-out scenes, as an evaluation
_TRAINING = 'train/pictures'
_SHOWN = 4  # pictures on a panel


class Scheduled(NamedTuple):
  """Something to do with the variables every so many steps, and after the last one."""

  name: str
  every_steps: int  # 0 for never
  evaluate: Callable[..., Result | zero_shot.Result] | None  # (variables, provenance=...); None for pictures alone
  draw: Callable[[dict], np.ndarray] | None  # variables -> panel uint8 [H, W, 3]; None where there is nothing to see

  def due(self, step: int, total_steps: int) -> bool:
    """Whether it is its turn after a step."""
    return self.every_steps > 0 and step > 0 and (step % self.every_steps == 0 or step == total_steps)


def schedule(
  config: ml_collections.ConfigDict,
  source: Mixture,
  opened: Sequence[in_training.OpenedEval],
  model: ImageTextModel,
  tokenizer: Tokenizer,
  mesh: jax.sharding.Mesh,
) -> list[Scheduled]:
  """Everything that a run's config asks for; it compiles at the first call only.

  Args:
    config: of the run.
    source: its training data.
    opened: its benchmarks.
    model: its model.
    tokenizer: its tokenizer.
    mesh: the devices on which its variables live, each with pictures of its own.
  """
  if config.data.source == 'scenes':
    scenes = build_scene_evaluator(config, model, tokenizer, mesh)
    found = [Scheduled(SCENES, config.eval.every_steps, scenes.evaluate, scenes.panel)]
  else:
    examples = pipeline.build_examples(config, source, tokenizer, first_batch=0)
    drawer = _TrainingPictures(examples, model, mesh)
    found = [Scheduled(_TRAINING, config.eval.every_steps, None, drawer.draw)]
  for each in opened:
    built = each.build(model, tokenizer, mesh)
    draw = built.panel if isinstance(built, Evaluator) else None
    found.append(Scheduled(each.name, each.every_steps, built.evaluate, draw))
  return found


class RunEvals:
  """Does what is scheduled, logs it, and keeps the best checkpoint."""

  def __init__(
    self,
    scheduled: Sequence[Scheduled],
    config: ml_collections.ConfigDict,
    log: RunLog,
    best: BestCheckpoint,
    interrupts: Interrupts,
    facts: Callable[..., Mapping[str, str]],
  ):
    """Holds on to its arguments.

    Args:
      scheduled: see `schedule`.
      config: of the run.
      log: where figures and panels go.
      best: is offered every figure.
      interrupts: a signal leaves an evaluation at once.
      facts: (step=...) -> what figures depend on besides their protocol.
    """
    self._scheduled, self._config, self._log, self._best = scheduled, config, log, best
    self._interrupts, self._facts = interrupts, facts

  def due(self, step: int) -> list[Scheduled]:
    """What to do after a step."""
    return [each for each in self._scheduled if each.due(step, self._config.total_steps)]

  def left(self, step: int) -> list[Scheduled]:
    """What should have been evaluated after the step that a run goes on from, and has no figures in its log."""
    logged = processes.all_gather_objects(sorted(self._log.first_figures))[0]
    done = lambda name: any(figure.startswith(in_training.prefix(name)) for figure in logged)
    return [each for each in self.due(step) if each.evaluate is not None and not done(each.name)]

  def run(self, due: Sequence[Scheduled], state: TrainState) -> bool:
    """Does all that is due.

    Returns:
      Whether all evaluations were done: a signal leaves the one that it comes in, and those after it. One with a bad
      picture is left out: the others, and the run, do without.
    """
    step = int(state.step)
    for place, each in enumerate(due):
      result = panel = None
      try:
        with self._interrupts.immediately():
          if each.evaluate is not None:
            result = each.evaluate(state.best_variables, provenance=self._facts(step=step))
          if each.draw is not None:
            panel = each.draw(state.best_variables)
      except Preempted:
        self._log.say(f'{each.name} after step {step} left for a signal')
        return not any(other.evaluate for other in due[place:])
      except BadImage as fault:
        self._log.say(f'{each.name} after step {step} left out: {fault}')
      if panel is not None:
        self._log.picture(step, each.name if result is None else f'eval/{each.name}', panel)
      if result is not None:
        self._keep(each.name, result, state)
    return True

  def _keep(self, name: str, result: Result | zero_shot.Result, state: TrainState) -> None:
    """Keeps what was found: the state if it is the best so far, then the figures, beside what they depend on.

    In this order: an evaluation that has figures in the log is not done again.
    """
    step, scalars = int(state.step), result.scalars()
    figures = in_training.figures(name, scalars)
    if self._best.offer(figures, state, self._config, result.settings()):
      self._log.say(f'step {step}  {self._config.checkpoint.best} {self._best.value:.3f} is the best so far; kept')
    self._log.figures(step, figures, {f'eval/{name}/settings': result.settings()})
    self._log.text(step, f'eval/{name}/settings', json.dumps(result.to_json(), indent=2))
    shown = [key for key in ('miou', 'oracle_miou', 'top1') if key in scalars]
    self._log.say(f'step {step}  {name}  ' + '  '.join(f'{key} {scalars[key]:.3f}' for key in shown))


class _TrainingPictures:
  """A few training pictures and their groups: what can be seen where nothing is labelled."""

  def __init__(self, examples: pipeline.Examples, model: ImageTextModel, mesh: jax.sharding.Mesh):
    self._examples, self._model, self._mesh = examples, model, mesh
    self._images: list[np.ndarray] = []

  def draw(self, variables: dict) -> np.ndarray:
    """A panel of pictures, cropped as in the run's first batch; the same ones at every call, on every host."""
    if not self._images:
      self._images = [self._examples.preview(i).image for i in range(min(_SHOWN, len(self._examples)))]
    window = native_protocol(tuple(self._model.vision.image_size)).window
    maps = group_maps(self._model, variables, self._images, window, self._mesh)
    rows = [visualize.Row(image, None, None, stages) for image, stages in zip(self._images, maps, strict=True)]
    return visualize.draw_panel(rows, (), ())
