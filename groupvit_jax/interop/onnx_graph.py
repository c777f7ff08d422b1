"""Converts a JAX function to an ONNX graph: the operations that both towers are made of, for any number of rows.

Functions with a gradient of their own that ONNX has as one operation become it: runtimes have a fast kernel for it.
"""

from collections.abc import Callable, Sequence
import importlib
from typing import Any, NamedTuple

import jax
from jax import export
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
import numpy as np

from groupvit_jax.model.layers import LAYER_NORM_EPS

_OPSET, _IR_VERSION = 20, 10  # the first with Gelu, and what came with it

Shape = tuple[Any, ...]  # of integers, and of sizes that depend on the number of rows


class _Value(NamedTuple):
  """A constant, or the output of a node."""

  shape: Shape
  data: np.ndarray | str  # or its name
  stored: Shape  # has ones where it is yet to be broadcast to `shape`

  @classmethod
  def constant(cls, array: Any) -> '_Value':
    array = np.asarray(array)
    return cls(array.shape, array, array.shape)


def convert(function: Callable, shape: Sequence[int | str], dtype: Any, name: str, outputs: Sequence[str]) -> Any:
  """An ONNX model of a function.

  Args:
    function: of one array; returns one, or a tuple.
    shape, dtype: of the array; a string is a size that is free.
    name, outputs: of the array, and of what is returned.

  Raises:
    NotImplementedError: the function has an operation that no rule converts.
  """
  sizes = export.symbolic_shape(', '.join(map(str, shape)))
  jaxpr = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(sizes, dtype))
  graph = _Graph(name, sizes)
  values = graph.inline(jaxpr, [_Value(sizes, name, sizes)])
  for output, value in zip(outputs, values, strict=True):
    graph.nodes.append(graph.onnx.helper.make_node('Identity', [graph.whole(value)], [output]))
  return graph.model(jaxpr, outputs)


class _Graph:
  """Nodes and constants so far."""

  def __init__(self, name: str, sizes: Shape):
    self.onnx, self.nodes = importlib.import_module('onnx'), []
    self._input, self._rows = name, sizes[0]
    self._constants, self._reshaped = {}, {}  # names by contents; what was reshaped, by the result

  def inline(self, closed: ClosedJaxpr | Jaxpr, inputs: Sequence[_Value]) -> list[_Value]:
    """Adds the nodes of a function, and returns what comes out."""
    jaxpr = getattr(closed, 'jaxpr', closed)
    constants = map(_Value.constant, getattr(closed, 'consts', ()))
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))
    read = lambda x: _Value.constant(np.asarray(x.val, x.aval.dtype)) if isinstance(x, Literal) else known[x]
    for eqn in jaxpr.eqns:
      known |= zip(eqn.outvars, self._convert(eqn, [read(x) for x in eqn.invars]), strict=True)
    return [read(x) for x in jaxpr.outvars]

  def _convert(self, eqn: JaxprEqn, inputs: list[_Value]) -> list[_Value]:
    kind, (first, *_) = eqn.primitive.name, eqn.outvars
    if kind in _IDENTITIES:
      return inputs
    inner = eqn.params.get(_CALLS.get(kind))
    rule = _RULES.get(inner.jaxpr.debug_info.func_name if kind == 'custom_vjp_call' else kind)
    if inner is not None and rule is None:
      return self.inline(inner, inputs)
    if inner is None and all(isinstance(x.data, np.ndarray) and x.shape == x.stored for x in inputs):
      if all(isinstance(size, int) for size in first.aval.shape):
        return [_Value.constant(eqn.primitive.bind(*(x.data for x in inputs), **eqn.params))]
    if rule is None:
      raise NotImplementedError(f'no rule converts {kind} to ONNX')
    out = rule(self, eqn, *inputs)
    return [out if isinstance(out, _Value) else _Value(first.aval.shape, out, first.aval.shape)]

  def node(self, kind: str, *inputs: str | np.ndarray, **attributes: Any) -> str:
    """Adds a node; returns the name of its output."""
    out = f'{kind}_{len(self.nodes)}'
    names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
    self.nodes.append(self.onnx.helper.make_node(kind, names, [out], **attributes))
    return out

  def whole(self, value: _Value) -> str:
    """The name of a value, broadcast to its shape."""
    if value.stored == value.shape:
      return value.data if isinstance(value.data, str) else self._constant(value.data)
    if any(not isinstance(size, int) and size is not self._rows for size in value.shape):
      raise NotImplementedError(f'no rule broadcasts to {value.shape}')
    rows = self.node('Shape', self._input, start=0, end=1)
    sizes = [np.array([size]) if isinstance(size, int) else rows for size in value.shape]
    return self.node('Expand', value.data, self.node('Concat', *sizes, axis=0))

  def reshape(self, value: _Value, shape: Shape) -> _Value:
    """The same numbers in another shape, in which at most one size is free."""
    if isinstance(value.data, np.ndarray) and value.stored == value.shape:
      return _Value.constant(value.data.reshape(shape))
    source, name = value, self.whole(value)
    source = self._reshaped.get(name, _Value(value.shape, name, value.shape))
    if source.shape == shape:
      return source
    if sum(not isinstance(size, int) for size in shape) > 1:
      raise NotImplementedError(f'no rule reshapes to {shape}')
    sizes = np.array([size if isinstance(size, int) else -1 for size in shape])
    out = _Value(shape, self.node('Reshape', source.data, sizes), shape)
    self._reshaped[out.data] = source
    return out

  def model(self, jaxpr: ClosedJaxpr, outputs: Sequence[str]) -> Any:
    """The model, without nodes that no output needs."""
    helper, needed, nodes = self.onnx.helper, set(outputs), []
    for node in reversed(self.nodes):
      if needed & set(node.output):
        nodes.append(node)
        needed |= set(node.input)
    constants = [each for each in self._constants.values() if each.name in needed]
    inputs = [self._describe(self._input, jaxpr.in_avals[0])]
    results = [self._describe(name, aval) for name, aval in zip(outputs, jaxpr.out_avals)]
    graph = helper.make_graph(nodes[::-1], 'GroupViT', inputs, results, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid('', _OPSET)], ir_version=_IR_VERSION)

  def kind(self, dtype: Any) -> int:
    """ONNX's number of a dtype."""
    return self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

  def _describe(self, name: str, aval: Any) -> Any:
    sizes = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return self.onnx.helper.make_tensor_value_info(name, self.kind(aval.dtype), sizes)

  def _constant(self, array: np.ndarray) -> str:
    key = array.dtype.str, array.shape, array.tobytes()
    if key not in self._constants:
      self._constants[key] = self.onnx.numpy_helper.from_array(array, f'constant_{len(self._constants)}')
    return self._constants[key].name


def _elementwise(kind: str) -> Callable:
  """A rule for an operation on arrays of one shape: ONNX broadcasts them."""

  def rule(graph: _Graph, eqn: JaxprEqn, *inputs: _Value) -> _Value:
    rank = max(len(x.stored) for x in inputs)
    padded = [(1,) * (rank - len(x.stored)) + tuple(x.stored) for x in inputs]
    stored = tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded))
    return _Value(eqn.outvars[0].aval.shape, graph.node(kind, *(x.data for x in inputs)), stored)

  return rule


def _select(graph: _Graph, eqn: JaxprEqn, condition: _Value, no: _Value, yes: _Value) -> _Value:
  return _elementwise('Where')(graph, eqn, condition, yes, no)


def _square(graph: _Graph, eqn: JaxprEqn, x: _Value) -> _Value:
  return _elementwise('Mul')(graph, eqn, x, x)


def _rsqrt(graph: _Graph, eqn: JaxprEqn, x: _Value) -> str:
  return graph.node('Reciprocal', graph.node('Sqrt', graph.whole(x)))


def _cast(graph: _Graph, eqn: JaxprEqn, x: _Value) -> _Value:
  return x._replace(data=graph.node('Cast', x.data, to=graph.kind(eqn.params['new_dtype'])))


def _broadcast(graph: _Graph, eqn: JaxprEqn, x: _Value) -> _Value:
  shape, stored = eqn.params['shape'], [1] * len(eqn.params['shape'])
  for axis, size in zip(eqn.params['broadcast_dimensions'], x.shape):
    stored[axis] = size
  return graph.reshape(x, tuple(stored))._replace(shape=shape)


def _iota(graph: _Graph, eqn: JaxprEqn) -> _Value:
  shape, axis = eqn.params['shape'], eqn.params['dimension']
  stored = [size if i == axis else 1 for i, size in enumerate(shape)]
  return _Value.constant(np.arange(shape[axis], dtype=eqn.params['dtype']).reshape(stored))._replace(shape=shape)


def _reshape(graph: _Graph, eqn: JaxprEqn, x: _Value) -> _Value:
  return graph.reshape(x, eqn.params['new_sizes'])


def _transpose(graph: _Graph, eqn: JaxprEqn, x: _Value) -> _Value | str:
  order, shape = eqn.params['permutation'], eqn.outvars[0].aval.shape
  moved = [axis for axis in order if x.shape[axis] != 1]
  return graph.reshape(x, shape) if moved == sorted(moved) else graph.node('Transpose', graph.whole(x), perm=order)


def _reduce(kind: str) -> Callable:
  return lambda graph, eqn, x: graph.node(kind, graph.whole(x), np.array(eqn.params['axes']), keepdims=0)


def _argmax(graph: _Graph, eqn: JaxprEqn, x: _Value) -> str:
  (axis,), name = eqn.params['axes'], graph.whole(x)
  integers = lambda name: graph.node('Cast', name, to=graph.kind(np.int32))
  name = integers(name) if eqn.invars[0].aval.dtype == bool else name
  return integers(graph.node('ArgMax', name, axis=axis, keepdims=0))


def _concatenate(graph: _Graph, eqn: JaxprEqn, *inputs: _Value) -> str:
  return graph.node('Concat', *map(graph.whole, inputs), axis=eqn.params['dimension'])


def _pad(graph: _Graph, eqn: JaxprEqn, x: _Value, value: _Value) -> _Value:
  if any(any(each) for each in eqn.params['padding_config']):
    raise NotImplementedError('no rule converts padding to ONNX')
  return x


def _gather(graph: _Graph, eqn: JaxprEqn, x: _Value, indices: _Value) -> str:
  """Entries of one axis, or a part of it; the last axis of the indices has one number."""
  numbers, rank = eqn.params['dimension_numbers'], len(indices.shape) - 1
  (axis,), batch = numbers.start_index_map, numbers.operand_batching_dims
  if not (numbers.collapsed_slice_dims or batch or rank):
    ends = indices.data, indices.data + eqn.params['slice_sizes'][axis]
    return graph.node('Slice', graph.whole(x), *ends, np.array([axis], indices.data.dtype))
  where = graph.whole(graph.reshape(indices, indices.shape[:-1]))
  offsets = [*range(axis), *range(axis + rank, len(x.shape) + rank - 1)]
  if not batch and numbers.collapsed_slice_dims == (axis,) and list(numbers.offset_dims) == offsets:
    return graph.node('Gather', graph.whole(x), where, axis=axis)
  if batch == (0,) and numbers.collapsed_slice_dims == (axis,) == (1,):
    return graph.node(
      'GatherND', graph.whole(x), graph.node('Cast', graph.whole(indices), to=graph.kind(np.int64)), batch_dims=1
    )
  raise NotImplementedError(f'no rule converts a gather of {numbers} to ONNX')


def _dot_general(graph: _Graph, eqn: JaxprEqn, x: _Value, y: _Value) -> str:
  """Of matrices, and of as many pairs of them as the first axes count."""
  ((x_sum,), (y_sum,)), (batch, same) = eqn.params['dimension_numbers']
  if not batch == same == tuple(range(len(batch))) or not len(x.shape) == len(y.shape) == len(batch) + 2:
    raise NotImplementedError(f'no rule converts a matmul of {x.shape} and {y.shape} to ONNX')
  return _matmul(graph, x, y, x_sum != len(batch) + 1, y_sum != len(batch))


def _matmul(graph: _Graph, x: _Value, y: _Value, turn_x: bool = False, turn_y: bool = False) -> str:
  *batch, rows, columns = range(len(x.shape))
  turn = lambda name: graph.node('Transpose', name, perm=[*batch, columns, rows])
  names = [turn(graph.whole(each)) if turned else graph.whole(each) for each, turned in ((x, turn_x), (y, turn_y))]
  return graph.node('MatMul', *names)


def _project(graph: _Graph, eqn: JaxprEqn, x: _Value, kernel: _Value) -> str:
  return graph.node('MatMul', graph.whole(x), graph.whole(kernel))


def _layer_norm(graph: _Graph, eqn: JaxprEqn, x: _Value, scale: _Value, bias: _Value) -> str:
  return graph.node('LayerNormalization', *map(graph.whole, (x, scale, bias)), axis=-1, epsilon=LAYER_NORM_EPS)


def _gelu(graph: _Graph, eqn: JaxprEqn, x: _Value) -> str:
  return graph.node('Gelu', graph.whole(x))


def _quick_gelu(graph: _Graph, eqn: JaxprEqn, x: _Value) -> str:
  return graph.node('Mul', graph.whole(x), graph.node('Sigmoid', graph.node('Mul', graph.whole(x), np.float32(1.702))))


def _attend(graph: _Graph, eqn: JaxprEqn, query: _Value, key: _Value, value: _Value, mask: _Value | None = None) -> str:
  """In the form that runtimes know as attention."""
  scale = np.array(query.shape[-1] ** -0.5, np.float32)
  logits = graph.node('Mul', _matmul(graph, query, key, turn_y=True), scale)
  if mask is not None:
    logits = graph.node('Where', mask.data, logits, np.array(np.finfo(np.float32).min))
  return graph.node('MatMul', graph.node('Softmax', logits, axis=-1), graph.whole(value))


_IDENTITIES = 'copy', 'name', 'optimization_barrier', 'stop_gradient'
_CALLS = {'jit': 'jaxpr', 'pjit': 'jaxpr', 'custom_jvp_call': 'call_jaxpr', 'custom_vjp_call': 'call_jaxpr'}
_RULES = {
  '_attend': _attend,
  '_exact_gelu': _gelu,
  '_multiply': _project,
  '_quick_gelu': _quick_gelu,
  'add': _elementwise('Add'),
  'and': _elementwise('And'),
  'argmax': _argmax,
  'broadcast_in_dim': _broadcast,
  'concatenate': _concatenate,
  'convert_element_type': _cast,
  'div': _elementwise('Div'),
  'dot_general': _dot_general,
  'eq': _elementwise('Equal'),
  'exp': _elementwise('Exp'),
  'gather': _gather,
  'ge': _elementwise('GreaterOrEqual'),
  'iota': _iota,
  'lt': _elementwise('Less'),
  'max': _elementwise('Max'),
  'mul': _elementwise('Mul'),
  'normalize': _layer_norm,
  'pad': _pad,
  'reduce_max': _reduce('ReduceMax'),
  'reduce_sum': _reduce('ReduceSum'),
  'reshape': _reshape,
  'rsqrt': _rsqrt,
  'select_n': _select,
  'square': _square,
  'sub': _elementwise('Sub'),
  'transpose': _transpose,
}
