"""Layers of a linen model: tracing to find them, and their weights' layouts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta, unfreeze
from flax.linen.module import InterceptorContext
from jax.ad_checkpoint import checkpoint_name
from jax.tree_util import DictKey, tree_flatten_with_path

from adalora_jax._src import _compat
from adalora_jax._src.core import pytree
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import foreign, layers, usage
from adalora_jax._src.modules.candidates import Candidate, with_use

METHODS = ("__call__", "attend")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _ScopeMarker:
    """A static marker, unique per scope and trace.

    ``nn.jit`` traces a model's code once for all calls and layers whose inputs have equal types.
    The marker makes these types differ, so that the interceptor sees every layer.
    """

    path: tuple[str, ...]
    trace: object


def candidates(
    module: nn.Module,
    variables: Mapping[str, PyTree],
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, Any],
    declared: foreign.Declarations | None = None,
) -> dict[str, Candidate]:
    """Return all modules that the model calls in a trace, by path.

    Modules that share their scope (``nn.share_scope``) have one path. If several of them are
    layers, each has the path of its weight. The trace also shows how each weight is used, see
    ``usage.py``. A module that the model applies to computed weights
    (``head.apply({"params": ...}, x)``) is not one of the model's layers.
    """
    try:
        found, uses, custom = _traced(module, variables, args, kwargs, declared)
    except flax.errors.ScopeCollectionNotFound:  # nn.map_variables(init=True) if mutable
        kwargs = {"mutable": False, **kwargs}
        found, uses, custom = _traced(module, variables, args, kwargs, declared)
    not_adapted = {
        (*filter(None, path.split("/")), weight or "")
        for path, in_scope in found.items()
        for weight, candidate in in_scope.items()
        if candidate.cannot_adapt
    }
    changed = {place for place, use in uses.items() if use.transformed} - not_adapted
    if changed:  # are parameters next to the weight, such as an adapter, changed as well?
        _, probes, _ = _traced(module, variables, args, kwargs, declared, probed=True)
        changed = {place for place in changed if (p := probes.get(place)) and p.transformed}
    called = [c.module for in_scope in found.values() for c in in_scope.values()]
    foreign.check_names(declared or {}, called)
    result = {}
    for path, in_scope in found.items():
        for weight, candidate in in_scope.items():
            place = (*filter(None, path.split("/")), weight or "")
            if place in uses and place not in not_adapted:
                in_scope[weight] = (
                    candidate._replace(cannot_adapt=_REWRITTEN)
                    if place in changed
                    else with_use(candidate, uses[place], place in custom)
                )
        several = {f"{path}/{w}".lstrip("/"): c for w, c in in_scope.items() if w}
        first = next(iter(several.values()), None) or in_scope[None]
        result |= several if len(several) > 1 else {path: first}
    return result


def _stacked_behind(module: nn.Module, layer: Layout) -> str:
    """Return the reason why a lifted vmap's stacking of a layer's weight prevents an adapter.

    Empty if its weight is not stacked, or along the first axis.
    """
    weight = meta.unbox(module.get_variable("params", layer.weight))
    axes = _compat.mapped_axes(weight) if isinstance(weight, jax.Array) else []
    if not any(axes):
        return ""
    return (
        f"nn.vmap stacks its weight along axis {max(axes)}, and an adapter is stacked along the "
        "first (give it variable_axes={'params': 0})"
    )


_REWRITTEN = (
    "a lifted transform (nn.map_variables) changes the parameters that its layer sees, and would "
    "change its adapter, too"
)
# These wrappers look up the weights of the wrapped module by name.
_WRAPPERS = (nn.WeightNorm, nn.SpectralNorm)
# Collections that hold no state: what a layer sows for inspection, and names of axes.
_NO_STATE = {"params", "intermediates", "params_axes"}
_Place = tuple[str, ...]  # a weight's module path and name


def _traced(
    module: nn.Module,
    variables: Mapping[str, PyTree],
    args: tuple[PyTree, ...],
    kwargs: Mapping[str, Any],
    declared: foreign.Declarations | None,
    probed: bool = False,
) -> tuple[dict[str, dict[str | None, Candidate]], dict[_Place, usage.Use], set[_Place]]:
    """Return the modules that the model calls, the uses of weights, and the custom layers' weights.

    With ``probed`` the uses are those of a probe, an extra parameter next to each weight.
    """
    variables, params = join_quantized(variables), unboxed(variables)
    found: dict[str, dict[str | None, Candidate]] = {}
    places: dict[_Place, int] = {}
    scaled: set[int] = set()
    custom: set[_Place] = set()
    trace, active = object(), []

    def record(
        call: Callable, call_args: tuple, call_kwargs: dict, context: InterceptorContext
    ) -> PyTree:
        module: Any = context.module
        if context.method_name not in METHODS or not _belongs(module, trace):
            return call(*call_args, **call_kwargs)
        layer = layer_of(module, input_of(call_args, call_kwargs)[1], declared)
        if len(jax.tree.leaves((call_args, call_kwargs))) == 1:  # no flag, as for dropout
            layer = layer_of_call(module, context.method_name, call_args, call_kwargs, declared)
        problem = _problem(module, context.method_name, call_args, call_kwargs, declared)
        shape = _whole_shape(module, layer, params) if layer else ()
        cannot_adapt = problem or _reason_against(shape, active, module.path)
        cannot_adapt = cannot_adapt or (_stacked_behind(module, layer) if layer else "")
        dropout = "dropout" in module.scope.rngs
        wrapper = next((type(m).__name__ for m in active if isinstance(m, _WRAPPERS)), "")
        candidate = Candidate(
            *(module, layer, shape or (), cannot_adapt),
            dropout=dropout,
            wrapper=wrapper,
            declaration="" if layer else foreign.example(type(module), _shapes(module)),
        )
        in_scope = found.setdefault("/".join(module.path), {})
        in_scope.setdefault(layer.weight if layer else None, candidate)
        active.append(module)
        try:
            if layer is None:
                return call(*call_args, **call_kwargs)
            place = (*module.path, layer.weight)
            index = places.setdefault(place, len(places))
            if layers.weight_scale(layer, module) != 1:
                scaled.add(index)
            if not type(module).__module__.startswith("flax."):
                custom.add(place)
                call_args = usage.mark_input(index, call_args)
            if probed and module.has_variable("params", _probe_of(layer.weight)):
                probe = meta.unbox(module.get_variable("params", _probe_of(layer.weight)))
                checkpoint_name(probe, usage.probe_name(index))
            with jax.named_scope(usage.scope_name(index)):
                output = call(*call_args, **call_kwargs)
            return usage.mark_output(index, output)
        finally:
            active.pop()

    def is_data(value: PyTree) -> bool:
        return all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(value))

    flat, treedef = jax.tree.flatten((args, {"mutable": nn.DenyList("params"), **kwargs}))
    data = {i: leaf for i, leaf in enumerate(flat) if is_data(leaf)}

    def run(
        variables: Mapping[str, PyTree], rng: jax.Array, data: Mapping[int, PyTree]
    ) -> list[jax.Array]:
        args, kwargs = treedef.unflatten([data.get(i, leaf) for i, leaf in enumerate(flat)])
        # Flax uses the stream named params for every stream that is missing.
        rngs = {"params": rng, "dropout": rng}
        output = module.apply(variables, *args, **{"rngs": rngs, **kwargs})
        return [leaf for leaf in jax.tree.leaves(output) if hasattr(leaf, "dtype")]

    marked = {**variables, "params": _marked(unfreeze(variables["params"]), (), trace, probed)}
    with nn.intercept_methods(record):
        closed = jax.make_jaxpr(run)(marked, jax.random.key(0), data)
    weights: dict[_Place, list[int]] = {}
    for position, (path, _) in enumerate(tree_flatten_with_path(marked)[0]):
        keys = tuple(key.key for key in path if isinstance(key, DictKey))
        for place in places:
            sought = (*place[:-1], _probe_of(place[-1])) if probed else place
            if keys == ("params", *sought):
                weights.setdefault(place, []).append(position)
    # Skip weights in packed integers, which consist of several arrays.
    positions = {inputs[0]: places[p] for p, inputs in weights.items() if len(inputs) == 1}
    uses = usage.find_uses(closed.jaxpr, positions, frozenset(scaled))
    return found, {place: uses[i] for place, i in places.items() if i in uses}, custom


def _reason_against(
    shape: tuple[int, ...] | None, active: Sequence[nn.Module], path: Sequence[str]
) -> str:
    """Return why a layer cannot be adapted at this call; empty if it can."""
    if any("/" in part for part in path):
        return "there is a '/' in its name, which separates names in a path (give it another)"
    if shape is None:
        return "its weight is made of a parameter by nn.map_variables"
    wrapper = next((module for module in active if _normalises_all(module)), None)
    if wrapper is None:
        return ""
    return f"it is inside of {type(wrapper).__name__}, which would normalise its adapter, too"


def _problem(
    module: nn.Module,
    method: str,
    args: tuple,
    kwargs: Mapping[str, Any],
    declared: foreign.Declarations | None,
) -> str:
    """Return why a declared or known layer cannot be adapted; empty if it can, or is neither.

    Raises:
      ValueError: the layer does not compute what the user declared.
    """
    layer = foreign.layout_of(module, declared)
    if layer is None or declared is None:
        return ""
    if isinstance(layer, str):
        return layer
    problem = problem_with_call(module, layer, method, args, kwargs)
    if layer.kind == "embed" and method != "attend" and hasattr(module, "attend"):
        weight = unboxed(module.variables).get(layer.weight)
        size = [weight.shape[axis] for axis in layer.outs] if weight is not None else []
        query = jax.ShapeDtypeStruct((2, *size), jnp.float32)
        problem = problem or problem_with_call(module, layer, "attend", (query,), {})
    return foreign.require_product(problem, module, "/".join(module.path), declared)


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of a module and of the modules in it, by path."""
    params = meta.unbox(_without_adapters(dict(module.variables.get("params", {}))))
    return {pytree.path_name(p): leaf.shape for p, leaf in tree_flatten_with_path(params)[0]}


def problem_with_call(
    module: nn.Module, layer: Layout, method: str, args: tuple, kwargs: Mapping[str, Any]
) -> str:
    """Return why a call of a bound layer is not the product of its layout; empty if it is.

    Args:
      module: the layer.
      layer: the layout that is declared or known for its class.
      method: the called method.
      args: the arguments of the call; shapes are enough.
      kwargs: the others.
    """
    free, variables = module.unbind()
    variables = {**variables, "params": _without_adapters(variables.get("params", {}))}
    weight = meta.unbox(variables["params"].get(layer.weight))
    if weight is None:
        return f"it has no parameter {layer.weight!r}"
    if pytree.is_packed(weight):
        return f"its {layer.weight!r} is quantised"
    leaves = tree_flatten_with_path(variables)[0]
    keys = [tuple(key.key for key in path if isinstance(key, DictKey)) for path, _ in leaves]
    streams = {"params", "dropout", *(module.scope.rngs if module.scope else ())}
    flat, treedef = jax.tree.flatten((args, dict(kwargs)))
    x = input_of(args, kwargs)[0]
    # The input comes first among the arrays.
    order = sorted(range(len(flat)), key=lambda i: flat[i] is not x)
    given = {n: flat[i] for n, i in enumerate(order) if hasattr(flat[i], "shape")}

    def run(variables: PyTree, given: Mapping[int, PyTree]) -> PyTree:
        values = [given.get(order.index(i), leaf) for i, leaf in enumerate(flat)]
        args, kwargs = treedef.unflatten(values)
        rngs = dict.fromkeys(sorted(streams), jax.random.key(0))
        return free.apply(variables, *args, rngs=rngs, method=method, **kwargs)

    place = keys.index(("params", layer.weight))
    return foreign.problem_with(layer, method, run, variables, place, given)


def _without_adapters(params: PyTree) -> PyTree:
    """Return parameters without adapters and the markers of a trace."""
    if not isinstance(params, Mapping):
        return params
    rest = {n: p for n, p in params.items() if not str(n).startswith(pytree.ADAPTER_KEY)}
    return {name: _without_adapters(node) for name, node in rest.items()}


def _probe_of(weight: str) -> str:
    # Encoded, since nn.WeightNorm would take a name that contains the weight's for the weight.
    return f"{pytree.ADAPTER_KEY}_probe_{weight.encode().hex()}"


def _belongs(module: nn.Module, trace: object) -> bool:
    """Return whether the module's parameters are those of the traced model."""
    scope = module.scope
    if scope is None or not scope.has_variable("params", pytree.ADAPTER_KEY):
        return scope is None or not module.variables.get("params")
    marker = scope.get_variable("params", pytree.ADAPTER_KEY)
    return isinstance(marker, _ScopeMarker) and marker.trace is trace


def _normalises_all(module: nn.Module) -> bool:
    """Return whether a module is a wrapper that normalises every parameter inside it."""
    if isinstance(module, nn.WeightNorm):
        return not module.variable_filter
    return isinstance(module, nn.SpectralNorm)


def _marked(params: PyTree, path: tuple[str, ...], trace: object, probed: bool) -> PyTree:
    if not isinstance(params, Mapping):
        return params
    if pytree.ADAPTER_KEY in params:
        raise ValueError(
            "`variables`: the model has a module called "
            f"{'/'.join((*path, pytree.ADAPTER_KEY))!r}, the name under which an adapter is stored "
            "next to its weight; rename the module."
        )
    inside = {name: _marked(node, (*path, name), trace, probed) for name, node in params.items()}
    arrays = {name: node for name, node in params.items() if not isinstance(node, Mapping)}
    probes = {_probe_of(name): node for name, node in arrays.items()} if probed else {}
    return {**inside, **probes, pytree.ADAPTER_KEY: _ScopeMarker(path, trace)}


def layer_of(
    module: nn.Module, equation: str | None, declared: foreign.Declarations | None = None
) -> Layout | None:
    """Return the layout of a bound module's weight; None if it cannot be adapted."""
    found = foreign.layout_of(module, declared)
    if found is not None:
        return found if isinstance(found, Layout) else None
    params = meta.unbox(dict(module.variables.get("params", {})))
    params = {
        name: leaf
        for name, leaf in params.items()
        if not isinstance(leaf, Mapping) and not name.startswith(pytree.ADAPTER_KEY)
    }
    weights = {name: leaf.ndim for name, leaf in params.items()}
    if len(params) > 1 and (names := _params_named_by_fields(module, params)):
        weights = {name: weights[name] for name in names}
    return layers.layer_of(module, weights, equation)


def layer_of_call(
    module: nn.Module,
    method: str,
    args: tuple,
    kwargs: Mapping[str, Any],
    declared: foreign.Declarations | None,
) -> Layout | None:
    """Return the layout of a bound module's weight, if need be the one that a call shows.

    None if the module cannot be adapted.

    Args:
      module: any module.
      method: the name of the called method.
      args: the arguments of the call; shapes are enough.
      kwargs: the others.
      declared: the layouts that the user declared. None: only Flax's layers have a layout.
    """
    x, equation = input_of(args, kwargs)
    layer = layer_of(module, equation, declared)
    is_known = layer or declared is None or foreign.layout_of(module, declared)
    # A state could store the product without the increment.
    has_state = any(module.variables[kind] for kind in module.variables if kind not in _NO_STATE)
    if (
        is_known
        or has_state
        or _has_other_methods(type(module))
        or method != "__call__"
        or x is None
    ):
        return layer
    return foreign.inferred(
        _shapes(module), lambda layout: problem_with_call(module, layout, method, args, kwargs)
    )


def _has_other_methods(cls: type) -> bool:
    """Return whether a class has methods other than ``setup`` and ``__call__``.

    They may use its weight, but have no adapter.
    """
    return any(
        inspect.isfunction(value) and name not in ("setup", "__call__") and name[:2] != "__"
        for ancestor in cls.__mro__
        if ancestor.__module__.partition(".")[0] not in ("flax", "builtins")
        for name, value in vars(ancestor).items()
    )


def _params_named_by_fields(module: nn.Module, params: Mapping[str, PyTree]) -> list[str]:
    """Return the parameters of a shared scope that belong to the module.

    They are those whose names are values of the module's fields, or else those of its ``shape``.
    """
    names = {field.name for field in dataclasses.fields(module)} - {"parent", "name"}
    values = [getattr(module, name, None) for name in names]
    named = [name for name in params if any(isinstance(v, str) and v == name for v in values)]
    shape: Any = getattr(module, "shape", None)
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else None
    return named or [name for name in params if tuple(params[name].shape) == shape]


def input_of(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, str | None]:
    """Return the array that a layer was called with, and the einsum equation, if any."""
    values = [*args, *kwargs.values()]
    equations = [value for value in values if isinstance(value, str) and "->" in value]
    arrays = [value for value in values if hasattr(value, "shape")]
    return (arrays or [None])[0], (equations or [None])[0]


def _whole_shape(module: nn.Module, layer: Layout, params: PyTree) -> tuple[int, ...] | None:
    """Return the shape of a layer's weight, including axes stacked in front by lifted transforms.

    None if the weight is not stored in the form that the layer sees.

    Raises:
      ValueError: the weight is stacked along other than leading axes.
    """
    weight = pytree.get_path(params, (*module.path, layer.weight))
    if not module.has_variable("params", layer.weight):
        return None
    shape = own_shape(module, layer)
    if weight is None or (len(weight.shape) == len(shape) and tuple(weight.shape) != shape):
        return None
    stacked = tuple(weight.shape)
    if stacked[len(stacked) - len(shape) :] != shape:
        raise ValueError(
            f"`model`: {'/'.join(module.path)!r} has a weight of shape {stacked} for layers of "
            f"shape {shape}, but adapters need layers stacked along leading axes; give nn.scan or "
            "nn.vmap variable_axes={'params': 0}."
        )
    return stacked


def own_shape(module: nn.Module, layer: Layout) -> tuple[int, ...]:
    """Return the shape of a layer's weight as the layer itself sees it."""
    return tuple(meta.unbox(module.get_variable("params", layer.weight)).shape)


def join_quantized(variables: Mapping[str, PyTree]) -> Mapping[str, PyTree]:
    """Return the variables of a quantised model with its packed weights moved into ``params``.

    >>> join_quantized({"params": {"up": {"bias": 0}}, "quantized": {"up": {"kernel": 1}}})
    {'params': {'up': {'bias': 0, 'kernel': 1}}}
    """
    if pytree.PACKED not in variables:
        return variables
    rest = {name: leaf for name, leaf in variables.items() if name != pytree.PACKED}
    return {**rest, "params": _overlaid(variables["params"], variables[pytree.PACKED])}


def split_quantized(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Move packed weights out of ``params``, the inverse of :func:`join_quantized`."""
    params, packed = _split_one(unfreeze(variables["params"]))
    return {**variables, "params": params, **({pytree.PACKED: packed} if packed else {})}


def unboxed(variables: Mapping[str, PyTree]) -> PyTree:
    """Return the parameters without metadata, with their shardings: Flax's unbox may reshard."""
    return meta.map_axis_meta(_box_value, unfreeze(join_quantized(variables)["params"]))


def _box_value(box: meta.AxisMetadata) -> PyTree:
    return box.value if isinstance(box, nn.Partitioned) else box.unbox()


def check_variables(variables: object, call: str = "") -> None:
    """Raise an error unless ``variables`` has the form that ``module.init`` returns.

    Args:
      variables: the argument ``variables`` of a public function.
      call: the arguments of this function, for the message, if they are easily confused.

    Raises:
      TypeError: it is not a mapping.
      ValueError: it has no ``params``.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"`variables={type(variables).__name__}`: is not a mapping; pass the model's variables "
            f"as module.init returns them{call and f'. The arguments are {call}'}."
        )
    if "params" not in variables:
        shown = ", ".join(map(repr, list(variables)[:5])) or "nothing"
        raise ValueError(
            f"`variables`: there is no 'params', but {shown}; pass all variables that module.init "
            "returned, or {'params': params}."
        )


def in_base_dtype(node: PyTree, base: PyTree, path: str) -> PyTree:
    """Return parameters of ``modules_to_save`` in the dtypes of the base's parameters.

    Raises:
      ValueError: the shapes differ from those of the base.
    """
    leaves, treedef = jax.tree.flatten(node)
    like = jax.tree.leaves(meta.map_axis_meta(_box_value, base), is_leaf=pytree.is_packed)

    def shapes(values: Sequence[PyTree]) -> list[tuple[int, ...]]:
        return [tuple(value.shape) for value in values]

    if shapes(leaves) != shapes(like):
        raise ValueError(
            f"`adapters[{path!r}]`: the shapes {shapes(leaves)} are not those of the model, "
            f"{shapes(like)}; pass the adapters of this model."
        )
    return treedef.unflatten([leaf.astype(old.dtype) for leaf, old in zip(leaves, like)])


def _split_one(params: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Return nested parameters without the packed weights, and the packed weights."""
    rest: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    for name, node in params.items():
        if isinstance(node, Mapping):
            rest[name], inside = _split_one(node)
            packed |= {name: inside} if inside else {}
        else:
            (packed if pytree.is_packed(node) else rest)[name] = node
    return rest, packed


def _overlaid(below: PyTree, above: PyTree) -> PyTree:
    """Return nested dicts with the leaves of both; those of ``above`` take precedence."""
    if not isinstance(above, Mapping):
        return above
    return {**below, **{name: _overlaid(below.get(name, {}), above[name]) for name in above}}
