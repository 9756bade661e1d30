"""Layouts of weights, read from the products in the jaxpr of a function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from adalora_jax._src.core.layout import Layout
from adalora_jax._src.modules.functional_jaxpr import (
    REMAT,
    Label,
    Walk,
    Weight,
    gather_dims,
    merged,
    roles_of_product,
    run_alone,
)


class Use(NamedTuple):
    """Roles of a weight's axes in one product.

    Attributes:
      kind: ``"dot"``, ``"conv"`` or ``"embed"``.
      batch: axes that the product has in common with the other operand and its output.
      ins: axes that the product sums over, or that a look-up selects from.
      outs: axes of the product's output.
    """

    kind: str
    batch: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]


class _Reader(Walk):
    """Evaluates a jaxpr of abstract values, and records how its products use each weight."""

    is_reading = True

    def __init__(self) -> None:
        self.uses: dict[int, list[Use | None]] = {}

    def product(self, eqn: core.JaxprEqn, inputs: list[Any]) -> Any:
        (y,) = run_alone(eqn, [merged(value) for value in inputs])
        is_gather = eqn.primitive.name == "gather"
        for position, weight in enumerate(inputs):
            if not isinstance(weight, Weight) or (is_gather and jnp.ndim(inputs[1]) < 2):
                continue  # one index selects from a stack, several look up rows
            if roles := roles_of_product(eqn, position, weight):
                self.uses.setdefault(weight.index, []).append(
                    _use(eqn.primitive.name, weight, *roles)
                )
        if is_gather and isinstance(inputs[0], Weight):
            return _gathered(eqn, inputs[0], y)  # the rows may be weights of a later product
        return y

    def equation(self, eqn: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
        name, params = eqn.primitive.name, eqn.params
        if name in REMAT:
            return self.run(params["jaxpr"], (), inputs)
        if name in ("custom_jvp_call", "custom_vjp_call"):
            return self.run(params["call_jaxpr"].jaxpr, params["call_jaxpr"].consts, inputs)
        if name == "while":
            self.closed(params["body_jaxpr"], inputs[params["cond_nconsts"] :])
        return super().equation(eqn, inputs)


def find_layouts(
    closed: core.ClosedJaxpr, weights: Mapping[int, str], args: Sequence[Any]
) -> dict[int, Layout | None]:
    """Return the layouts of weights that a traced function shows.

    Axes over which the function scans, or by which it indexes, are stack axes. If a weight is used
    in several products, they must read it as the same matrices or as their transposes; then a
    look-up, or else the first product, tells inputs from outputs.

    Args:
      closed: the traced function.
      weights: ``{position among the inputs: name of the weight}``.
      args: its inputs; shapes are enough.

    Returns:
      ``{position: Layout}`` of the weights in a product; None for those whose products differ or
      split an axis.

    >>> import jax.numpy as jnp
    >>> w, x = jnp.ones((5, 4, 3)), jnp.ones((2, 3))
    >>> def f(w, x):
    ...     return jax.lax.map(lambda w: x @ w.T, w)
    >>> layout = find_layouts(jax.make_jaxpr(f)(w, x), {0: "w"}, [w, x])[0]
    >>> layout.ins, layout.outs, layout.stack
    ((1,), (0,), ())
    """
    reader = _Reader()

    def run(*args: Any) -> list[jax.Array]:
        return reader.closed(
            closed, [Weight.of(i, a) if i in weights else a for i, a in enumerate(args)]
        )

    jax.eval_shape(run, *args)
    return {
        index: _layout(uses, weights[index], len(args[index].shape))
        for index, uses in reader.uses.items()
        if any(use is None or (use.ins and use.outs) for use in uses)
    }


def _layout(uses: Sequence[Use | None], name: str, ndim: int) -> Layout | None:
    """Return the layout that all uses of a weight agree on; None if they do not."""
    if None in uses:
        return None
    known = [use for use in uses if use is not None and use.ins and use.outs]
    if len({frozenset((frozenset(use.ins), frozenset(use.outs))) for use in known}) != 1:
        return None
    use = min(known, key=lambda use: use.kind != "embed")
    stack = [a for a in range(ndim) if a not in (*use.ins, *use.outs)]
    batch = {axis for other in known for axis in other.batch}
    lifted = 0
    while lifted in stack and lifted not in batch:
        lifted += 1
    ins, outs, stack = (
        tuple(axis - lifted for axis in axes if axis >= lifted)
        for axes in (use.ins, use.outs, stack)
    )
    dense = len(ins) == len(outs) == 1 and not stack
    kind = use.kind if use.kind != "dot" else "dense" if dense else "einsum"
    return Layout(name, ins, outs, stack, kind)


def _use(name: str, weight: Weight, *roles: tuple[Label, ...]) -> Use | None:
    """Return the use of a weight by the roles of its labels; None if parts of an axis differ."""
    kind = {"dot_general": "dot", "conv_general_dilated": "conv", "gather": "embed"}[name]
    axes: list[list[int]] = []
    for role in roles:
        found = list(dict.fromkeys(label.axis for label in role if label.axis >= 0))
        for axis in found:
            parts = [weight.sizes[label] for label in role if label.axis == axis]
            if math.prod(parts) != weight.sizes[Label(axis)]:
                return None
        # The inputs of a convolution are its window and then its channels.
        axes.append(found if kind == "conv" else sorted(found))
    batch, ins, outs = map(tuple, axes)
    return Use(kind, batch, ins, outs)


def _gathered(eqn: core.JaxprEqn, weight: Weight, y: jax.Array) -> jax.Array | Weight:
    """Return gathered rows as a weight, whose other dimensions have labels of no axis."""
    kept = gather_dims(eqn, weight)
    if kept is None:
        return y
    labels = {kept[d]: dim for d, dim in enumerate(weight.dims) if d in kept}
    sizes, dims = dict(weight.sizes), []
    for d, size in enumerate(y.shape):
        if d in labels and math.prod(sizes[a] for a in labels[d]) == size:
            dims.append(labels[d])
        else:
            dims.append((Label(-1, f"{weight.index}:{d}:{size}"),))
            sizes[dims[-1][0]] = size
    return weight._replace(value=y, dims=tuple(dims), sizes=sizes)
