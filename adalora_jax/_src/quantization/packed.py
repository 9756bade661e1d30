"""Weights stored as packed integers, and Flax layers that compute with them.

A :class:`Packed` weight replaces a kernel; calls of its layer do not change. The kernel is
dequantised for the duration of the layer's call, and again in the backward pass, so that the
dequantised kernels of two layers never exist at the same time. Gradients reach the layer's input
and its other parameters, never the packed weight.

In linen the packed weights are in a separate collection, ``quantized``, next to ``params``. In NNX
they are variables of a separate type, :class:`PackedWeight`, which is not an ``nnx.Param``.
Therefore the default arguments of ``jax.grad`` and ``nnx.grad`` contain no integers, and no filter
is needed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta, unfreeze
from flax.core.scope import CollectionFilter
from flax.linen.module import InterceptorContext
from jax.typing import DTypeLike

from adalora_jax._src import _compat
from adalora_jax._src.core import pytree
from adalora_jax._src.core.low_rank import opaque_false
from adalora_jax._src.core.pytree import PyTree, is_packed
from adalora_jax._src.modules import linen_layers, nnx_layers, nnx_variables
from adalora_jax._src.modules.params import by_path, replaced


class Packed:
    """Interface of packed weights; each format is a subclass and a pytree.

    In a stack of layers all arrays have the same leading axes, so slicing them slices the stack.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantised weight, not of the packed arrays."""
        raise NotImplementedError

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the dequantised weight."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """Return the weight as floats; its gradient is zero."""
        raise NotImplementedError

    def requantize(self, weight: jax.Array) -> Packed:
        """Return another weight of the same shape in the same format."""
        raise NotImplementedError


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(function: Callable[[PyTree, PyTree], PyTree], packed: PyTree, operands: PyTree) -> PyTree:
    """Compute ``function(kernels, operands)`` and store only the packed kernels for the gradient.

    ``Y = X W + b`` is computed with ``W = dequantize(packed)``. The backward pass dequantises W
    again for ``dX = dY Wᵀ``, since a residual would keep the W of every layer in memory until then.

    Args:
      function: a pure function of the dense kernels and the operands.
      packed: a pytree of :class:`Packed` weights, which get no gradient.
      operands: a pytree of arrays, which get gradients.

    >>> class Halves(Packed):
    ...     def dequantize(self, dtype=None): return jnp.full((3, 2), 0.5)
    >>> jax.tree_util.register_static(Halves) and None
    >>> jax.grad(lambda x: run(lambda w, x: x @ w, Halves(), x).sum())(jnp.ones(3))
    Array([1., 1., 1.], dtype=float32)
    """
    return function(_dense(packed, operands), operands)


def _forward(
    function: Callable[[PyTree, PyTree], PyTree], packed: PyTree, operands: PyTree
) -> tuple[PyTree, tuple[PyTree, PyTree]]:
    return run(function, packed, operands), (packed, operands)


def _backward(
    function: Callable[[PyTree, PyTree], PyTree],
    residuals: tuple[PyTree, PyTree],
    cotangent: PyTree,
) -> tuple[None, PyTree]:
    packed, operands = residuals
    dense = _dense(packed, cotangent)
    _, pull = jax.vjp(lambda operands: function(dense, operands), operands)
    return None, *pull(cotangent)


run.defvjp(_forward, _backward)


def _dense(packed: PyTree, after: PyTree) -> PyTree:
    """Return the dequantised kernels, computed only after ``after`` is available.

    Without this order XLA may merge the dequantisation of the backward pass with that of the
    forward pass and keep the kernel in memory in between, or dequantise all layers at the start.
    """
    by = _false(after)
    packed = jax.tree.map(lambda leaf: jnp.where(by, jnp.zeros((), leaf.dtype), leaf), packed)
    return jax.tree.map(lambda weight: weight.dequantize(), packed, is_leaf=is_packed)


def _false(after: PyTree) -> jax.Array:
    """Return :func:`~adalora_jax._src.core.low_rank.opaque_false` of a layer's operands."""
    arrays = [leaf for leaf in jax.tree.leaves(after) if _is_float(leaf)]
    # The last array is the input, because operands start with the parameters.
    return opaque_false(arrays[-1]) if arrays else jnp.zeros((), bool)


def _is_float(leaf: PyTree) -> bool:
    return getattr(leaf, "size", 0) > 0 and jnp.issubdtype(leaf.dtype, jnp.floating)


def pack_nibbles(values: jax.Array, axis: int) -> jax.Array:
    """Pack pairs of neighbours along an axis, from 0 to 15, into bytes, the first in the low bits.

    >>> pack_nibbles(jnp.array([1, 2, 3, 4], jnp.uint8), -1)
    Array([33, 67], dtype=uint8)
    """
    pairs = jnp.split(_split(values, axis, 2), 2, axis=_after(values, axis))
    low, high = (jnp.squeeze(half.astype(jnp.uint8), _after(values, axis)) for half in pairs)
    return low | (high << 4)


def unpack(words: jax.Array, axis: int, bits: int) -> jax.Array:
    """Unpack each unsigned word along an axis into numbers of ``bits`` bits, lowest bits first.

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
    """Return the index of a new axis directly after ``axis``."""
    return axis % array.ndim + 1


def _split(array: jax.Array, axis: int, size: int) -> jax.Array:
    after = _after(array, axis)
    shape = [*array.shape[: after - 1], array.shape[after - 1] // size, size, *array.shape[after:]]
    return array.reshape(shape)


# linen ----------------------------------------------------------------------------------------


class PackedModule(nn.Module):
    """Mixin for linen models with packed weights in ``quantized``, see :func:`pack_linen`.

    Only ``apply`` differs: it dequantises the weights of each layer when the layer is called.
    """

    @nn.nowrap
    def apply(
        self,
        variables: Mapping[str, PyTree],
        *args: PyTree,
        mutable: CollectionFilter = False,
        **kwargs: Any,
    ) -> PyTree:
        """Apply the model like ``nn.Module.apply``.

        Args:
          variables: with packed weights in the collection ``quantized``.
          *args: as in ``nn.Module.apply``.
          mutable: as in ``nn.Module.apply``.
          **kwargs: as in ``nn.Module.apply``.
        """
        variables = linen_layers.join_quantized(variables)

        def box(leaf: PyTree) -> PyTree:
            return _Box(leaf) if is_packed(leaf) else leaf

        params = jax.tree.map(box, variables["params"], is_leaf=is_packed)
        with nn.intercept_methods(_unpacking):
            result = nn.Module.apply(
                self, {**variables, "params": params}, *args, mutable=mutable, **kwargs
            )
        if mutable is False or "params" not in result[1]:
            return result
        output, mutated = result

        def is_box(leaf: object) -> bool:
            return isinstance(leaf, _Box)

        def unbox(leaf: PyTree) -> PyTree:
            return leaf.packed if is_box(leaf) else leaf

        params = jax.tree.map(unbox, mutated["params"], is_leaf=is_box)
        return output, linen_layers.split_quantized({**mutated, "params": params})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Box(meta.AxisMetadata):
    """Box around a packed weight in the parameters of a running model.

    It unboxes to a shape, for layers that read their weight in ``setup``. Their calls use the
    dequantised weight.
    """

    packed: Any

    def unbox(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.packed.shape, self.packed.dtype)

    def replace_boxed(self, val: PyTree) -> PyTree:
        return val

    def add_axis(self, index: int, params: Mapping[str, Any]) -> _Box:
        return self

    def remove_axis(self, index: int, params: Mapping[str, Any]) -> _Box:
        return self


def _unpacking(call: Callable, args: tuple, kwargs: dict, context: InterceptorContext) -> PyTree:
    """Call a layer with its packed weights dequantised; an interceptor of linen methods."""
    module = context.module
    if context.method_name not in linen_layers.METHODS or module.scope is None:
        return call(*args, **kwargs)
    collections = unfreeze(dict(module.variables))
    params = collections.get("params", {})
    packed = {name: leaf.packed for name, leaf in params.items() if isinstance(leaf, _Box)}
    layer = (
        linen_layers.layer_of(module, linen_layers.input_of(args, kwargs)[1]) if packed else None
    )
    if layer is not None:  # weights of other modules may be in this scope
        packed = {name: weight for name, weight in packed.items() if name == layer.weight}
    method = _compat.linen_method(context) if packed else None
    if method is None:
        return call(*args, **kwargs)

    # The adapter is not needed here: its output is added to the result of this call.
    def holds(name: str) -> bool:
        return layer is not None and name.startswith(pytree.ADAPTER_KEY)

    params = {n: leaf for n, leaf in params.items() if n not in packed and not holds(n)}
    collections = meta.unbox({**collections, "params": params})
    flat, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(flat) if hasattr(leaf, "shape")}
    scope = module.scope

    def function(dense: PyTree, operands: PyTree) -> PyTree:
        collections, rngs, arrays = operands
        variables = {**collections, "params": {**collections["params"], **dense}}
        inner = _compat.linen_scope(scope, variables, rngs)
        args, kwargs = treedef.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(flat)])
        return method(module.clone(parent=inner), *args, **kwargs)

    return run(function, packed, (collections, scope.rngs, arrays))


@functools.cache
def _packed_class(cls: type) -> type:
    return type(cls.__name__, (PackedModule, cls), {"__module__": __name__})


def pack_linen(
    module: nn.Module, variables: Mapping[str, PyTree], weights: Mapping[str, Packed]
) -> tuple[nn.Module, dict[str, PyTree]]:
    """Return a linen model and variables in which some weights are packed.

    Args:
      module: the model, possibly a result of this function.
      variables: the model's variables; not changed.
      weights: ``{path: packed weight}``, by paths of parameters such as ``encoder/query/kernel``.

    Returns:
      A module that is called like ``module``, and variables with the packed weights in
      ``quantized`` and the other parameters in ``params``. ``adapt`` accepts both.

    Raises:
      ValueError: a path is not that of a parameter, or the parameter has another shape.
    """
    params = linen_layers.join_quantized(variables)["params"]
    places = by_path(meta.unbox(params))
    for path, weight in weights.items():
        _check_place(path, weight, places.get(path))
    params = replaced(params, weights)
    if not isinstance(module, PackedModule):
        module = module.copy()
        _compat.set_class(module, _packed_class(type(module)))
    return module, linen_layers.split_quantized(
        {**linen_layers.join_quantized(variables), "params": params}
    )


def _check_place(path: str, weight: Packed, place: PyTree) -> None:
    """Check that a weight has the shape of the parameter that it replaces.

    Raises:
      ValueError: the shapes differ, or ``place`` is None.
    """
    shape = None if place is None else tuple(place.shape)
    if shape != weight.shape:
        raise ValueError(
            f"`weights[{path!r}]`: has shape {weight.shape}, but the model has "
            f"{'nothing' if shape is None else shape} there; pass the weights of this model."
        )


# NNX ------------------------------------------------------------------------------------------


class PackedWeight(nnx.Variable):
    """Variable with a :class:`Packed` weight, whose value is the dequantised weight."""

    def get_value(self, **index: Any) -> Any:
        """Return the dequantised weight, or the indexed part of it; placeholders as they are."""
        value = self.get_raw_value()
        # Flax's repr replaces the packed arrays by placeholders, and eval_shape by shapes.
        arrays = all(hasattr(leaf, "astype") for leaf in jax.tree.leaves(value))
        if not is_packed(value) or not arrays:
            return super().get_value(**index)
        dense = value.dequantize()
        return dense[index["index"]] if "index" in index else dense

    def set_value(self, value: PyTree, **index: Any) -> None:
        """Replace the packed weight by another packed weight.

        Raises:
          ValueError: ``value`` is not packed.
        """
        if is_packed(self.get_raw_value()) and not is_packed(value):
            raise ValueError(
                f"`value`: the weight of shape {self.shape} is quantised and cannot be assigned to "
                "or merged into in place; use adalora_jax.quantization.merge, which dequantises or "
                "requantises it and reports the error."
            )
        self.set_raw_value(value)


class PackedLayer(nnx.Module):
    """Mixin before a Flax layer that calls it with the packed weight dequantised."""

    stands_for_its_layer = True

    def __call__(self, *args: PyTree, **kwargs: Any) -> PyTree:
        return _call_dense(self, "__call__", args, kwargs)


class _PackedEmbed(PackedLayer):
    stands_for_its_layer = True

    def attend(self, *args: PyTree, **kwargs: Any) -> PyTree:
        return _call_dense(self, "attend", args, kwargs)


def _call_dense(layer: PackedLayer, method: str, args: tuple, kwargs: dict) -> PyTree:
    graph, packed, rest = nnx.split(layer, PackedWeight, ...)
    packed, rest = nnx_variables.pure(packed), nnx_variables.pure(rest)
    flat, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: leaf for i, leaf in enumerate(flat) if hasattr(leaf, "shape")}

    def function(dense: PyTree, operands: PyTree) -> PyTree:
        rest, arrays = operands
        args, kwargs = treedef.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(flat)])
        inner = nnx.merge(graph, dense, rest)
        return getattr(super(PackedLayer, inner), method)(*args, **kwargs)

    return run(function, packed, (rest, arrays))


def pack_nnx(model: nnx.Module, weights: Mapping[str, Packed]) -> nnx.Module:
    """Return a copy of an NNX model in which some weights are packed.

    Args:
      model: any NNX module, with or without adapters; not changed.
      weights: ``{path: packed weight}``, by paths of variables such as ``encoder/query/kernel``.

    Returns:
      A module of the same class. ``adapt`` accepts it.

    Raises:
      ValueError: a path is not that of a variable, or the variable has another shape.
    """
    model = nnx.clone(model)
    modules = dict(nnx_variables.modules(model))
    places: dict[int, PackedWeight] = {}  # by variable, since layers may share one
    for path, weight in weights.items():
        parent, _, name = path.rpartition("/")
        variable = getattr(modules.get(parent), name, None)
        _check_place(path, weight, variable)
        places[id(variable)] = PackedWeight(weight)
    for module in modules.values():
        for name, value in list(vars(module).items()):
            if id(value) in places:
                setattr(module, name, places[id(value)])
                _compat.set_class(module, _packed_layer_class(type(module)))
    return model


@functools.cache
def _packed_layer_class(cls: type) -> type:
    """Return a subclass of ``cls`` for a packed weight; an adapted class remains adapted."""
    if issubclass(cls, PackedLayer):
        return cls
    mixin = _PackedEmbed if issubclass(cls, nnx.Embed) else PackedLayer
    base = nnx_layers.base_class(cls)
    packed = nnx_layers.extended_class(base, mixin, "Packed")
    return packed if base is cls else nnx_layers.adapted_class(packed)


def unpack_layer(layer: nnx.Module, name: str, weight: jax.Array) -> None:
    """Restore the class of a packed layer without an adapter, with a float weight, in place."""
    setattr(layer, name, nnx.Param(weight))
    _compat.set_class(layer, next(c for c in type(layer).__mro__ if not issubclass(c, PackedLayer)))
