"""The training state: parameters, statistics, optimiser, random key, counters and moving average."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from groupvit_jax.model.image_text import ImageTextModel
from groupvit_jax.running import sharding


class TrainState(flax.struct.PyTreeNode):
  """The training state; a checkpoint is exactly this."""

  step: jax.Array  # [], batches consumed so far: also the position in the data
  params: object
  batch_stats: object
  opt_state: object
  rng: jax.Array  # root key; a step uses fold_in(rng, step)
  skipped: jax.Array  # [], updates skipped because something was not finite
  skipped_in_a_row: jax.Array  # [], the same since the last good update
  ema: dict[str, object] | None = None  # moving average of `variables`; None for a run that keeps none

  @classmethod
  def start(cls, variables: dict[str, object], opt_state: object, rng: jax.Array) -> 'TrainState':
    """A state at step 0, without a moving average."""
    zero = jnp.zeros((), jnp.int32)
    return cls(step=zero, **variables, opt_state=opt_state, rng=rng, skipped=zero, skipped_in_a_row=zero)

  @property
  def variables(self) -> dict[str, object]:
    """What `model.apply` takes."""
    return {'params': self.params, 'batch_stats': self.batch_stats}

  @property
  def best_variables(self) -> dict[str, object]:
    """What evaluation uses: the moving average of a run that keeps one."""
    return self.variables if self.ema is None else self.ema

  def start_average(self) -> 'TrainState':
    """This state with a moving average that starts at its variables."""
    return self.replace(ema=jax.tree.map(jnp.copy, self.variables))  # copies: a step donates both


def init_state(
  model: ImageTextModel,
  tx: optax.GradientTransformation,
  seed: int,
  text_shape: tuple[int, int],
  mesh: jax.sharding.Mesh,
  average: bool = False,
) -> TrainState:
  """Initialises a state at step 0 for tokens of `text_shape` (T, L); its arrays are created with their shardings."""
  init = lambda: _init(model, tx, seed, text_shape, average)
  shardings = sharding.state_shardings(jax.eval_shape(init), mesh)
  return jax.jit(init, out_shardings=shardings)()


def abstract_state(
  model: ImageTextModel,
  tx: optax.GradientTransformation,
  text_shape: tuple[int, int],
  mesh: jax.sharding.Mesh,
  average: bool = False,
) -> TrainState:
  """Shapes, dtypes and shardings of the state, without computing it; what a checkpoint is restored onto."""
  shapes = jax.eval_shape(lambda: _init(model, tx, 0, text_shape, average))
  return jax.tree.map(
    lambda leaf, leaf_sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding),
    shapes,
    sharding.state_shardings(shapes, mesh),
  )


def _init(
  model: ImageTextModel, tx: optax.GradientTransformation, seed: int, text_shape: tuple[int, int], average: bool
) -> TrainState:
  init_key, root_key = jax.random.split(jax.random.key(seed))
  variables = model.init(init_key, jnp.zeros((1, *model.vision.image_size, 3)), jnp.zeros((1, *text_shape), jnp.int32))
  state = TrainState.start(variables, tx.init(variables['params']), root_key)
  return state.start_average() if average else state
