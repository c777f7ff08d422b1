"""Pixel-adaptive mask refinement: masks that follow the edges of an image (Araslanov and Roth, 2020).

Shape letters: B windows, H W pixels, S masks, N neighbours.
"""

from collections.abc import Sequence
import itertools

import jax
import jax.numpy as jnp

# Weight of the local standard deviation: the smaller, the less passes over an edge.
_WEIGHT, _EPSILON = 0.1, 1e-8
_DIRECTIONS = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]


def refine(masks: jax.Array, images: jax.Array, *, iterations: int, dilations: Sequence[int]) -> jax.Array:
  """Averages masks over similar neighbours, again and again.

  A pixel becomes the average of its neighbours, weighted by `affinities`. That is linear in the masks; where they sum
  to one, the result does.

  Args:
    masks: [B, H, W, S].
    images: of the same pixels [B, H, W, 3], of any scale.
    iterations: how often.
    dilations: distances of the eight neighbours of a pixel, in pixels.

  Returns:
    [B, H, W, S], float32.
  """
  weights, border = affinities(images, dilations), max(dilations)
  starts = border + jnp.array(_offsets(dilations))

  def average(_: int, masks: jax.Array) -> jax.Array:
    padded = jnp.pad(masks, [(0, 0), (border, border), (0, 0), (border, border)], mode='edge')

    def add(total: jax.Array, neighbour: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
      weight, start = neighbour
      return total + weight[:, :, None] * jax.lax.dynamic_slice(padded, (0, start[0], 0, start[1]), masks.shape), None

    # One neighbour after the other: CPUs take less time than for all of them in one expression.
    return jax.lax.scan(add, jnp.zeros_like(masks), (weights, starts))[0]

  masks = jnp.moveaxis(masks.astype(jnp.float32), -1, 2)  # with W last, caches keep a row of weights for all masks
  return jnp.moveaxis(jax.lax.fori_loop(0, iterations, average, masks), 2, -1)


def affinities(images: jax.Array, dilations: Sequence[int]) -> jax.Array:
  """Weights of the neighbours of each pixel: softmax over them of -|I_i - I_j| / (0.1 sigma_i), mean over colours.

  sigma is the standard deviation over the 3 x 3 pixels at all dilations, in each colour. Beyond the border the nearest
  pixel counts.

  Args:
    images: [B, H, W, 3].
    dilations: distances of the eight neighbours.

  Returns:
    [N, B, H, W], N = 8 * len(dilations), in the order of `_offsets`.
  """
  centre, border = jnp.moveaxis(images.astype(jnp.float32), -1, 1), max(dilations)  # [B, 3, H, W]
  padded = jnp.pad(centre, [(0, 0), (0, 0), (border, border), (border, border)], mode='edge')
  starts = border + jnp.array(_offsets(dilations))
  # Loops over neighbours: written out, they would take compilers for CPUs half a minute.
  difference = lambda start: jax.lax.dynamic_slice(padded, (0, 0, start[0], start[1]), centre.shape) - centre

  def add(sums: tuple[jax.Array, jax.Array], start: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    there = difference(start)
    return (sums[0] + there, sums[1] + jnp.square(there)), None

  # Of differences to the centre, whose own are 0. In 8 bits these sums are exact.
  (total, squares), _ = jax.lax.scan(add, (jnp.zeros_like(centre), jnp.zeros_like(centre)), starts)
  count = 9 * len(dilations)
  sigma = jnp.sqrt(jnp.maximum(squares - jnp.square(total) / count, 0) / (count - 1))
  scale = 1 / (_EPSILON + _WEIGHT * sigma)
  # No maximum is subtracted: the centre is a ninth of the pixels, so differences average at most 3.2 sigma, and the
  # weights of a pixel do not all vanish.
  weights = jax.lax.map(lambda start: jnp.exp(-(jnp.abs(difference(start)) * scale).mean(axis=1)), starts)
  total, _ = jax.lax.scan(lambda total, weight: (total + weight, None), jnp.zeros_like(weights[0]), weights)
  return weights / total[None]


def _offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
  """Rows and columns from a pixel to its neighbours."""
  return [(dilation * y, dilation * x) for dilation in dilations for y, x in _DIRECTIONS]
