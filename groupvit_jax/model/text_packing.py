"""Packs texts into rows, and encodes a batch's texts without computing what pads them.

Nothing after a text's end matters to a causal tower.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp

from groupvit_jax.errors import UserError

# A multiple of the tiles of matrix units and vector registers. Longer rows waste less and cost more attention; with 128
# tokens of width 256 it is 8 % of the arithmetic.
ROW_LENGTH = 128

# The loop computes an eighth as many rows at a time as the budget pays for.
_REST_SHARE = 8


class TextRows(NamedTuple):
  """Input of the text tower: rows of tokens, and where each of a group's n texts ends in its R rows."""

  tokens: jax.Array  # [P, R, W], ids
  positions: jax.Array  # [P, R, W], within a token's own text
  texts: jax.Array  # [P, R, W], which text a token is of; [1, 1, W] where all rows are alike
  ends: jax.Array  # [P, n], index among the R * W tokens of a group


class Packing(flax.struct.PyTreeNode):
  """Positions of the texts of P groups of n in rows, in their order."""

  tokens: jax.Array  # [P, n, L], as they came
  lengths: jax.Array  # [P, n], end included
  starts: jax.Array  # [P, n], index of the first token, rows laid end to end: row r starts at r * W
  row_length: int = flax.struct.field(pytree_node=False)  # W

  @property
  def num_rows(self) -> jax.Array:
    """Rows that each group takes, [P]."""
    return self.starts[:, -1] // self.row_length + 1


def eos_positions(tokens: jax.Array, eos_id: int) -> jax.Array:
  """Index of the first end-of-text token of each text [..., L], -> [...].

  The first, because CLIP pads with the same id; by equality, because only in CLIP's vocabulary is it the largest.
  """
  return jnp.argmax(tokens == eos_id, axis=-1)


def one_a_row(tokens: jax.Array, eos_id: int) -> TextRows:
  """Rows of one text each, [n, L]; a group is a text."""
  length = tokens.shape[1]
  return TextRows(
    tokens[:, None],
    jnp.arange(length)[None, None],
    jnp.zeros((1, 1, length), jnp.int32),
    eos_positions(tokens, eos_id)[:, None],
  )


def pack(tokens: jax.Array, eos_id: int, row_length: int) -> Packing:
  """Packs texts one after another; one that would cross the end of a row starts the next.

  Args:
    tokens: ids [P, n, L]; groups are packed apart from each other.
    eos_id: ends a text.
    row_length: W, at least L.

  Returns:
    The position of each text.

  Raises:
    UserError: W is less than L.
  """
  if row_length < tokens.shape[-1]:
    raise UserError(f'rows of {row_length} tokens do not hold texts of up to {tokens.shape[-1]}; use longer ones')
  lengths = eos_positions(tokens, eos_id) + 1
  starts = jax.vmap(lambda group: _next_fit(group, row_length))(lengths)
  return Packing(tokens, lengths, starts, row_length)


def _next_fit(lengths: jax.Array, row_length: int) -> jax.Array:
  """Starts [n] of texts of these lengths.

  If text i starts a row, text `after[i]` starts the next. Pointer doubling follows this chain from the first text in
  log2(n) steps.
  """
  count = len(lengths)
  before = jnp.cumsum(lengths) - lengths  # tokens of the texts before each
  after = jnp.searchsorted(before + lengths, before + row_length, side='right')  # n where all the rest fits
  after = jnp.append(after, count)  # the text after the last one leads to itself
  starts_row = jnp.arange(count + 1) == 0
  for _ in range(max(count - 1, 1).bit_length()):
    starts_row = starts_row.at[after].max(starts_row)
    after = after[after]
  starts_row = starts_row[:count]
  row = jnp.cumsum(starts_row) - 1
  row_start = jax.lax.cummax(jnp.where(starts_row, before, 0))
  return row * row_length + before - row_start


def take_rows(packing: Packing, first_row: jax.Array | int, num_rows: int) -> tuple[TextRows, jax.Array]:
  """Some rows of each group, and which texts [P, n] are in them; the ends of the others are arbitrary."""
  width = packing.row_length
  first = first_row * width
  slots = first + jnp.arange(num_rows * width)
  text = jax.vmap(lambda starts: jnp.searchsorted(starts, slots, side='right'))(packing.starts) - 1  # [P, R * W]
  look_up = lambda table: jnp.take_along_axis(table, text, axis=1)
  positions = slots[None] - look_up(packing.starts)
  filled = positions < look_up(packing.lengths)
  positions = jnp.where(filled, positions, 0)
  text_length = packing.tokens.shape[-1]
  flat = packing.tokens.reshape(len(packing.tokens), -1)
  tokens = jnp.take_along_axis(flat, text * text_length + positions, axis=1)
  # What fills the end of a row forms a text of its own: every token sees at least itself.
  text = jnp.where(filled, text, -1)
  in_rows = lambda x: x.reshape(-1, num_rows, width)
  ends = packing.starts + packing.lengths - 1 - first
  here = (ends >= 0) & (ends < len(slots))
  return TextRows(in_rows(tokens), in_rows(positions), in_rows(text), jnp.where(here, ends, 0)), here


Encode = Callable[[object, TextRows], jax.Array]


class Encoders(NamedTuple):
  """The text tower, as (parameters, rows) -> features [P * n, D], for two uses."""

  most: Encode  # fast to run
  rest: Encode  # fast to compile: it is seldom run


class TextLoad(flax.struct.PyTreeNode):
  """The cost of a batch's texts; adds up over micro-batches."""

  tokens: jax.Array  # [], that texts have
  turns: jax.Array  # [], iterations of the loop over rows beyond the budget


def text_load(tokens: jax.Array, *, eos_id: int, budget: int, groups: int) -> TextLoad:
  """The load of `text_features` with the same arguments."""
  lengths = eos_positions(tokens, eos_id) + 1
  turns = jnp.zeros((), jnp.int32)
  if budget:
    packing = _pack(tokens, eos_id, groups)
    turns = _num_iterations(_rows_of(budget * len(tokens) // groups, packing), packing)
  return TextLoad(lengths.sum(), turns)


def needed_budget(tokens: jax.Array, *, eos_id: int, groups: int) -> int:
  """The least budget of `text_features` with which no group of these texts needs the loop."""
  packing = _pack(tokens, eos_id, groups)
  return -(-int(packing.num_rows.max()) * packing.row_length * groups // len(tokens))


def text_features(
  encoders: Encoders, params: object, tokens: jax.Array, *, eos_id: int, budget: int, groups: int
) -> jax.Array:
  """Features of the texts of each image.

  Texts are packed into rows in which none attends to another. Each group of images (those of one device) computes the
  rows that `budget` pays for. A loop computes what a group needs beyond that; its activations are recomputed in the
  backward pass.

  Args:
    encoders: the text tower.
    params: its parameters; the features are differentiable in them.
    tokens: ids [B, T, L].
    eos_id: ends a text.
    budget: tokens an image that are computed at once; 0 computes all B * T * L.
    groups: how many groups of consecutive images; divides B.

  Returns:
    [B, T, D]; the same whatever budget and groups.
  """
  batch, texts, length = tokens.shape
  if not budget:
    features = encoders.most(params, one_a_row(tokens.reshape(-1, length), eos_id))
  else:
    packing = _pack(tokens, eos_id, groups)
    features = _encode_packed(encoders, _rows_of(budget * batch // groups, packing), params, packing)
  return features.reshape(batch, texts, -1)


def _pack(tokens: jax.Array, eos_id: int, groups: int) -> Packing:
  length = tokens.shape[-1]
  with jax.named_scope('pack_texts'):
    return pack(tokens.reshape(groups, -1, length), eos_id, max(ROW_LENGTH, length))


def _rows_of(tokens: int, packing: Packing) -> int:
  """Rows of each group that hold so many tokens."""
  return -(-tokens // packing.row_length)


def _encode_some(
  encode: Encode, params: object, packing: Packing, first_row: jax.Array | int, num_rows: int
) -> jax.Array:
  """Features [P * n, D] of the texts that begin in these rows, zeros for the others."""
  rows, here = take_rows(packing, first_row, num_rows)
  return jnp.where(here.reshape(-1, 1), encode(params, rows), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _encode_packed(encoders: Encoders, num_rows: int, params: object, packing: Packing) -> jax.Array:
  """Features [P * n, D] of all texts, the first `num_rows` rows of each group at once."""
  features = _encode_some(encoders.most, params, packing, 0, num_rows)
  return _add_rest(encoders.rest, num_rows, params, packing, features)


def _add_rest(encode: Encode, num_rows: int, params: object, packing: Packing, features: jax.Array) -> jax.Array:
  count, first_row = _rest(num_rows)

  def body(i, features):
    here = _tie_to_iteration(params, i)
    return features + _encode_some(encode, here, packing, first_row(i), count)

  return lax.fori_loop(0, _num_iterations(num_rows, packing), body, features)


def _tie_to_iteration(params: object, iteration: jax.Array) -> object:
  """The parameters, tied to an iteration: work on them alone, such as stacking all blocks, stays in the loop.

  Compilers would move it out, where it is computed even if the loop does not run.
  """
  return lax.optimization_barrier((params, iteration))[0]


def _rest(num_rows: int) -> tuple[int, Callable[[jax.Array], jax.Array]]:
  """How many rows the loop computes at a time, and the first row of iteration i."""
  count = max(1, num_rows // _REST_SHARE)
  return count, lambda i: num_rows + i * count


def _num_iterations(num_rows: int, packing: Packing) -> jax.Array:
  """Iterations of the loop, the same on all devices."""
  count, _ = _rest(num_rows)
  return jnp.maximum(0, -(-(packing.num_rows.max() - num_rows) // count))


def _forward(encoders: Encoders, num_rows: int, params: object, packing: Packing) -> tuple[jax.Array, tuple]:
  features, pull = jax.vjp(lambda params: _encode_some(encoders.most, params, packing, 0, num_rows), params)
  return _add_rest(encoders.rest, num_rows, params, packing, features), (pull, params, packing)


def _backward(encoders: Encoders, num_rows: int, saved: tuple, grad: jax.Array) -> tuple[object, None]:
  pull, params, packing = saved
  count, first_row = _rest(num_rows)

  def body(i, grads):
    encode = lambda params: _encode_some(encoders.rest, params, packing, first_row(i), count)
    _, pull = jax.vjp(encode, _tie_to_iteration(params, i))
    return jax.tree.map(jnp.add, grads, *pull(grad))

  return lax.fori_loop(0, _num_iterations(num_rows, packing), body, *pull(grad)), None


_encode_packed.defvjp(_forward, _backward)
