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
from adalora_jax._src.core.layout import Layout, operands


def labels_of(
    layer: Layout, module: object, equation: str | None, ndim: int
) -> tuple[str, str, str]:
    """Return the labels of input, weight and output of a general or an einsum layer."""
    if layer.kind == "general":
        equation = _general_equation(module, ndim)
    return _labels(layer.equation or equation or equation_of(module) or "", ndim)


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


def labels_of_call(layer: Layout, ndim: int, *, attend: bool = False) -> tuple[str, str, str]:
    """Return the labels of input, weight and output of a declared layer.

    Args:
      layer: a layout of kind ``"dense"``, ``"embed"`` or with an equation.
      ndim: number of axes of the input.
      attend: whether an embedding is used as an output layer.

    >>> labels_of_call(Layout("w", ins=(1, 2), outs=(0,)), 4)
    ('ABbc', 'abc', 'ABa')
    >>> labels_of_call(Layout("w", kind="embed"), 2)  # the rows that a look-up takes have no label
    ('AB', 'ab', 'ABb')
    """
    ws = _letters(layer.ndim)
    ins, outs = ("".join(ws[axis] for axis in axes) for axes in (layer.ins, layer.outs))
    summed, result = (outs, ins) if attend else (ins, outs)
    summed = "" if layer.kind == "embed" and not attend else summed
    return _labels(layer.equation or f"...{summed},{ws}->...{result}", ndim)


def input_shapes(
    layer: Layout, shape: Sequence[int], *, attend: bool = False
) -> list[tuple[int, ...]]:
    """Return shapes of example inputs of a declared layer, with several numbers of axes.

    Args:
      layer, attend: as in :func:`labels_of_call`.
      shape: shape of the layer's own weight.

    >>> input_shapes(Layout("w"), (6, 4))
    [(2, 2, 6), (2, 6), (2, 2, 2, 6), (6,)]
    """
    fixed = len(labels_of_call(layer, 0, attend=attend)[0])
    lead = (2, 1, 3, 0) if fixed else (2, 1, 3)  # a look-up of one row need not be a look-up
    found = []
    for n in lead if "..." in (layer.equation or "...") else (0,):
        xs, ws, _ = labels_of_call(layer, fixed + n, attend=attend)
        size = dict(zip(ws, shape))
        found.append(tuple(size.get(label, 2) for label in xs))
    return found


def _labels(equation: str, ndim: int) -> tuple[str, str, str]:
    """Return the labels of input, weight and output, with ``...`` expanded to an input's ndim.

    >>> _labels("...d, df -> ...f", 3)
    ('ABd', 'df', 'ABf')
    """
    (xs, ws), ys = operands(equation)
    dots = "".join(a for a in string.ascii_uppercase + string.ascii_lowercase if a not in equation)
    dots = dots[: max(0, ndim - len(xs.replace("...", "")))]
    return xs.replace("...", dots), ws, ys.replace("...", dots)


def _letters(count: int, skip: int = 0) -> str:
    return string.ascii_letters[skip : skip + count]
