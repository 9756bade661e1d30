"""Weights held as packed integers, and how a Flax layer computes with one.

A :class:`Packed` weight stands where a kernel stood. The layer that owns it is called as ever: it
is handed the dequantised kernel for the length of its call, and once more in the backward pass, so
that no two layers' kernels exist at a time. Gradients reach the layer's input and its other
parameters, never the packed weight.

In linen the packed weights are a collection of their own, ``quantized``, beside ``params``; in NNX
they are variables of a type of their own, :class:`PackedWeight`, which is no ``nnx.Param``. What
``jax.grad`` and ``nnx.grad`` differentiate by default has no integers in it, so nothing has to be
filtered out.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core, nnx
from flax.core import meta, unfreeze

from adalora_jax._src.core import pytree
from adalora_jax._src.core.low_rank import never
from adalora_jax._src.core.pytree import is_packed
from adalora_jax._src.modules import linen_layers, nnx_layers
from adalora_jax._src.modules.params import by_path, replaced


class Packed:
    """What a packed weight can do, whatever its format; each format is a pytree of its own.

    Leading axes of its arrays are those of stacked layers, and slice together.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, not of the arrays that hold it."""
        raise NotImplementedError

    @property
    def dtype(self) -> Any:
        """Of the dequantised weight."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Axes of the weight."""
        return len(self.shape)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight as floats; no gradient passes."""
        raise NotImplementedError

    def requantize(self, weight: jax.Array) -> Packed:
        """Another weight of the same shape in the same format."""
        raise NotImplementedError


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(function: Callable[[Any, Any], Any], packed: Any, operands: Any) -> Any:
    """``function(kernels, operands)``, where only the packed form of the kernels is kept.

    ``Y = X W + b`` is computed with ``W = dequantize(packed)``, and ``dX = dY Wᵀ`` with a W that is
    dequantised anew, since a residual would keep the W of every layer until the backward pass.

    Args:
      function: of the dense kernels and the operands; pure.
      packed: a tree of :class:`Packed` weights.
      operands: a tree of arrays; gradients reach these.

    >>> class Halves(Packed):
    ...     def dequantize(self, dtype=None): return jnp.full((3, 2), 0.5)
    >>> jax.tree_util.register_static(Halves) and None
    >>> jax.grad(lambda x: run(lambda w, x: x @ w, Halves(), x).sum())(jnp.ones(3))
    Array([1., 1., 1.], dtype=float32)
    """
    return function(_dense(packed, operands), operands)


def _forward(function, packed, operands):
    return run(function, packed, operands), (packed, operands)


def _backward(function, residuals, cotangent):
    packed, operands = residuals
    dense = _dense(packed, cotangent)
    _, pull = jax.vjp(lambda operands: function(dense, operands), operands)
    return None, *pull(cotangent)


run.defvjp(_forward, _backward)


def _dense(packed: Any, after: Any) -> Any:
    """The kernels, dequantised once ``after`` is there.

    Without this order XLA computes the kernel of the forward pass and that of the backward pass
    as one, and keeps it in between; or it begins with dequantising all layers, to be quick.
    """
    by = _false(after)
    packed = jax.tree.map(lambda leaf: jnp.where(by, jnp.zeros((), leaf.dtype), leaf), packed)
    return jax.tree.map(lambda weight: weight.dequantize(), packed, is_leaf=is_packed)


def _false(after: Any) -> jax.Array:
    """:func:`~adalora_jax._src.core.low_rank.never` of a layer's operands."""
    arrays = [leaf for leaf in jax.tree.leaves(after) if _is_float(leaf)]
    # The input comes after the parameters.
    return never(arrays[-1]) if arrays else jnp.zeros((), bool)


def _is_float(leaf: Any) -> bool:
    return getattr(leaf, "size", 0) > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def pack_nibbles(values: jax.Array, axis: int) -> jax.Array:
    """Two numbers from 0 to 15 in a byte: of each two neighbours along an axis, the first below.

    >>> pack_nibbles(jnp.array([1, 2, 3, 4], jnp.uint8), -1)
    Array([33, 67], dtype=uint8)
    """
    pairs = jnp.split(_split(values, axis, 2), 2, axis=_after(values, axis))
    low, high = (jnp.squeeze(half.astype(jnp.uint8), _after(values, axis)) for half in pairs)
    return low | (high << 4)


def unpack(words: jax.Array, axis: int, bits: int) -> jax.Array:
    """The numbers of ``bits`` bits in unsigned words, lowest bits first, in place of the words.

    >>> unpack(jnp.array([33, 67], jnp.uint8), -1, 4)
    Array([1, 2, 3, 4], dtype=uint8)
    """
    count = 8 * words.dtype.itemsize // bits
    after = _after(words, axis)
    shape = [1] * (words.ndim + 1)
    shape[after] = count
    shifts = (jnp.arange(count, dtype=words.dtype) * bits).reshape(shape)
    numbers = (jnp.expand_dims(words, after) >> shifts) & jnp.asarray(2**bits - 1, words.dtype)
    return numbers.reshape([n * count if i == after - 1 else n for i, n in enumerate(words.shape)])


def _after(array: jax.Array, axis: int) -> int:
    """The place of a new axis right after ``axis``."""
    return axis % array.ndim + 1


def _split(array: jax.Array, axis: int, size: int) -> jax.Array:
    after = _after(array, axis)
    shape = [*array.shape[: after - 1], array.shape[after - 1] // size, size, *array.shape[after:]]
    return array.reshape(shape)


# linen ----------------------------------------------------------------------------------------


class PackedModule(nn.Module):
    """A linen model, some of whose weights are in the collection ``quantized``; see :func:`pack`.

    Only ``apply`` is different: layers are handed their dequantised weights as they are called.
    """

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """``nn.Module.apply`` of the model whose weights are packed."""
        variables = linen_layers.whole(variables)
        box = lambda leaf: _Box(leaf) if is_packed(leaf) else leaf
        params = jax.tree.map(box, variables["params"], is_leaf=is_packed)
        with nn.intercept_methods(_unpacking):
            result = nn.Module.apply(
                self, {**variables, "params": params}, *args, mutable=mutable, **kwargs
            )
        if mutable is False or "params" not in result[1]:
            return result
        output, mutated = result
        is_box = lambda leaf: isinstance(leaf, _Box)
        unbox = lambda leaf: leaf.packed if is_box(leaf) else leaf
        params = jax.tree.map(unbox, mutated["params"], is_leaf=is_box)
        return output, linen_layers.apart({**mutated, "params": params})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Box(meta.AxisMetadata):
    """A packed weight among the parameters of a model that runs.

    A layer that asks for its weight in ``setup`` gets the shape, for it is called with another.
    """

    packed: Any

    def unbox(self) -> Any:
        return jax.ShapeDtypeStruct(self.packed.shape, self.packed.dtype)

    def replace_boxed(self, val: Any) -> Any:
        return val

    def add_axis(self, index: int, params: Any) -> _Box:
        return self

    def remove_axis(self, index: int, params: Any) -> _Box:
        return self


def _unpacking(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    """Calls a layer with packed weights with dense ones instead."""
    module = context.module
    if context.method_name not in linen_layers.METHODS or module.scope is None:
        return call(*args, **kwargs)
    collections = unfreeze(dict(module.variables))
    params = collections.get("params", {})
    packed = {name: leaf.packed for name, leaf in params.items() if isinstance(leaf, _Box)}
    layer = (
        linen_layers.layer_of(module, linen_layers.input_of(args, kwargs)[1]) if packed else None
    )
    if layer is not None:  # others may have their weights in the same scope
        packed = {name: weight for name, weight in packed.items() if name == layer.weight}
    method = _method(context) if packed else None
    if method is None:
        return call(*args, **kwargs)
    # A layer's adapter adds its term around this call, to what it gives.
    holds = lambda name: layer is not None and name.startswith(pytree.HOLDER)
    params = {n: leaf for n, leaf in params.items() if n not in packed and not holds(n)}
    collections = meta.unbox({**collections, "params": params})
    flat, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(flat) if hasattr(leaf, "shape")}
    scope = module.scope

    def function(dense, operands):
        collections, rngs, arrays = operands
        variables = {**collections, "params": {**collections["params"], **dense}}
        inner = core.Scope(variables, rngs, scope.name, path=scope.path, flags=scope.flags)
        args, kwargs = treedef.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(flat)])
        return method(module.clone(parent=inner), *args, **kwargs)

    return run(function, packed, (collections, scope.rngs, arrays))


def _method(context: Any) -> Callable | None:
    """The method that is being called; None for one that leaves the work to its superclass."""
    function = context.orig_method.func
    defining = [
        vars(cls)[context.method_name]
        for cls in type(context.module).__mro__
        if context.method_name in vars(cls)
    ]
    at = [getattr(method, "__wrapped__", None) for method in defining].index(function)
    uses_super = "__class__" in inspect.unwrap(function).__code__.co_freevars
    return None if uses_super and at + 1 < len(defining) else defining[at]


@functools.cache
def _packed_class(cls: type) -> Any:
    return type(cls.__name__, (PackedModule, cls), {"__module__": __name__})


def pack_linen(
    module: nn.Module, variables: Mapping[str, Any], weights: Mapping[str, Packed]
) -> tuple[Any, dict[str, Any]]:
    """A linen model some of whose weights are packed, and its variables.

    Args:
      module: the model, or one made by this function.
      variables: of the model; not changed.
      weights: ``{path: weight}``, the path being that of a parameter, ``encoder/query/kernel``.

    Returns:
      A module that is called like ``module``, and variables with the rest in ``params`` and the
      packed weights in ``quantized``. ``adapt`` takes both.

    Raises:
      ValueError: a path is that of no parameter, or its shape is another.
    """
    params = linen_layers.whole(variables)["params"]
    have = by_path(meta.unbox(params))
    for path, weight in weights.items():
        _check_place(path, weight, have.get(path))
    params = replaced(params, weights)
    if not isinstance(module, PackedModule):
        module = module.copy()
        object.__setattr__(module, "__class__", _packed_class(type(module)))
    return module, linen_layers.apart({**linen_layers.whole(variables), "params": params})


def _check_place(path: str, weight: Packed, place: Any) -> None:
    """Refuses a weight for a parameter of another shape, or for none."""
    have = None if place is None else tuple(place.shape)
    if have != weight.shape:
        raise ValueError(
            f"weights[{path!r}] has shape {weight.shape}, but the model has "
            f"{'nothing' if have is None else have} there."
        )


# NNX ------------------------------------------------------------------------------------------


class PackedWeight(nnx.Variable):
    """A variable that holds a :class:`Packed` weight, and reads as the dequantised one."""

    def get_value(self, **index: Any) -> Any:
        """The dequantised weight, or a part of it."""
        value = self.get_raw_value()
        if not is_packed(value):
            return super().get_value(**index)
        dense = value.dequantize()
        return dense[index["index"]] if "index" in index else dense

    def set_value(self, value: Any, **index: Any) -> None:
        """Puts another packed weight in place of this one.

        Raises:
          ValueError: ``value`` is not packed.
        """
        if is_packed(self.get_raw_value()) and not is_packed(value):
            raise ValueError(
                f"a weight of shape {self.shape} is quantised and cannot be assigned to or merged "
                "into in place: adalora_jax.quantization.merge dequantises or requantises it, and "
                "says what error that makes."
            )
        self.set_raw_value(value)


class PackedLayer(nnx.Module):
    """Put in front of a Flax layer: calls it with a dense weight in place of the packed one."""

    stands_for_its_layer = True

    def __call__(self, *args, **kwargs):
        return _call_dense(self, "__call__", args, kwargs)


class _PackedEmbed(PackedLayer):
    stands_for_its_layer = True

    def attend(self, *args, **kwargs):
        return _call_dense(self, "attend", args, kwargs)


def _call_dense(layer, method, args, kwargs):
    graph, packed, rest = nnx.split(layer, PackedWeight, ...)
    packed, rest = nnx_layers.pure(packed), nnx_layers.pure(rest)
    flat, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(flat) if hasattr(leaf, "shape")}

    def function(dense, operands):
        rest, arrays = operands
        args, kwargs = treedef.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(flat)])
        inner = nnx.merge(graph, dense, rest)
        return getattr(super(PackedLayer, inner), method)(*args, **kwargs)

    return run(function, packed, (rest, arrays))


def pack_nnx(model: nnx.Module, weights: Mapping[str, Packed]) -> Any:
    """A copy of an NNX model some of whose weights are packed.

    Args:
      model: any NNX module, with adapters or without; left as it is.
      weights: ``{path: weight}``, the path being that of a variable, ``encoder/query/kernel``.

    Returns:
      A module of the same class. ``adapt`` takes it.

    Raises:
      ValueError: a path is that of no variable, or its shape is another.
    """
    model = nnx.clone(model)
    modules = dict(nnx_layers.modules(model))
    places: dict[int, PackedWeight] = {}  # of weights that several layers share
    for path, weight in weights.items():
        parent, _, name = path.rpartition("/")
        variable = getattr(modules.get(parent), name, None)
        _check_place(path, weight, variable)
        places[id(variable)] = PackedWeight(weight)
    for module in modules.values():
        for name, value in list(vars(module).items()):
            if id(value) in places:
                setattr(module, name, places[id(value)])
                module.__class__ = _packed_layer_class(type(module))
    return model


@functools.cache
def _packed_layer_class(cls: type) -> type:
    """``cls`` with a packed weight; where it has an adapter, that adds its term around it."""
    if issubclass(cls, PackedLayer):
        return cls
    mixin = _PackedEmbed if issubclass(cls, nnx.Embed) else PackedLayer
    base = nnx_layers.base_class(cls)
    packed = nnx_layers.extended_class(base, mixin, "Packed")
    return packed if base is cls else nnx_layers.adapted_class(packed)


def unpack_layer(layer: nnx.Module, name: str, weight: jax.Array) -> None:
    """Gives a packed layer without an adapter a float weight and its own class back, in place."""
    setattr(layer, name, nnx.Param(weight))
    layer.__class__ = next(c for c in type(layer).__mro__ if not issubclass(c, PackedLayer))
