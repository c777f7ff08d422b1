"""GroupViT in JAX: semantic segmentation that emerges from captions.

    from groupvit_jax import Predictor

    predictor = Predictor.from_pretrained('runs/quickstart')
    prediction = predictor('image.png', ['dog|puppy', 'banana', 'grass'])

`Predictor` segments images, `Prediction` is what it returns, and `UserError` is raised with one line for each mistake.
`python -m groupvit_jax` lists the commands.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from groupvit_jax.errors import UserError as UserError
  from groupvit_jax.prediction import Prediction as Prediction
  from groupvit_jax.predictor import Predictor as Predictor

__version__ = '0.1.0'

# JAX takes a second to import: commands parse their flags first.
_HOMES = {'Predictor': 'predictor', 'Prediction': 'prediction', 'UserError': 'errors'}
__all__ = ['Predictor', 'Prediction', 'UserError']


def __getattr__(name: str) -> object:
  if name in _HOMES:
    return getattr(importlib.import_module(f'groupvit_jax.{_HOMES[name]}'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  return [*__all__, '__version__']
