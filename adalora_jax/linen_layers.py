"""The layers of a linen model: found in a trace of it, and read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta, unfreeze

from adalora_jax import layers, targets, tree

METHODS = ("__call__", "attend")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Here:
    """Nothing, but different at each place of the parameters and in each trace.

    ``nn.jit`` runs a model's code once for all calls that look alike, and once for all layers that
    do; what watches the code run would see the others only by the difference.
    """

    path: tuple[str, ...]
    trace: object


def candidates(
    module: nn.Module,
    variables: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, targets.Candidate]:
    """All modules the model calls, by path, seen in a trace of it.

    Modules that share their scope (``nn.share_scope``) have one path. Where several of them are
    layers, each has the path of its weight.
    """
    variables, params = whole(variables), unboxed(variables)
    found: dict[str, dict[str | None, targets.Candidate]] = {}

    def record(call: Callable, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        output = call(*call_args, **call_kwargs)
        if context.method_name in METHODS:
            module = context.module
            layer = layer_of(module, input_of(call_args, call_kwargs)[1])
            shape = _whole_shape(module, layer, params) if layer else ()
            here = found.setdefault("/".join(module.path), {})
            candidate = targets.Candidate(module, layer, shape)
            here.setdefault(layer.weight if layer else None, candidate)
        return output

    is_data = lambda value: all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))
    flat, treedef = jax.tree.flatten((args, {**kwargs, "mutable": nn.DenyList("params")}))
    data = {i: leaf for i, leaf in enumerate(flat) if is_data(leaf)}

    def run(variables, rng, data):
        args, kwargs = treedef.unflatten([data.get(i, leaf) for i, leaf in enumerate(flat)])
        # A stream named params is flax's default for every stream a model may ask for.
        return module.apply(variables, *args, **{"rngs": {"params": rng}, **kwargs})

    marked = {**variables, "params": _marked(unfreeze(variables["params"]), (), object())}
    with nn.intercept_methods(record):
        jax.eval_shape(run, marked, jax.random.key(0), data)
    result = {}
    for path, here in found.items():
        several = {f"{path}/{weight}".lstrip("/"): here[weight] for weight in here if weight}
        first = next(iter(several.values()), None) or here[None]
        result |= several if len(several) > 1 else {path: first}
    return result


def _marked(params: Any, path: tuple[str, ...], trace: object) -> Any:
    if not isinstance(params, Mapping):
        return params
    inside = {name: _marked(node, (*path, name), trace) for name, node in params.items()}
    return {**inside, tree.HOLDER: _Here(path, trace)}


def layer_of(module: nn.Module, equation: str | None) -> layers.Layer | None:
    """How a bound module's weight reads as matrices; None for one that cannot be adapted."""
    own = meta.unbox(dict(module.variables.get("params", {})))
    own = {
        name: leaf
        for name, leaf in own.items()
        if not isinstance(leaf, Mapping) and not name.startswith(tree.HOLDER)
    }
    weights = {name: leaf.ndim for name, leaf in own.items()}
    if len(own) > 1 and (mine := _spoken_of(module, own)):
        weights = {name: weights[name] for name in mine}
    return layers.layer_of(module, weights, equation)


def _spoken_of(module: nn.Module, own: Mapping[str, Any]) -> list[str]:
    """The parameters of a scope that are the module's, not those of others that share the scope.

    By what its fields say: a name, or else the shape.
    """
    names = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
    said = [getattr(module, name, None) for name in names]
    named = [name for name in own if any(isinstance(v, str) and v == name for v in said)]
    shape: Any = getattr(module, "shape", None)
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else None
    return named or [name for name in own if tuple(own[name].shape) == shape]


def input_of(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The array a layer was called with, and the equation if it was given one."""
    values = [*args, *kwargs.values()]
    equations = [value for value in values if isinstance(value, str) and "->" in value]
    arrays = [value for value in values if hasattr(value, "shape")]
    return (arrays or [None])[0], (equations or [None])[0]


def _whole_shape(module, layer, params) -> tuple[int, ...]:
    """The shape of a layer's weight, with the axes that lifted transforms stacked in front."""
    stacked = tuple(tree.at(params, (*module.path, layer.weight)).shape)
    own = own_shape(module, layer)
    if stacked[len(stacked) - len(own) :] != own:
        raise ValueError(
            f"{'/'.join(module.path)!r} has a weight of shape {stacked} for layers of shape {own}: "
            "adapters need stacked layers along leading axes; give nn.scan or nn.vmap "
            "variable_axes={'params': 0}."
        )
    return stacked


def own_shape(module: nn.Module, layer: layers.Layer) -> tuple[int, ...]:
    """The shape of a layer's weight as the layer itself sees it."""
    return tuple(meta.unbox(module.get_variable("params", layer.weight)).shape)


def whole(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """The variables with the weights of a quantised model in their places in ``params``.

    >>> whole({"params": {"up": {"bias": 0}}, "quantized": {"up": {"kernel": 1}}})
    {'params': {'up': {'bias': 0, 'kernel': 1}}}
    """
    if tree.PACKED not in variables:
        return variables
    rest = {name: leaf for name, leaf in variables.items() if name != tree.PACKED}
    return {**rest, "params": _overlaid(variables["params"], variables[tree.PACKED])}


def apart(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of :func:`whole`."""
    params, packed = _apart(unfreeze(variables["params"]))
    return {**variables, "params": params, **({tree.PACKED: packed} if packed else {})}


def unboxed(variables: Mapping[str, Any]) -> Any:
    """The parameters without their metadata, where they are: unboxing by Flax may move them."""
    value = lambda box: box.value if isinstance(box, nn.Partitioned) else box.unbox()
    return meta.map_axis_meta(value, unfreeze(whole(variables)["params"]))


def _apart(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested parameters without the packed weights, and these alone."""
    rest: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    for name, node in params.items():
        if isinstance(node, Mapping):
            rest[name], inside = _apart(node)
            packed |= {name: inside} if inside else {}
        else:
            (packed if tree.is_packed(node) else rest)[name] = node
    return rest, packed


def _overlaid(below: Any, above: Any) -> Any:
    """Nested dicts, with the leaves of both."""
    if not isinstance(above, Mapping):
        return above
    return {**below, **{name: _overlaid(below.get(name, {}), above[name]) for name in above}}
