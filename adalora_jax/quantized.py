"""Adapters on a base in int8, int4 or NF4: Qwix quantises the weights, the adapters go on top."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from flax.core import meta

from adalora_jax import linen, packed, targets
from adalora_jax import nnx as front
from adalora_jax.config import AdaLoraConfig
from adalora_jax.layers import Layer
from adalora_jax.packed import Packed

_KINDS = ("dense", "general", "einsum", "conv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Which weights are quantised, and how.

    ``"int8"``, ``"int4"`` and ``"nf4"`` stand for the recipes of that type with the defaults:

    | recipe | one scale for | bits a weight (bf16 base) |
    | --- | --- | --- |
    | int8 | each output channel | 8 |
    | int4 | each block of 64 inputs of an output channel | 4.25 |
    | nf4 | each block of 64 inputs of an output channel | 4.25 |

    Quantised are all dense, general, einsum and conv layers, but no embeddings: those are looked
    up, not multiplied. What is not quantised stays in the dtype that it has.

    >>> Recipe(qtype="nf4", exclude_modules=["head"]).block
    64
    """

    qtype: str  # "int8", "int4" or "nf4"
    block: int | None = 0  # inputs that share a scale; None: all of an output channel
    target_modules: Any = None  # as in AdaLoraConfig; None: all layers but embeddings
    exclude_modules: Any = None  # as in AdaLoraConfig: layers that stay as they are
    dtype: str | None = None  # cast to it: scales, and so the dequantised kernels, and what stays

    def __post_init__(self):
        if self.qtype not in ("int8", "int4", "nf4"):
            raise ValueError(f"qtype={self.qtype!r} must be 'int8', 'int4' or 'nf4'.")
        if self.block == 0:
            object.__setattr__(self, "block", None if self.qtype == "int8" else 64)
        if self.block is not None and self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1, or None for whole channels.")
        if self.dtype is not None and not jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating):
            raise ValueError(f"dtype={self.dtype!r} must be a floating-point dtype, or None.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QwixWeight(Packed):
    """A weight as Qwix quantised it, two 4-bit numbers in a byte.

    In bytes of our own: not every back end keeps arrays of 4-bit numbers packed when it computes.
    """

    qvalue: jax.Array  # int8 for int8, else uint8
    scale: jax.Array  # as many axes as qvalue; each divides that of the weight
    qtype: str = dataclasses.field(metadata={"static": True})
    axis: int | None = dataclasses.field(metadata={"static": True})  # from the end: of the pairs

    @classmethod
    def of(cls, array: qwix.QArray, qtype: str, axes: Sequence[int]) -> QwixWeight:
        """What Qwix quantised, packed along the first of ``axes`` (from the end) of even size."""
        if qtype == "int8":
            return cls(array.qvalue, array.scale, qtype, None)
        values = array.qvalue.astype(jnp.uint8) & 15
        axis = next((axis for axis in axes if array.shape[axis] % 2 == 0), None)
        values = values if axis is None else packed.pack_nibbles(values, axis)
        return cls(values, array.scale, qtype, axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = list(self.qvalue.shape)
        if self.axis is not None:
            shape[self.axis] *= 2
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """That of the scales."""
        return self.scale.dtype

    @property
    def array(self) -> qwix.QArray:
        """The same in Qwix's type, unpacked; no gradient passes."""
        values, scale = jax.lax.stop_gradient((self.qvalue, self.scale))
        if self.axis is not None:
            values = packed.unpack(values, self.axis, 4)
        if self.qtype == "int4":  # of two's complement
            values = (values ^ 8).astype(jnp.int8) - 8
        return qwix.QArray(values, scale, qtype=self.qtype)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The weight, computed in the dtype of its scales."""
        dense = qwix.dequantize(self.array)
        return dense if dtype is None else dense.astype(dtype)

    def requantize(self, weight: jax.Array) -> QwixWeight:
        """Another weight with the blocks of this one."""
        sizes = list(enumerate(zip(self.shape, self.scale.shape)))
        channelwise = tuple(i for i, (size, scales) in sizes if size == scales)
        tiled = tuple((i, n // m) for i, (n, m) in sizes if m not in (1, n))
        axes = () if self.axis is None else (self.axis,)
        return _quantize(weight.astype(self.dtype), self.qtype, channelwise, tiled, axes)

    def held_back(self, by: jax.Array) -> QwixWeight:
        """See :class:`~adalora_jax.packed.Packed`."""
        zero = jnp.zeros((), self.qvalue.dtype)
        return dataclasses.replace(self, qvalue=jnp.where(by, zero, self.qvalue))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(weight, qtype, channelwise, tiled, axes):
    array = qwix.quantize(weight, qtype, channelwise_axes=channelwise, tiled_axes=dict(tiled))
    return QwixWeight.of(array, qtype, axes)


def quantize(weight: jax.Array, recipe: str | Recipe, layer: Layer) -> QwixWeight:
    """One weight, quantised by Qwix.

    A block lies along the inputs: as many of the last ones as fit, whole axes where they do, and
    otherwise the largest part of an axis that divides it.

    Args:
      weight: of any shape that ``layer`` has, stacked axes in front.
      recipe: a :class:`Recipe` or the name of one.
      layer: how the weight reads as matrices.

    >>> layer = Layer("dense", "kernel", (), (0,), (1,))
    >>> packed = quantize(jnp.ones((256, 8)), "nf4", layer)
    >>> packed.shape, packed.qvalue.shape, packed.scale.shape
    ((256, 8), (128, 8), (4, 8))
    """
    recipe = _recipe(recipe)
    first = weight.ndim - len(layer.stack) - len(layer.ins) - len(layer.outs)
    ins = [first + axis for axis in layer.ins]
    channelwise = [axis for axis in range(weight.ndim) if axis not in ins]
    tiled = {}
    left = recipe.block
    for axis in reversed(ins) if left is not None else ():
        size = weight.shape[axis]
        tile = next(n for n in range(min(left, size), 0, -1) if size % n == 0)
        left = left // tile if tile == size else 1
        if tile == 1:
            channelwise.append(axis)
        elif tile < size:
            tiled[axis] = tile
    weight = weight if recipe.dtype is None else weight.astype(recipe.dtype)
    outs = [first + axis for axis in layer.outs]
    axes = tuple(axis - weight.ndim for axis in (*reversed(ins), *reversed(outs)))
    return _quantize(weight, recipe.qtype, tuple(channelwise), tuple(tiled.items()), axes)


def quantize_linen(
    module: Any, variables: Mapping[str, Any], recipe: str | Recipe, *inputs: Any, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """A linen model with a quantised base, and its variables.

    One weight is quantised at a time. Under ``jax.eval_shape`` nothing is allocated.

    Args:
      module: a linen module; or an adapted one, whose adapters go on as they are.
      variables: of the model; not changed.
      recipe: ``"int8"``, ``"int4"``, ``"nf4"`` or a :class:`Recipe`.
      *inputs, **kwargs: what the model is called with, to see its layers.

    Returns:
      ``(module, variables)``. The module is called, and adapted, like the one that was given. The
      variables have the integers in a collection of their own, ``quantized``, and the rest in
      ``params``, so that ``jax.grad`` with respect to ``params`` and adapters needs no filter.

    Raises:
      ValueError: the recipe selects no layer, or the model is quantised already.

    >>> import flax.linen as nn
    >>> model, x = nn.Dense(4), jnp.ones((2, 64))
    >>> variables = model.init(jax.random.key(0), x)
    >>> quantised, packed = quantize_linen(model, variables, "int8", x)
    >>> sorted(packed["params"]), packed["quantized"]["kernel"].qvalue.dtype
    (['bias'], dtype('int8'))
    >>> bool(jnp.allclose(quantised.apply(packed, x), model.apply(variables, x), atol=0.1))
    True
    """
    if isinstance(module, linen.AdaptedModule):
        inner, variables = quantize_linen(module.module, variables, recipe, *inputs, **kwargs)
        return dataclasses.replace(module, module=inner), variables
    recipe = _recipe(recipe)
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module is a {type(module).__name__}, not a flax.linen module; quantize_nnx takes NNX "
            "modules."
        )
    params = linen.whole(variables)["params"]
    weights = {}
    for path, target in _targets(linen.candidates(module, variables, inputs, kwargs), recipe):
        place = f"{path}/{target.layer.weight}".lstrip("/")
        weight = params
        for name in place.split("/"):
            weight = weight[name]
        weights[place] = quantize(_floats(meta.unbox(weight), place), recipe, target.layer)
    module, variables = packed.pack_linen(module, variables, weights)
    if recipe.dtype is not None:
        variables["params"] = jax.tree.map(functools.partial(_cast, recipe.dtype), variables["params"])
    return module, variables


def quantize_nnx(model: nnx.Module, recipe: str | Recipe, *inputs: Any, **kwargs: Any) -> Any:
    """A copy of an NNX model with a quantised base.

    Args:
      model: any NNX module, with adapters or without; left as it is.
      recipe: ``"int8"``, ``"int4"``, ``"nf4"`` or a :class:`Recipe`.
      *inputs, **kwargs: what the model is called with. Not needed but for einsum layers that are
        given their equation in the call.

    Returns:
      A module of the same class, in which each quantised weight is a
      :class:`~adalora_jax.packed.PackedWeight`. That is no ``nnx.Param``, so ``nnx.grad`` needs no
      filter.

    Raises:
      ValueError: the recipe selects no layer, or the model is quantised already.

    >>> model, x = nnx.Linear(64, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 64))
    >>> quantised = quantize_nnx(model, "int8", x)
    >>> quantised.kernel.get_raw_value().qvalue.dtype, quantised.kernel.shape
    (dtype('int8'), (64, 4))
    >>> bool(jnp.allclose(quantised(x), model(x), atol=0.1))
    True
    """
    recipe = _recipe(recipe)
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, not a flax.nnx module; quantize_linen takes linen "
            "modules."
        )
    weights = {}
    for path, target in _targets(front.candidates(model, of_adapted=True), recipe):
        place = f"{path}/{target.layer.weight}".lstrip("/")
        variable = getattr(dict(front.modules(model))[path], target.layer.weight)
        weights[place] = quantize(_floats(variable.get_raw_value(), place), recipe, target.layer)
    model = packed.pack_nnx(model, weights)
    return model


def _recipe(recipe: str | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else Recipe(qtype=recipe)


def _targets(candidates: Mapping[str, targets.Candidate], recipe: Recipe) -> Any:
    """The layers that the recipe selects, by path."""
    if recipe.target_modules is None:
        candidates = {p: c for p, c in candidates.items() if c.layer and c.layer.kind in _KINDS}
    config = AdaLoraConfig(
        total_step=1,
        target_modules=".*" if recipe.target_modules is None else recipe.target_modules,
        exclude_modules=recipe.exclude_modules,
    )
    return targets.select(candidates, config).items()


def _floats(weight: Any, place: str) -> Any:
    if not jnp.issubdtype(weight.dtype, jnp.floating) or packed.is_packed(weight):
        raise ValueError(f"{place!r} is quantised already: quantise the float model.")
    return weight


def _cast(dtype: str, leaf: Any) -> Any:
    return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
