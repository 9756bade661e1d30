"""Weights followed through the jaxpr of a function: their axes, and products with increments.

:func:`evaluate` runs a traced function with an increment added to some of its inputs. It follows
each of these weights through the operations that only move entries. At a product with the weight it
adds the product with the increment's factors, ``s · ((x qᵀ) · λ) p``. Before any other operation it
replaces the weight by ``W + ΔW``, so the result is that of the function of ``W + ΔW`` for every use
of a weight; only the cost depends on the use.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from adalora_jax._src import _compat
from adalora_jax._src.core.adapter import Adapter, delta_weight
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.low_rank import accumulation_dtype
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import einsum, ragged
from adalora_jax._src.modules.functional_params import is_array
from adalora_jax._src.modules.layers import add_increment
from adalora_jax._src.modules.usage import PASSING, is_float

_INLINED = {"closed_call", "core_call", "jit", "pjit"}
REMAT = {"checkpoint", "remat", "remat2"}
_PRODUCTS = {"conv_general_dilated", "dot_general", "gather", "ragged_dot_general"}


class Label(NamedTuple):
    """An axis of a weight, or a part of one that a reshape split; axis -1 is of no weight."""

    axis: int
    part: str = ""


_Dims = tuple[tuple[Label, ...], ...]


class Weight(NamedTuple):
    """A value whose entries are those of one weight, possibly moved or sliced.

    Attributes:
      value: the array, without the increment.
      adapter: factors of the increment, ``[*stack, r, features]``; None while layouts are read.
      number: position of the weight among the function's inputs.
      dims: the labels that each dimension of the value consists of.
      sizes: size of each label.
      roles: labels of the stack axes, of the inputs and of the outputs, as the factors have them.
    """

    value: jax.Array
    adapter: Any
    number: int
    dims: _Dims
    sizes: Mapping[Label, int]
    roles: tuple[tuple[Label, ...], ...] = ((), (), ())

    @classmethod
    def of(cls, number: int, value: jax.Array, adapter: Adapter | None = None) -> Weight:
        labels = tuple(Label(axis) for axis in range(value.ndim))
        layer, roles = adapter and adapter.layout, ((), (), ())
        if layer is not None:
            lifted = value.ndim - layer.ndim
            stack = (*range(lifted), *(lifted + axis for axis in layer.stack))
            ins, outs = ([lifted + axis for axis in axes] for axes in (layer.ins, layer.outs))
            roles = tuple(tuple(labels[axis] for axis in axes) for axes in (stack, ins, outs))
        return cls(
            value,
            adapter,
            number,
            tuple((a,) for a in labels),
            dict(zip(labels, value.shape)),
            roles,
        )

    def increment(self, p: jax.Array | None = None, name: Label | None = None) -> jax.Array:
        """Return ΔW in the shape of the value; with ``p`` of other outputs, called ``name``."""
        stack, ins, outs = self.roles
        adapter, sizes = self.adapter, dict(self.sizes)
        if p is not None and name is not None:
            adapter, outs, sizes[name] = adapter._replace(p=p), (name,), p.shape[-1]
        order = [*stack, *ins, *outs]
        delta = delta_weight(adapter).reshape([sizes[a] for a in order])
        delta = delta.transpose([order.index(a) for dim in self.dims for a in dim])
        return delta.reshape([math.prod(sizes[a] for a in dim) for dim in self.dims])

    def merged(self) -> jax.Array:
        """Return ``W + ΔW``, rounded once."""
        return self.value if self.adapter is None else add_increment(self.value, self.increment())


class Trace(NamedTuple):
    """A traced call of a function.

    Attributes:
      closed: the jaxpr, a function of the arrays.
      arrays: the arrays among the arguments, by position among their leaves.
      output: the function from the jaxpr's outputs to the result of the call.
    """

    closed: core.ClosedJaxpr
    arrays: dict[int, Any]
    output: Callable[[list[jax.Array]], PyTree]

    @classmethod
    def of(cls, fn: Callable[..., PyTree], params: PyTree, inputs: tuple[PyTree, ...]) -> Trace:
        """Trace a call with all arrays as arguments, and all other leaves as constants."""
        flat, treedef = jax.tree.flatten((params, inputs))
        arrays = {i: leaf for i, leaf in enumerate(flat) if is_array(leaf)}
        result: list[Any] = []

        def run(arrays: Mapping[int, jax.Array]) -> dict[int, jax.Array]:
            leaves = [arrays.get(i, leaf) for i, leaf in enumerate(flat)]
            params, inputs = treedef.unflatten(leaves)
            result[:] = jax.tree.flatten(fn(params, *inputs))
            return {i: leaf for i, leaf in enumerate(result[0]) if is_array(leaf)}

        closed = jax.make_jaxpr(run)(arrays)
        leaves, out_treedef = result
        places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
        constants = {i: leaf for i, leaf in enumerate(leaves) if i not in places}

        def output(values: list[jax.Array]) -> PyTree:
            known = {**constants, **dict(zip(places, values))}
            return out_treedef.unflatten([known[i] for i in range(len(known))])

        return cls(closed, arrays, output)


class Walk:
    """Evaluates a jaxpr in which some values are weights, and adds increments to the products."""

    forward_mode = False
    is_reading = False

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[Any], args: Sequence[Any]
    ) -> list[jax.Array | Weight]:
        """Return the outputs of a jaxpr for arrays or weights as inputs."""
        values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))

        def read(v: core.Var | core.Literal) -> Any:
            return v.val if isinstance(v, core.Literal) else values[v]

        for eqn in jaxpr.eqns:
            inputs = [read(v) for v in eqn.invars]
            followed = any(isinstance(value, Weight) for value in inputs)
            outputs = self.equation(eqn, inputs) if followed else run_alone(eqn, inputs)
            values.update(zip(eqn.outvars, outputs))
        return [read(v) for v in jaxpr.outvars]

    def closed(self, closed: core.ClosedJaxpr, args: Sequence[Any]) -> list[jax.Array]:
        """Return the outputs of a closed jaxpr as arrays."""
        return [merged(value) for value in self.run(closed.jaxpr, closed.consts, args)]

    def equation(self, eqn: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
        """Return the outputs of an operation of which some inputs are weights."""
        name = eqn.primitive.name
        if name in _INLINED:
            closed = eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]
            return self.run(closed.jaxpr, closed.consts, inputs)
        if name in REMAT:
            return self.remat(eqn, inputs)
        if name == "scan":
            return self.scan(eqn, inputs)
        if name == "cond":
            branches = [
                functools.partial(self.closed, branch, inputs[1:])
                for branch in eqn.params["branches"]
            ]
            return lax.switch(merged(inputs[0]), branches)
        if name in _PRODUCTS:
            return [self.product(eqn, inputs)]
        if len(inputs) == 1 or name == "dynamic_slice":
            moved = _moved(eqn, inputs, self.is_reading)
            if moved is not None:
                plain = [w.value if isinstance(w, Weight) else w for w in inputs]
                values = run_alone(eqn, plain)
                return [w._replace(value=value) for value, w in zip(values, moved, strict=True)]
        return run_alone(eqn, [merged(value) for value in inputs])

    def remat(self, eqn: core.JaxprEqn, inputs: list[Any]) -> list[jax.Array]:
        """Return the outputs of ``jax.checkpoint``, again under it."""

        def inner(arrays: list[Any]) -> list[jax.Array]:
            args = [_with_arrays(w, a) for w, a in zip(inputs, arrays)]
            return [merged(value) for value in self.run(eqn.params["jaxpr"], (), args)]

        options = {name: eqn.params[name] for name in ("policy", "prevent_cse")}
        return jax.checkpoint(inner, **options)([_arrays(value) for value in inputs])

    def scan(self, eqn: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
        """Return the outputs of a scan, whose steps get slices of the stacked adapters."""
        closed, (count, carried) = eqn.params["jaxpr"], _compat.scan_counts(eqn.params)
        consts, rest = inputs[:count], inputs[count:]
        carry = [merged(value) for value in rest[:carried]]
        scanned = [_unstacked(value) for value in rest[carried:]]

        def body(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
            xs = [_with_arrays(w, a) for (w, _), a in zip(scanned, slices)]
            outputs = self.closed(closed, [*consts, *carry, *xs])
            return outputs[: len(carry)], outputs[len(carry) :]

        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        carry, ys = lax.scan(body, carry, [arrays for _, arrays in scanned], **options)
        return [*carry, *ys]

    def product(self, eqn: core.JaxprEqn, inputs: list[Any]) -> Any:
        """Return the output of a product with a weight: ``x W`` and the adapter's term."""
        for position, weight in enumerate(inputs):
            if isinstance(weight, Weight):
                plain = [
                    weight.value if i == position else merged(value)
                    for i, value in enumerate(inputs)
                ]
                term = self.term(eqn, plain, position, weight)
                if term is not None:
                    (y,) = run_alone(eqn, plain)
                    return y + term.astype(y.dtype)
        return run_alone(eqn, [merged(value) for value in inputs])[0]

    def term(
        self, eqn: core.JaxprEqn, inputs: list[Any], position: int, weight: Weight
    ) -> jax.Array | None:
        """Return the product with the increment's factors; None if they do not fit the product."""
        name, (stack, ins, outs) = eqn.primitive.name, weight.roles
        if name == "dot_general":
            return _dot_term(eqn, inputs[1 - position], position, weight, self.forward_mode)
        if name == "ragged_dot_general":
            x, _, group_sizes = inputs
            layout = (weight.roles, weight.dims, weight.sizes)
            is_rhs = position == 1
            return ragged.term(eqn, x, group_sizes, weight.adapter, *layout) if is_rhs else None
        found = roles_of_product(eqn, position, weight)
        if stack or found is None or set(found[2]) != {*outs} or set(found[1]) != {*ins}:
            return None
        dims = [d for d, dim in enumerate(weight.dims) if set(dim) & set(outs)]
        if len(dims) != 1 or eqn.params.get("feature_group_count", 1) != 1:
            return None
        # The same operation with q in place of W, then the product with p.
        label, rank = Label(-1, "rank"), weight.adapter.lam.shape[-1]
        changed = weight._replace(
            dims=tuple((label,) if d == dims[0] else dim for d, dim in enumerate(weight.dims))
        )
        p = jnp.eye(rank, dtype=accumulation_dtype(weight.adapter.lam.dtype))
        factor, params = changed.increment(p, label), dict(eqn.params)
        if name == "gather":
            where = (gather_dims(eqn, weight) or {})[dims[0]]
            sizes = enumerate(params["slice_sizes"])
            params["slice_sizes"] = tuple(rank if d == dims[0] else n for d, n in sizes)
        else:
            where = params["dimension_numbers"].out_spec[1]
            factor = factor.astype(weight.value.dtype)
        inputs = [*inputs]
        inputs[position] = factor
        h = jnp.moveaxis(eqn.primitive.bind(*inputs, **params), where, -1)
        return jnp.moveaxis(jnp.matmul(h, weight.adapter.p.astype(h.dtype)), -1, where)


def evaluate(
    closed: core.ClosedJaxpr,
    args: Sequence[jax.Array],
    adapters: Mapping[int, Adapter],
    forward_mode: bool = False,
) -> list[jax.Array]:
    """Evaluate a jaxpr with an increment added to some of its inputs.

    Args:
      closed: the traced function.
      args: its inputs.
      adapters: ``{position among the inputs: Adapter}``, with the layouts of these inputs.
      forward_mode: use JAX's autodiff for the low-rank products.

    Returns:
      The outputs, equal to those for ``W + ΔW`` to within rounding.

    >>> closed = jax.make_jaxpr(lambda w, x: x @ w)(jnp.ones((3, 4)), jnp.ones((2, 3)))
    >>> adapter = Adapter(jnp.ones((1, 4)), jnp.ones(1), jnp.ones((1, 3)), 0.5, Layout("w"))
    >>> evaluate(closed, [jnp.ones((3, 4)), jnp.ones((2, 3))], {0: adapter})[0][0]
    Array([4.5, 4.5, 4.5, 4.5], dtype=float32)
    """
    walk = Walk()
    walk.forward_mode = forward_mode
    weights = [
        Weight.of(i, arg, adapters[i]) if i in adapters else arg for i, arg in enumerate(args)
    ]
    return walk.closed(closed, weights)


def roles_of_product(
    eqn: core.JaxprEqn, position: int, weight: Weight
) -> tuple[tuple[Label, ...], ...] | None:
    """Return the labels that are batch, summed or selected, and output axes; None if not known."""
    name, dims = eqn.primitive.name, weight.dims
    if name == "dot_general":
        contract, batch = (axes[position] for axes in eqn.params["dimension_numbers"])
        free = [d for d in range(len(dims)) if d not in (*contract, *batch)]
    elif name == "ragged_dot_general":
        if position != 1 or (axes := ragged.axes_of(eqn)) is None:
            return None
        contract, batch = axes.summed, (axes.group, *axes.batch)
        free = [d for d in range(len(dims)) if d not in (*contract, *batch)]
    elif name == "gather":
        if position or gather_dims(eqn, weight) is None:
            return None
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        batch = numbers.operand_batching_dims
        shape = weight.value.shape
        contract = [
            d
            for d, size in enumerate(sizes)
            if d not in batch and (size < shape[d] or d in numbers.collapsed_slice_dims)
        ]
        free = [d for d in range(len(dims)) if d not in (*contract, *batch)]
    else:
        if position != 1 or eqn.params["batch_group_count"] != 1:
            return None
        out, channels, *window = eqn.params["dimension_numbers"].rhs_spec
        contract, batch, free = [*window, channels], (), [out]
    return tuple(tuple(a for d in some for a in dims[d]) for some in (batch, contract, free))


def gather_dims(eqn: core.JaxprEqn, weight: Weight) -> dict[int, int] | None:
    """Return ``{dimension of the weight: of the output}``; None if it is no look-up of rows."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, batch = weight.value.shape, numbers.operand_batching_dims
    if any(n not in (1, shape[d]) for d, n in enumerate(sizes) if d not in batch):
        return None
    kept = [d for d in range(len(sizes)) if d not in (*numbers.collapsed_slice_dims, *batch)]
    return dict(zip(kept, numbers.offset_dims))


def _dot_term(
    eqn: core.JaxprEqn, x: PyTree, position: int, weight: Weight, forward_mode: bool
) -> jax.Array | None:
    """Return ``s · ((x qᵀ) · λ) p`` with the axes of a ``dot_general``; None if it does not fit."""
    x = jnp.asarray(x)
    (contract, batch), (x_contract, x_batch) = (
        [axes[side] for axes in eqn.params["dimension_numbers"]]
        for side in (position, 1 - position)
    )
    stack, ins, outs = weight.roles
    adapter = weight.adapter
    summed = {a for d in contract for a in weight.dims[d]}
    if summed == {*outs}:  # the transposed increment swaps the two factors
        ins, outs = outs, ins
        adapter = adapter._replace(p=adapter.q, q=adapter.p)
    shared = {a for d in batch for a in weight.dims[d]}
    if summed != {*ins} or not shared <= {*stack} or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    letters = dict(zip((*stack, *ins, *outs), string.ascii_letters))
    free = iter(string.ascii_letters[len(letters) :])
    spelled = ["".join(letters[a] for a in dim) for dim in weight.dims]
    common = dict(zip((*x_contract, *x_batch), (spelled[d] for d in (*contract, *batch))))
    of_x = [common[d] if d in common else next(free) for d in range(x.ndim)]
    xs, ws = "".join(of_x), "".join(letters.values())
    shape = [weight.sizes[a] for a in letters]
    size = {**dict(zip(of_x, x.shape)), **dict(zip(ws, shape))}
    of_weight = [a for d, a in enumerate(spelled) if d not in (*contract, *batch)]
    rest = [a for d, a in enumerate(of_x) if d not in common]
    sides = (*of_weight, *rest) if position == 0 else (*rest, *of_weight)
    ys = "".join((*(of_x[d] for d in x_batch), *sides))
    axes, start, end = tuple(range(len(ws))), len(stack), len(stack) + len(ins)
    layer = Layout("w", axes[start:end], axes[end:], axes[:start], "einsum")
    options = {"scale": adapter.scale, "forward_mode": forward_mode}
    options |= {"precision": eqn.params["precision"]}
    x = x.reshape([size[a] for a in xs])
    y = einsum.output(layer, (xs, ws, ys), adapter, x, None, shape, options)
    return y.reshape(_shape(eqn.outvars[0]))


def _moved(eqn: core.JaxprEqn, inputs: Sequence[Any], is_reading: bool) -> list[Weight] | None:
    """Return the weights after an operation that moves entries; None for other operations.

    Their values are still those before it.
    """
    weight, *starts = inputs
    if not isinstance(weight, Weight):
        return None
    name, params = eqn.primitive.name, eqn.params
    dims = weight.dims
    if is_reading and (name in PASSING or name == "rev"):
        return [weight]
    if name in PASSING:  # a quantisation must see the sum
        return [weight] if is_float(eqn.outvars[0]) and name != "reduce_precision" else None
    if name == "transpose":
        return [weight._replace(dims=tuple(dims[d] for d in params["permutation"]))]
    if name == "squeeze":
        gone = {d % len(dims) for d in params["dimensions"]}
        kept = weight._replace(dims=tuple(dim for d, dim in enumerate(dims) if d not in gone))
        return _one(_without(kept, [a for d in gone for a in dims[d]]))
    if name == "reshape" and params["dimensions"] is None:
        return _one(_reshaped(weight, _shape(eqn.outvars[0])))
    if name == "broadcast_in_dim":
        return _one(_broadcast(eqn, weight, is_reading))
    if name in ("slice", "dynamic_slice") or (name == "split" and is_reading):
        return _sliced(eqn, weight, starts, is_reading)
    return None


def _one(weight: Weight | None) -> list[Weight] | None:
    return None if weight is None else [weight]


def _without(weight: Weight, labels: Sequence[Label]) -> Weight | None:
    """Return the weight without labels of size 1; None if its factors need them."""
    stack, ins, outs = weight.roles
    adapter = weight.adapter
    if adapter is None:
        return weight
    for label in labels:
        if label in stack:
            axis = stack.index(label)
            adapter = jax.tree.map(lambda leaf, at=axis: jnp.squeeze(leaf, at), adapter)
            stack = stack[:axis] + stack[axis + 1 :]
    ins, outs = (tuple(a for a in role if a not in labels) for role in (ins, outs))
    return weight._replace(adapter=adapter, roles=(stack, ins, outs)) if ins and outs else None


def _reshaped(weight: Weight, shape: Sequence[int]) -> Weight | None:
    """Return the weight with its labels distributed over other dimensions, in the same order.

    None if a new dimension is not a product of whole labels or of parts of them, or if a stack axis
    would be split.
    """
    sizes, roles = dict(weight.sizes), weight.roles
    labels = [a for dim in weight.dims for a in dim if sizes[a] != 1]
    ones = [a for dim in weight.dims for a in dim if sizes[a] == 1]
    dims = []
    for size in shape:
        dim, product = [], 1
        while product < size and labels:
            label, wanted = labels.pop(0), size // product
            if size % product:
                return None
            if sizes[label] > wanted:  # split the label
                if sizes[label] % wanted or label in roles[0]:
                    return None
                parts = [label._replace(part=label.part + side) for side in "lr"]
                sizes |= dict(zip(parts, (wanted, sizes[label] // wanted)))
                roles = tuple(
                    tuple(b for a in role for b in (parts if a == label else [a])) for role in roles
                )
                labels.insert(0, parts[1])
                label = parts[0]
            dim.append(label)
            product *= sizes[label]
        if product != size:
            return None
        dims.append(tuple(dim))
    return _without(weight._replace(dims=tuple(dims), sizes=sizes, roles=roles), ones)


def _broadcast(eqn: core.JaxprEqn, weight: Weight, is_reading: bool) -> Weight | None:
    """Return the weight with further dimensions; with adapters only if they have size 1."""
    shape, kept = _shape(eqn.outvars[0]), [*eqn.params["broadcast_dimensions"]]
    sizes, dims = dict(weight.sizes), []
    for d, size in enumerate(shape):
        if d in kept and weight.value.shape[kept.index(d)] == size:
            dims.append(weight.dims[kept.index(d)])
        elif size == 1:
            dims.append(())
        elif is_reading:
            dims.append((Label(-1, f"{len(sizes)}"),))
            sizes[dims[-1][0]] = size
        else:
            return None
    return weight._replace(dims=tuple(dims), sizes=sizes)


def _sliced(
    eqn: core.JaxprEqn, weight: Weight, starts: Sequence[Any], is_reading: bool
) -> list[Weight] | None:
    """Return the weights after a slice or a split; with adapters only for slices of stacks."""
    results, stack, before = [], weight.roles[0], weight.value.shape
    for output in eqn.outvars:
        adapter, sizes = weight.adapter, dict(weight.sizes)
        for d, (dim, size) in enumerate(zip(weight.dims, _shape(output), strict=True)):
            if size == before[d]:
                continue
            if len(dim) != 1 or not (is_reading or dim[0] in stack):
                return None
            sizes[dim[0]] = size
            if adapter is not None:
                cut = functools.partial(_cut, eqn, d, starts, axis=stack.index(dim[0]))
                adapter = jax.tree.map(cut, adapter)
        results.append(weight._replace(adapter=adapter, sizes=sizes))
    return results


def _cut(
    eqn: core.JaxprEqn, d: int, starts: Sequence[Any], leaf: jax.Array, *, axis: int
) -> jax.Array:
    """Return a factor sliced along a stack axis, as the operation slices dimension ``d``."""
    params = eqn.params
    if eqn.primitive.name == "dynamic_slice":
        return lax.dynamic_slice_in_dim(leaf, starts[d], params["slice_sizes"][d], axis)
    start, limit = params["start_indices"][d], params["limit_indices"][d]
    stride = params["strides"][d] if params["strides"] else 1
    return lax.slice_in_dim(leaf, start, limit, stride, axis)


def merged(value: PyTree) -> Any:
    """Return a weight with its increment as an array, and any other value as it is."""
    return value.merged() if isinstance(value, Weight) else value


def _shape(output: core.Var) -> tuple[int, ...]:
    aval: Any = output.aval
    return aval.shape


def _arrays(value: PyTree) -> Any:
    return (value.value, value.adapter) if isinstance(value, Weight) else value


def _with_arrays(value: PyTree, arrays: PyTree) -> Any:
    if not isinstance(value, Weight):
        return arrays
    return value._replace(value=arrays[0], adapter=arrays[1])


def _unstacked(value: PyTree) -> tuple[Any, Any]:
    """Return a scanned value as one step of the scan sees it, and the arrays to scan over."""
    if not isinstance(value, Weight):
        return value, value
    first, (stack, ins, outs) = value.dims[0], value.roles
    one = value._replace(dims=value.dims[1:])
    if value.adapter is None:
        return one, _arrays(value)
    if len(first) != 1 or first[0] not in stack:
        return None, value.merged()
    axis = stack.index(first[0])
    adapter = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, axis, 0), value.adapter)
    one = one._replace(roles=(stack[:axis] + stack[axis + 1 :], ins, outs))
    return one, (value.value, adapter)


def run_alone(eqn: core.JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Return the outputs of one operation, run as a program of its own."""
    values = {v: x for v, x in zip(eqn.invars, inputs) if not isinstance(v, core.Literal)}
    return core.jaxpr_as_fun(_compat.one_operation(eqn, [*values]))(*values.values())
