"""The weights of a function, with layouts that its jaxpr shows or that the user declares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.tree_util import DictKey, GetAttrKey, KeyPath, SequenceKey, tree_flatten_with_path

from adalora_jax._src.core import rank_spec
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules.candidates import Candidate
from adalora_jax._src.modules.functional_jaxpr import (
    REMAT,
    Label,
    Trace,
    Walk,
    Weight,
    gather_dims,
    merged,
    roles_of_product,
    run_alone,
)
from adalora_jax._src.modules.functional_params import Params, is_array, name_of, weight_name

Declared = Mapping[str, Layout]  # by pattern


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
                self.uses.setdefault(weight.number, []).append(
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
    kind = {"conv_general_dilated": "conv", "gather": "embed"}.get(name, "dot")
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
            dims.append((Label(-1, f"{len(sizes)}"),))
            sizes[dims[-1][0]] = size
    return weight._replace(value=y, dims=tuple(dims), sizes=sizes)


def candidates(
    fn: Callable[..., PyTree],
    params: PyTree,
    inputs: tuple[PyTree, ...],
    declared: Declared | None,
) -> dict[str, Candidate]:
    """Return the weights of a function by path, and the containers that they are in.

    A weight whose axes are neither shown by the function nor declared has a reason.
    """
    leaves = Params.of(params).leaves
    keys = {name_of(path): path for path, _ in tree_flatten_with_path(params)[0]}
    trace = Trace.of(fn, params, inputs)
    weights = {
        name: leaf
        for name, leaf in leaves.items()
        if is_array(leaf) and leaf.ndim >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating)
    }
    numbers = {name: [*trace.arrays].index(i) for i, name in enumerate(leaves) if name in weights}
    found = find_layouts(
        trace.closed,
        {number: weight_name(name) for name, number in numbers.items()},
        [*trace.arrays.values()],
    )
    read = {name: layer for name, number in numbers.items() if (layer := found.get(number))}
    known = read | _declared(declared, weights)
    result = {}
    for name, path in keys.items():
        for end in range(len(path)):
            result.setdefault(name_of(path[:end]), Candidate(_node(params, path[:end])))
        if name in weights and name not in known:
            unclear = numbers[name] in found  # its products contradict each other
            shape = tuple(weights[name].shape)
            result[name] = Candidate(weights[name], None, shape, _unknown(name, unclear))
    for name, layer in known.items():
        path = _module_path(keys[name], known)
        module = _node(params, path) if path != keys[name] else weights[name]
        result[name_of(path)] = Candidate(module, layer, tuple(weights[name].shape))
    return result


def _declared(declared: Declared | None, weights: Mapping[str, PyTree]) -> dict[str, Layout]:
    """Return the declared layouts by the paths of the leaves that their patterns match.

    Raises:
      ValueError: ``declared`` is not ``{pattern: Layout}``, a pattern matches no weight, or a
        Layout has a shape, is of kind ``"unknown"``, or has more axes than its weight.
    """
    result: dict[str, Layout] = {}
    if declared is None:
        return result
    if not isinstance(declared, Mapping):
        raise ValueError(
            f"`layers={type(declared).__name__}`: is not a dict; pass {{pattern: Layout(...)}}."
        )
    for pattern, layout in declared.items():
        if not isinstance(pattern, str) or not isinstance(layout, Layout):
            raise ValueError(
                f"`layers={{{pattern!r}: {layout!r}}}`: must map a pattern to a Layout; pass "
                "{pattern: Layout(...)}."
            )
        matched = [name for name in weights if rank_spec.matches(pattern, name)]
        if not matched:
            raise ValueError(
                f"`layers`: {pattern!r} matches no parameter with two or more axes; name one of "
                f"them: {', '.join([*weights][:10])}."
            )
        for name in matched:
            shape = tuple(weights[name].shape)
            if layout.shape is not None or layout.kind == "unknown" or layout.ndim > len(shape):
                raise ValueError(
                    f"`layers={{{pattern!r}: {layout!r}}}`: does not fit {name!r}, of shape "
                    f"{shape}; pass a Layout of its axes, without a shape."
                )
            named = dataclasses.replace(layout, weight=weight_name(name))
            result.setdefault(name, named)
    return result


def _unknown(name: str, unclear: bool) -> str:
    problem = (
        "the function uses its axes in different roles"
        if unclear
        else "no product in the function shows which of its axes are inputs and outputs"
    )
    return f"{problem} (declare them: layers={{{name!r}: Layout(ins=..., outs=...)}})"


def _module_path(path: KeyPath, weights: Mapping[str, Layout]) -> KeyPath:
    """Return the path of a weight's module if it is the only weight in it, else the weight's."""
    module = path[:-1]
    inside = [name for name in weights if name.startswith(f"{name_of(module)}/")]
    named = bool(path) and isinstance(path[-1], (DictKey, GetAttrKey))
    return module if named and module and len(inside) == 1 else path


def _node(params: PyTree, path: KeyPath) -> PyTree:
    """Return the node of a pytree at a key path; None if the keys do not tell how to get it."""
    for key in path:
        if isinstance(key, GetAttrKey):
            params = getattr(params, key.name)
        elif isinstance(key, (DictKey, SequenceKey)):
            params = params[key.key if isinstance(key, DictKey) else key.idx]
        else:
            return None
    return params
