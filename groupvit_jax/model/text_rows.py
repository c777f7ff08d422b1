"""Texts in rows: one a row, or packed several to a row (nothing after a text's end matters to a causal tower)."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from groupvit_jax.errors import UserError


class TextRows(NamedTuple):
  """What the text tower reads: rows of tokens, and where in a group of R rows each of its n texts ends."""

  tokens: jax.Array  # [P, R, W], ids
  positions: jax.Array  # [P, R, W], within a token's own text
  mask: jax.Array  # [P, R, W, W], bool: which tokens of its row a token sees; [1, 1, W, W] where all rows are alike
  ends: jax.Array  # [P, n], index among the R * W tokens of a group


class Packing(flax.struct.PyTreeNode):
  """Where each text of P groups of n goes, in the order in which they come."""

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
    jnp.tril(jnp.ones((length, length), bool))[None, None],
    eos_positions(tokens, eos_id)[:, None],
  )


def pack(tokens: jax.Array, eos_id: int, row_length: int) -> Packing:
  """Places texts one after another; one that would cross the end of a row starts the next.

  Args:
    tokens: ids [P, n, L]; groups are packed apart from each other.
    eos_id: ends a text.
    row_length: W, at least L.

  Returns:
    Where each text goes.

  Raises:
    ValueError: W is less than L.
  """
  if row_length < tokens.shape[-1]:
    raise UserError(f'rows of {row_length} tokens do not hold texts of up to {tokens.shape[-1]}; use longer ones')
  lengths = eos_positions(tokens, eos_id) + 1
  starts = jax.vmap(lambda group: _next_fit(group, row_length))(lengths)
  return Packing(tokens, lengths, starts, row_length)


def _next_fit(lengths: jax.Array, row_length: int) -> jax.Array:
  """Starts [n] of texts of these lengths.

  Text i, if it starts a row, is followed by a row that starts at text `after[i]`. What the first text leads to is found
  in log2(n) steps, each of which doubles how far it looks.
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
  """Some rows of each group, and which texts [P, n] are in them; the others' ends are somewhere in these rows."""
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
  text = in_rows(text)
  mask = (text[..., :, None] == text[..., None, :]) & jnp.tril(jnp.ones((width, width), bool))[None, None]
  ends = packing.starts + packing.lengths - 1 - first
  here = (ends >= 0) & (ends < len(slots))
  return TextRows(in_rows(tokens), in_rows(positions), mask, jnp.where(here, ends, 0)), here
