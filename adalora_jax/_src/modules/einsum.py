"""Layers that compute an einsum: the axes of their weights, and their adapter output.

``DenseGeneral`` and ``LinearGeneral`` are einsums as well.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from adalora_jax._src.core.adapter import Adapter, dense_output, keys_of
from adalora_jax._src.core.layout import Layout


def labels_of(
    layer: Layout, module: object, equation: str | None, ndim: int
) -> tuple[str, str, str]:
    """Return the labels of input, weight and output of a general or an einsum layer."""
    if layer.kind == "general":
        equation = _general_equation(module, ndim)
    return _labels(equation or equation_of(module) or "", ndim)


def stack_first(layer: Layout, labels: tuple[str, str, str], x: jax.Array) -> jax.Array:
    """Return an einsum's input as ``[*stack, *free, in]``, with those stack axes that it has."""
    xs, ws, _ = labels
    stack, ins = ([ws[axis] for axis in axes] for axes in (layer.stack, layer.ins))
    free = [a for a in xs if a not in stack and a not in ins]
    x = x.transpose([xs.index(a) for a in (*(a for a in stack if a in xs), *free, *ins)])
    return x.reshape(*x.shape[: x.ndim - len(ins)], -1)


def output(
    layer: Layout,
    labels: tuple[str, str, str],
    adapter: Adapter,
    x: jax.Array,
    key: jax.Array | None,
    shape: Sequence[int],
    options: dict[str, Any],
) -> jax.Array:
    """Return the adapter output of ``y = einsum(x, W)``.

    Args:
      layer: the layout of W.
      labels: the labels of input, weight and output, from :func:`labels_of`.
      adapter: the adapter, with the layer's own stack axes in front.
      x: the layer's input.
      key: PRNG key for the dropout of x; None disables dropout.
      shape: shape of W.
      options: further arguments of :func:`dense_output`.
    """
    xs, ws, ys = labels
    axes = (layer.stack, layer.ins, layer.outs)
    stack, ins, outs = ("".join(ws[axis] for axis in axes) for axes in axes)
    free = [a for a in xs if a not in stack and a not in ins]
    size = dict(zip(xs, x.shape)) | dict(zip(ws, shape))
    x = stack_first(layer, labels, x)
    function = functools.partial(dense_output, **options)
    keys = keys_of(key, tuple(size[a] for a in stack if a in xs))
    for label in reversed(stack):
        axis = 0 if label in xs else None  # a shared input has one dropout mask
        function = jax.vmap(function, in_axes=(0, axis, axis))
    order = [*stack, *free, *outs]
    y = function(adapter, x, keys).reshape([size[a] for a in order])
    return y.transpose([order.index(a) for a in ys])


def equation_of(module: object) -> str | None:
    """Return the equation among a module's attributes; None if it has none."""
    for name in ("einsum_str", "equation", "eqn"):
        if isinstance(getattr(module, name, None), str):
            return getattr(module, name)
    return None


def general_axes(module: object) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return batch axes, contracted axes and features of a DenseGeneral or a LinearGeneral."""

    def as_tuple(value: int | Iterable[int]) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, Iterable) else (value,)

    linen, nnx = ("batch_dims", "axis", "features"), ("batch_axis", "axis", "out_features")
    names = linen if hasattr(module, "batch_dims") else nnx
    batch, axes, features = (as_tuple(getattr(module, name)) for name in names)
    return batch, axes, features


def _general_equation(module: object, ndim: int) -> str:
    batch, axes, features = general_axes(module)
    xs = _letters(ndim)
    outs = _letters(len(features), skip=ndim)

    def in_order(axes: tuple[int, ...]) -> str:
        return "".join(xs[a] for a in sorted(a % ndim for a in axes))

    batch, ins = in_order(batch), in_order(axes)  # Flax sorts the axes
    free = "".join(a for a in xs if a not in batch + ins)
    return f"{xs},{batch}{ins}{outs}->{batch}{free}{outs}"


def _labels(equation: str, ndim: int) -> tuple[str, str, str]:
    """Return the labels of input, weight and output, with ``...`` expanded to an input's ndim.

    >>> _labels("...d, df -> ...f", 3)
    ('ABd', 'df', 'ABf')
    """
    (xs, ws), ys = operands(equation)
    dots = "".join(a for a in string.ascii_uppercase + string.ascii_lowercase if a not in equation)
    dots = dots[: max(0, ndim - len(xs.replace("...", "")))]
    return xs.replace("...", dots), ws, ys.replace("...", dots)


def operands(equation: str) -> tuple[list[str], str]:
    """Return the labels of an equation's operands and of its output.

    >>> operands("...d, df -> ...f")
    (['...d', 'df'], '...f')
    """
    inputs, _, output = equation.replace(" ", "").partition("->")
    return inputs.split(","), output


def _roles(xs: str, ws: str, ys: str) -> tuple[str, str, str]:
    """Return the weight's stack, input and output labels.

    A label in all three operands is a stack label. So are equal leading labels of weight and
    output that are not in the input: such a weight holds one matrix for each of several outputs.
    """
    stack = [a for a in ws if a in xs and a in ys]
    for w, y in zip(ws, ys):
        if w != y or w in xs:
            break
        stack.append(w)
    stack = "".join(a for a in ws if a in stack)
    ins = "".join(a for a in ws if a in xs and a not in ys)
    return stack, ins, "".join(a for a in ws if a not in stack and a not in ins)


def weight_axes(equation: str) -> tuple[tuple[int, ...], ...] | None:
    """Return the weight's stack, in and out axes; None if the equation is not a sum of x W."""
    inputs, ys = operands(equation)
    if len(inputs) != 2 or not ys or "..." in inputs[1]:
        return None
    xs, ws = inputs
    roles = _roles(xs, ws, ys)
    plain = len(set(ws)) == len(ws) and all(a in ys for a in roles[2])
    kept = all(a in ys or a in ws for a in xs.replace("...", ""))
    if not (plain and kept and roles[1] and roles[2]):
        return None
    return tuple(tuple(ws.index(a) for a in role) for role in roles)


def _letters(count: int, skip: int = 0) -> str:
    return string.ascii_letters[skip : skip + count]
