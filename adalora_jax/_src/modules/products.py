"""The product of input and weight that a traced layer computes, derived from its jaxpr.

An adapter of a layer that is not Flax's adds ``x ΔW`` to the layer's output. This is exact only if
the layer computes ``y = einsum(x, W) + b`` with the input and the weight as they are. A jaxpr shows
it: :func:`problem_with` follows the axes of both through the program, to the axes of the output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend import core

from adalora_jax._src.modules.usage import PASSING, called_jaxpr, is_float

_Axis = tuple[str, int]  # "x" or "w", and the number of the axis
_Dim = tuple[_Axis, ...]  # the axes that a dimension consists of, without those of size 1

# Primitives that only pass floats on. Rounding to fewer bits changes the weight.
_PASSING = PASSING - {"reduce_precision"} | {"device_put", "name"}
# Primitives that run a program on other arrays than their inputs.
_LOOPS = {"scan", "while", "cond", "shard_map"}
_NAMES = {"w": "its weight", "y": "the product"}


class _Value(NamedTuple):
    """An array that depends on the weight, or is the input.

    Attributes:
      kind: ``"w"`` (the weight), ``"x"`` (the input), ``"n"`` (the input plus the number of rows,
        see :func:`_row_numbers`) or ``"y"`` (the product).
      dims: its dimensions.
      sums: the pairs of axes that the product sums over.
      stack: the pairs of axes that input and weight have in common with the product.
    """

    kind: str
    dims: tuple[_Dim, ...]
    sums: frozenset[tuple[_Axis, _Axis]] = frozenset()
    stack: frozenset[tuple[_Axis, _Axis]] = frozenset()


class _NotTheProduct(Exception):
    """The program is not a product plus a term without the weight; the text says why."""


def problem_with(jaxpr: core.Jaxpr, weight: int, x: int, labels: tuple[str, str, str]) -> str:
    """Return why a program is not the product that a layout says; empty if it is.

    Args:
      jaxpr: the layer's program, with one output.
      weight: position of the weight among the program's inputs.
      x: position of the layer's input.
      labels: the labels of input, weight and output of the product. A label of the weight that
        the others lack is that of the rows which x numbers.
    """
    for name, place, axes in (("input", x, labels[0]), ("weight", weight, labels[1])):
        if len(shape := _aval(jaxpr.invars[place]).shape) != len(axes):
            return f"its {name} has {len(shape)} axes"
    sizes = {
        (kind, axis): size
        for kind, place in (("x", x), ("w", weight))
        for axis, size in enumerate(_aval(jaxpr.invars[place]).shape)
    }

    def dim(axis: _Axis) -> _Dim:
        return (axis,) if sizes[axis] != 1 else ()

    def leaf(kind: str) -> _Value:
        return _Value(kind, tuple(dim(axis) for axis in sizes if axis[0] == kind))

    given: list[_Value | None] = [None] * len(jaxpr.invars)
    given[x], given[weight] = leaf("x"), leaf("w")
    try:
        outputs = _Walk(sizes).run(jaxpr, given)
        if len(outputs) != 1:
            raise _NotTheProduct(f"it returns {len(outputs)} arrays")
        (found,) = outputs
        if found is None or found.kind != "y":
            raise _NotTheProduct("its output does not depend on its weight")
    except _NotTheProduct as error:
        return str(error)
    xs, ws, ys = labels
    place = {a: ("x", xs.index(a)) for a in xs} | {a: ("w", ws.index(a)) for a in ws}

    def pairs(labels: str) -> frozenset[tuple[_Axis, _Axis]]:
        both = [(("x", xs.index(a)), ("w", ws.index(a))) for a in labels if a in xs and a in ws]
        return frozenset(pair for pair in both if sizes[pair[1]] != 1)

    summed = "".join(a for a in ws if a not in ys)
    wanted = _Value("y", tuple(dim(place[a]) for a in ys), pairs(summed), pairs(ys))
    if found == wanted:
        return ""
    return f"it computes {_equation(found, len(xs), len(ws))}"


class _Walk:
    """A pass over a program that tracks the axes of weight, input and product."""

    def __init__(self, sizes: dict[_Axis, int]) -> None:
        self.sizes = sizes
        self.wrapped: set[int] = set()  # numbers of rows that are added to negative ones

    def run(self, jaxpr: core.Jaxpr, given: Sequence[_Value | None]) -> list[_Value | None]:
        """Return the values of a program's outputs, given those of its inputs."""
        values: dict[Any, _Value | None] = dict(zip(jaxpr.invars, given))

        def read(v: core.Var | core.Literal) -> _Value | None:
            return None if isinstance(v, core.Literal) else values.get(v)

        for eqn in _needed(jaxpr):
            inputs = [read(v) for v in eqn.invars]
            if any(inputs):
                values.update(zip(eqn.outvars, self.equation(eqn, inputs)))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: core.JaxprEqn, inputs: list[_Value | None]) -> Sequence[_Value | None]:
        """Return the values of an operation's outputs.

        Raises:
          _NotTheProduct: the operation does something else to the weight or to the product.
        """
        primitive, params = eqn.primitive.name, eqn.params
        first, known = inputs[0], [value for value in inputs if value]
        kinds = [value.kind if value else "" for value in inputs]
        if primitive in _PASSING and len(inputs) == len(eqn.outvars):
            if _keeps_floats(eqn):
                return inputs
        elif primitive == "transpose" and first:
            return [first._replace(dims=tuple(first.dims[i] for i in params["permutation"]))]
        elif primitive in ("reshape", "squeeze", "expand_dims") and first:
            if (dims := self.regrouped(first, _aval(eqn.outvars[0]).shape)) is not None:
                return [first._replace(dims=dims)]
        elif primitive == "broadcast_in_dim" and first:
            if (dims := self.broadcast(first, eqn)) is not None:
                return [first._replace(dims=dims)]
        elif primitive == "dot_general" and sorted(kinds) == ["w", "x"]:
            return [self.product(params["dimension_numbers"], *known)]
        elif primitive == "gather" and kinds == ["w", "x"]:
            return [self.rows(eqn, *known)]
        elif primitive in ("add", "add_any", "sub") and "y" in kinds:
            if "w" not in kinds and kinds != ["y", "y"] and (primitive != "sub" or kinds[0] == "y"):
                return [inputs[kinds.index("y")]]
        elif primitive not in _LOOPS and (inner := _called_on_arrays(eqn)) is not None:
            return self.run(inner, inputs)
        elif kind := _row_numbers(eqn, kinds):
            if kind == "n":
                self.wrapped |= {int(v.val) for v in eqn.invars if isinstance(v, core.Literal)}
            return [known[0]._replace(kind=kind)]
        if changed := next((kind for kind in kinds if kind in _NAMES), None):
            if primitive == "dot_general" and changed == "w":
                raise _NotTheProduct("it multiplies its weight with another array than its input")
            raise _NotTheProduct(f"it applies `{primitive}` to {_NAMES[changed]}")
        return [None] * len(eqn.outvars)  # computed from the input alone

    def size(self, dim: _Dim) -> int:
        """Return the size of a dimension."""
        return math.prod(self.sizes[axis] for axis in dim)

    def regrouped(self, value: _Value, shape: Sequence[int]) -> tuple[_Dim, ...] | None:
        """Return the dimensions after a reshape; None if it splits an axis."""
        axes = [axis for dim in value.dims for axis in dim]
        dims: list[_Dim] = []
        for size in shape:
            dim: _Dim = ()
            while self.size(dim) < size and axes:
                dim = (*dim, axes.pop(0))
            if self.size(dim) != size:
                return None
            dims.append(dim)
        return tuple(dims)

    def broadcast(self, value: _Value, eqn: core.JaxprEqn) -> tuple[_Dim, ...] | None:
        """Return the dimensions after a broadcast; None if it repeats entries."""
        placed = dict(zip(eqn.params["broadcast_dimensions"], value.dims))
        dims = tuple(placed.get(i, ()) for i in range(len(eqn.params["shape"])))
        return dims if tuple(map(self.size, dims)) == tuple(eqn.params["shape"]) else None

    def product(self, numbers: tuple[Any, Any], left: _Value, right: _Value) -> _Value:
        """Return the product of input and weight, in either order."""
        contracted, batch = numbers
        is_x = left.kind == "x"

        def pairs(dims: tuple[Sequence[int], Sequence[int]]) -> list[tuple[_Axis, _Axis]]:
            found = []
            for i, j in zip(*dims):
                one, other = left.dims[i], right.dims[j]
                if [*map(self.sizes.get, one)] != [*map(self.sizes.get, other)]:
                    raise _NotTheProduct("it splits an axis of its input or of its weight")
                found += zip(one, other) if is_x else zip(other, one)
            return found

        weight, stack = (right, batch[1]) if is_x else (left, batch[0])
        free = [
            dim
            for value, *axes in ((left, contracted[0], batch[0]), (right, contracted[1], batch[1]))
            for i, dim in enumerate(value.dims)
            if not any(i in some for some in axes)
        ]
        dims = (*(weight.dims[i] for i in stack), *free)
        return _Value("y", dims, frozenset(pairs(contracted)), frozenset(pairs(batch)))

    def rows(self, eqn: core.JaxprEqn, weight: _Value, ids: _Value) -> _Value:
        """Return the rows that a gather takes from the weight.

        Raises:
          _NotTheProduct: it takes something else.
        """
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        shape = _aval(eqn.invars[0]).shape
        taken = tuple(numbers.collapsed_slice_dims)
        plain = (
            len(taken) == 1
            and tuple(numbers.start_index_map) == taken
            and not numbers.operand_batching_dims
            and not ids.dims[-1]
            and all(size == shape[i] for i, size in enumerate(sizes) if i not in taken)
            and self.wrapped <= {shape[taken[0]]}
        )
        if not plain:
            raise _NotTheProduct("it looks up something else than rows of its weight")
        inner = iter(dim for i, dim in enumerate(weight.dims) if i not in taken)
        outer = iter(ids.dims)
        ndim = len(_aval(eqn.outvars[0]).shape)
        dims = tuple(next(inner if i in numbers.offset_dims else outer) for i in range(ndim))
        return _Value("y", dims)


def _aval(v: core.Var | core.Literal) -> Any:
    return v.aval


def _called_on_arrays(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """Return the jaxpr that a call runs on its inputs; None for one that runs on their elements.

    The function that combines elements in ``reduce`` and ``reduce_window`` is such a jaxpr.
    """
    inner = called_jaxpr(eqn)
    pairs = ((inner.invars, eqn.invars), (inner.outvars, eqn.outvars)) if inner else ()
    same = all([_aval(v).shape for v in a] == [_aval(v).shape for v in b] for a, b in pairs)
    return inner if same else None


def _needed(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """Return the operations on which the outputs of a program depend, in order."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, core.Literal)}
    kept: list[core.JaxprEqn] = []
    for eqn in reversed(jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            needed |= {v for v in eqn.invars if not isinstance(v, core.Literal)}
            kept.append(eqn)
    return kept[::-1]


def _keeps_floats(eqn: core.JaxprEqn) -> bool:
    """Return whether an operation's results are floats exactly if its inputs are."""
    return all(is_float(i) == is_float(o) for i, o in zip(eqn.invars, eqn.outvars))


def _row_numbers(eqn: core.JaxprEqn, kinds: list[str]) -> str:
    """Return the kind of the result of NumPy's rule for negative indices, ``i < 0 ? i + rows : i``.

    Non-negative row numbers pass its two steps unchanged. Empty for other operations.
    """
    if not jnp.issubdtype(_aval(eqn.outvars[0]).dtype, jnp.integer):
        return ""
    if eqn.primitive.name == "select_n":
        return "x" if kinds == ["", "x", "n"] else ""
    adds = eqn.primitive.name == "add" and kinds == ["x", ""]
    return "n" if adds and isinstance(eqn.invars[1], core.Literal) else ""


def _equation(found: _Value, x_ndim: int, w_ndim: int) -> str:
    """Return a product as an equation, for messages."""
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    shared = {w: x for x, w in found.sums | found.stack}
    names: dict[_Axis, str] = {("x", i): next(letters) for i in range(x_ndim)}
    for axis in (("w", i) for i in range(w_ndim)):
        names[axis] = names[shared[axis]] if axis in shared else next(letters)
    xs = "".join(names["x", i] for i in range(x_ndim))
    ws = "".join(names["w", i] for i in range(w_ndim))

    def name(dim: _Dim) -> str:
        joined = "".join(names[axis] for axis in dim)
        return joined if len(dim) == 1 else f"({joined})" if dim else "1"

    return f"{xs},{ws}->{''.join(map(name, found.dims))}"
