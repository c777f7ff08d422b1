"""GroupViT in JAX: semantic segmentation that emerges from captions."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from groupvit_jax.predictor import Predictor as Predictor

__version__ = '0.1.0'


def __getattr__(name: str) -> object:
  # JAX takes a second to import: commands parse their flags first.
  if name == 'Predictor':
    from groupvit_jax.predictor import Predictor

    return Predictor
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
