"""Layers of an NNX model that could be adapted, and the use of their weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from adalora_jax._src import _compat
from adalora_jax._src.core import pytree
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.modules import einsum, foreign, usage
from adalora_jax._src.modules import layers as kinds
from adalora_jax._src.modules.candidates import UNKNOWN_USE, Candidate, with_use
from adalora_jax._src.modules.nnx_layers import (
    DECLARE,
    FLAX_LAYERS,
    Adaptation,
    base_class,
    extended_class,
    layer_class,
    layer_of,
    problem_with_call,
)
from adalora_jax._src.modules.nnx_variables import check_module, modules, parameters


def candidates(
    model: nnx.Module,
    *,
    of_adapted: bool = False,
    layers: foreign.Declarations | None = None,
) -> dict[str, Candidate]:
    """Return all modules of the model by path, as input of the selection.

    Args:
      model: any NNX module.
      of_adapted: whether the model may have adapters. If so, the uses of its weights are not
        traced.
      layers: layouts of declared layers. None: layers that are not Flax's have no layout.

    Raises:
      TypeError: ``model`` is not an NNX module.
      ValueError: the model has adapters and ``of_adapted`` is False, or a declared layer does not
        have the parameter that its layout names.
    """
    check_module(model)
    foreign.check_names(layers or {}, (module for _, module in modules(model)))
    found: dict[str, Candidate] = {}
    reasons, reading, holders = _rewritten(model), _readers(model), _holders(model)
    for path, module in modules(model):
        if isinstance(module, Adaptation) and not of_adapted:
            raise ValueError(
                f"`model`: the model is adapted already, at {path!r}; adapt the base model, or set "
                "its adapters with set_adapters."
            )
        if pytree.ADAPTER_KEY in path.split("/"):
            continue
        known = foreign.layout_of(module, layers)
        layer = layer_of(module, declared=layers)
        inferred = None if layer or known or layers is None else _inferred(module, holders)
        known, layer = known or inferred, layer or inferred
        if layer and not hasattr(module, layer.weight):
            raise ValueError(
                f"`layers={{{type(module).__name__}: ...}}`: {path!r} has no parameter called "
                f"{layer.weight!r}; name the parameter with the weight in Layout(weight=...)."
            )
        shape = tuple(getattr(module, layer.weight).shape) if layer else ()
        if layer is None or len(shape) >= layer.ndim or known:
            reason = known if isinstance(known, str) else reasons.get(path, "")
            reason = reason if layer or known else ""
            if layer and known and layers is not None and not inferred:
                reason = reason or _problem(module, layer, path, layers)
            elif layer and not known and not reason:
                reason = _unreached(base_class(type(module)))
            candidate = Candidate(module, layer, shape, reason)
            if layer is None:
                example = foreign.example(type(module), _shapes(module))
                candidate = candidate._replace(declaration=example)
            traced = layer and not reason and not known and not of_adapted
            use = _use_of(module, layer) if layer and traced else None
            if layer and use:
                is_custom_layer = not issubclass(type(module), FLAX_LAYERS)
                candidate = with_use(candidate, use, is_custom_layer)
            if layer and not candidate.note and (id(module), layer.weight) in reading:
                reader = reading[id(module), layer.weight]
                candidate = candidate._replace(
                    note=f"{UNKNOWN_USE}the code of {reader} reads `.{layer.weight}` of a layer"
                )
            found[path] = candidate
    return found


def _problem(module: nnx.Module, layer: Layout, path: str, layers: foreign.Declarations) -> str:
    """Return why a declared or known layer cannot be adapted; empty if it can.

    Raises:
      ValueError: the layer does not compute what the user declared.
    """
    return foreign.require_product(_difference(module, layer), module, path, layers)


def _difference(module: nnx.Module, layer: Layout) -> str:
    """Return why a layer does not compute the product of a layout; empty if it does."""
    shape = tuple(getattr(module, layer.weight).shape)
    lifted = len(shape) - layer.ndim
    if lifted < 0:
        return f"its {layer.weight!r} of shape {shape} has fewer axes than the layout"
    for method in ("__call__", "attend") if layer.kind == "embed" else ("__call__",):
        if not hasattr(module, method):
            continue
        looks_up = layer.kind == "embed" and method == "__call__"
        dtype = jnp.int32 if looks_up else jnp.float32
        sizes = einsum.input_shapes(layer, shape[lifted:], attend=method == "attend")
        inputs = [jax.ShapeDtypeStruct(size, dtype) for size in sizes]
        # Arguments without a default, such as shardings, are None.
        kwargs = dict.fromkeys(_required(getattr(module, method)))
        found = [problem_with_call(module, layer, method, (x,), kwargs, lifted) for x in inputs]
        # A layer may take inputs with some numbers of axes only.
        traced = [problem for problem in found if not problem.startswith(foreign.RAISES)]
        if problem := next(filter(None, traced or found), ""):
            return problem
    return ""


def _shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of a module and of the modules in it, by path."""
    return {path: tuple(weight.shape) for path, weight in parameters(module).items()}


def _holders(model: nnx.Module) -> dict[int, set[tuple[type, str]]]:
    """Return ``{id of a variable: (class of a module, attribute)}`` of all modules that hold it."""
    found: dict[int, set[tuple[type, str]]] = {}
    for _, module in modules(model):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Variable):
                found.setdefault(id(value), set()).add((type(module), name))
    return found


def _inferred(module: nnx.Module, holders: Mapping[int, set[tuple[type, str]]]) -> Layout | None:
    """Return the layout of a module's one weight, if its attributes and a trace tell it; else None.

    The attributes must tell the sizes of input and output, since the weight may be stacked, which
    the trace of the module alone does not show. Its methods other than ``__call__`` must not read
    the weight, since they have no adapter. Other modules in it may depend on its mode, and other
    variables may store a product without the increment. Layers of another class that share the
    weight would share the adapter, which has one layout.
    """
    shapes = _shapes(module)
    weight = foreign.weight_of(shapes)
    if not weight or not callable(module) or any(path for path, _ in modules(module)):
        return None
    if len(nnx.to_flat_state(nnx.state(module))) > len(shapes):
        return None
    if len(holders[id(getattr(module, weight))]) > 1:
        return None
    if weight in _attributes_read(type(module), own=True):
        return None

    def problem(layer: Layout) -> str:
        ins, outs = (tuple(shapes[weight][i] for i in axes) for axes in (layer.ins, layer.outs))
        if not foreign.sizes_are_attributes(vars(module), ins, outs):
            return "its attributes have other sizes"
        return _difference(module, layer)

    return foreign.inferred(shapes, problem)


def _required(method: Callable[..., Any]) -> list[str]:
    """Return the names of a method's arguments after the first that have no default.

    >>> _required(lambda x, y, *, out_sharding, axis=0: x)
    ['y', 'out_sharding']
    """
    parameters = list(inspect.signature(method).parameters.values())[1:]
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _unreached(cls: type) -> str:
    """Return why calls of a layer's class do not reach its Flax layer; empty if they do.

    >>> _unreached(nnx.Linear)
    ''
    """
    base = layer_class(cls)
    for ancestor in cls.__mro__ if base else ():
        if ancestor is base:
            break
        for name in ("__call__", "attend"):
            if name in vars(ancestor) and not _compat.uses_super(vars(ancestor)[name]):
                return (
                    f"its {name} does not call super().{name}, so its adapter would add nothing "
                    f"({DECLARE})"
                )
    return ""


def _use_of(module: nnx.Module, layer: Layout) -> usage.Use | None:
    """Return how a layer uses its weight, according to a trace of the layer alone.

    Unmodified Flax layers need no trace, because they multiply with the stored weight.

    Args:
      module: the layer.
      layer: the layout of its weight.

    Returns:
      The use. It is ``untraced`` if the layer cannot be called with one input. None for unmodified
      Flax layers, for quantised weights, and if the shape of an input is not known.
    """
    weight, shape = getattr(module, layer.weight), tuple(getattr(module, layer.weight).shape)
    size = kinds.input_shape(layer, module, shape)
    if size is None or _compat.is_qwix_weight(weight) or _is_plain(module, weight):
        return None
    graph, state = nnx.split(module)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
    places = [i for i, (path, _) in enumerate(leaves) if pytree.leaf_name(path) == layer.weight]
    if len(places) != 1:  # packed integers consist of several arrays
        return None
    lifted = len(shape) - layer.ndim
    structs = [jax.ShapeDtypeStruct(leaf.shape[lifted:], leaf.dtype) for _, leaf in leaves]
    is_custom_layer = layer_class(type(module)) is None

    def run(leaves: list[jax.Array], x: jax.Array) -> list[jax.Array]:
        copy = nnx.merge(graph, treedef.unflatten(leaves))
        _compat.set_class(copy, extended_class(type(copy), _Marked, "Marked"))
        output = copy(usage.mark_input(0, x) if is_custom_layer else x)
        return [leaf for leaf in jax.tree.leaves(output) if hasattr(leaf, "dtype")]

    x = jax.ShapeDtypeStruct(size, jnp.int32 if layer.kind == "embed" else jnp.float32)
    try:
        closed = jax.make_jaxpr(run)(structs, x)
    except Exception:  # a custom class may raise any error for one input
        return usage.Use(False, False, False, untraced=True)
    scaled = frozenset({0} if kinds.weight_scale(layer, module) != 1 else ())
    return usage.find_uses(closed.jaxpr, {places[0]: 0}, scaled)[0]


class _Marked(nnx.Module):
    """Mixin that runs a layer under the scope name by which :mod:`usage` finds it in a jaxpr."""

    def __call__(self, *args: PyTree, **kwargs: Any) -> PyTree:
        with jax.named_scope(usage.scope_name(0)):
            output = super().__call__(*args, **kwargs)
        return usage.mark_output(0, output)


def _is_plain(module: nnx.Module, weight: nnx.Variable) -> bool:
    """Return whether a layer is an unmodified Flax layer, with Flax's functions and variables."""
    cls = type(module)
    reading = ("get_value", "__getitem__", "__jax_array__")
    if any(getattr(type(weight), n, None) is not getattr(nnx.Variable, n, None) for n in reading):
        return False
    if cls not in FLAX_LAYERS:
        return False
    dtypes = ("dtype", "param_dtype", "preferred_element_type")  # dtypes are callable, too
    given = {
        name: (getattr(module, name, parameter.default), parameter.default)
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.default is not parameter.empty
        and name not in dtypes
        and not name.endswith("_init")
    }
    changed = [
        name
        for name, (value, default) in given.items()
        if (callable(value) or callable(default)) and value is not default
    ]
    return not changed and "on_get_value" not in weight.get_metadata()


def _rewritten(model: nnx.Module) -> dict[str, str]:
    """Return ``{path: reason}`` of the modules in wrappers that rewrite their weights."""
    wrappers = (nnx.WeightNorm, nnx.SpectralNorm)
    found = {p: type(m).__name__ for p, m in modules(model) if isinstance(m, wrappers)}

    def inside(path: str, wrapper: str) -> bool:
        return not wrapper or path.startswith(f"{wrapper}/")

    return {
        path: f"it is inside of {name}, which rewrites its weight at every call"
        for path, _ in modules(model)
        for wrapper, name in found.items()
        if inside(path, wrapper)
    }


def _readers(model: nnx.Module) -> dict[tuple[int, str], str]:
    """Return ``{(id of a module, attribute): class}`` where the class may read that attribute.

    Such code may multiply with a layer's weight outside of the layer. The analysis of a class
    finds the names that it reads, not the modules, so each name is recorded for every module that
    can be reached from an instance of the class.
    """
    found: dict[tuple[int, str], str] = {}
    for path, module in modules(model):
        names = _attributes_read(type(module))
        for inner, other in modules(module) if names else ():
            if inner and pytree.ADAPTER_KEY not in path.split("/"):
                found.update({(id(other), name): type(module).__name__ for name in names})
    return found


@functools.cache
def _attributes_read(cls: type, own: bool = False) -> frozenset[str]:
    """Return the names of attributes that a class's methods read from objects other than ``self``.

    Constructors and the methods of Flax's and this package's classes are excluded.

    Args:
      cls: the class.
      own: whether to include attributes of ``self``, and to exclude ``__call__``.
    """
    excluded = ("__init__", "__call__") if own else ("__init__",)
    names: set[str] = set()
    for ancestor in cls.__mro__:
        if ancestor.__module__.partition(".")[0] in ("flax", "adalora_jax", "builtins"):
            continue
        for name, method in vars(ancestor).items():
            if name not in excluded:
                is_method = not own and not isinstance(method, (staticmethod, classmethod))
                names |= _compat.attributes_read(_function(method), is_method=is_method)
    return frozenset(names)


def _function(method: object) -> object:
    """Return the function in a method or a property, without its decorators."""
    method = getattr(method, "fget", None) or getattr(method, "__func__", method)
    return inspect.unwrap(method) if callable(method) else method
