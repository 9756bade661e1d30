"""Quantisation of base models to int8, int4 or NF4 with Qwix, and merging into them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from flax.core import meta
from jax.typing import DTypeLike

from adalora_jax._src import _compat
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.explicit_axes import with_auto_axes
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.pytree import PyTree, get_path, is_packed, weight_path
from adalora_jax._src.core.pytree import adapters as found_adapters
from adalora_jax._src.modules import (
    linen_frontend,
    linen_layers,
    merging,
    nnx_candidates,
    nnx_layers,
    nnx_merging,
    nnx_variables,
    targets,
)
from adalora_jax._src.modules.candidates import Candidate
from adalora_jax._src.modules.layers import check_fit, require_layer, weight_increment
from adalora_jax._src.modules.params import by_path, replaced
from adalora_jax._src.quantization import packed, qwix_models
from adalora_jax._src.quantization.gptq import load_gptq
from adalora_jax._src.quantization.packed import Packed

__all__ = [
    "MergeLoss",
    "Merged",
    "QwixWeight",
    "Recipe",
    "load_gptq",
    "merge",
    "quantize",
]

_Format: TypeAlias = "DTypeLike | Recipe"
_QTYPES = ("int8", "int4", "nf4")
_KINDS = ("dense", "general", "einsum", "conv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Selection of the weights to quantise, and their format.

    The names ``"int8"``, ``"int4"`` and ``"nf4"`` are short for the recipes of that type with
    default fields:

    ======  ============================================  ===========================
    recipe  one scale per                                 bits per weight (bf16 base)
    ======  ============================================  ===========================
    int8    output channel                                8
    int4    block of 64 inputs of an output channel       4.25
    nf4     block of 64 inputs of an output channel       4.25
    ======  ============================================  ===========================

    A weight W is stored as numbers Q and scales s with ``W ≈ s · Q``. With the maximum over the
    weights that share a scale, s is ``max |W| / 127.5`` for int8 and ``max |W| / 7.5`` for int4,
    with integers Q; for nf4 it is ``max |W|``, and Q has the nearest of NormalFloat's 16 levels
    (`QLoRA, Eq. (4) <https://arxiv.org/abs/2305.14314>`_).

    Attributes:
      qtype: ``"int8"``, ``"int4"`` or ``"nf4"``.
      block: maximum number of inputs that share a scale, a positive int; None: all inputs of an
        output channel. Default: None for int8, 64 for int4 and nf4.
      target_modules: layers to quantise, in the forms of ``AdaLoraConfig.target_modules``. Default
        None: all dense, general, einsum and conv layers. Embeddings are excluded, because they are
        looked up, not multiplied.
      exclude_modules: layers that are not quantised, in the same forms.
      dtype: floating-point dtype to which weights are cast before they are quantised, and so the
        dtype of scales and dequantised kernels; and to which the parameters that are not quantised
        are cast. Default None: no cast.

    Raises:
      ValueError: ``qtype``, ``block`` or ``dtype`` is invalid.

    >>> Recipe(qtype="nf4", exclude_modules=["head"]).block
    64
    """

    qtype: str
    block: int | str | None = "default"
    target_modules: Any = None
    exclude_modules: Any = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.qtype not in _QTYPES:
            raise ValueError(
                f"`qtype={self.qtype!r}`: must be one of {', '.join(map(repr, _QTYPES))}; use one "
                "of them."
            )
        if self.block == "default":
            object.__setattr__(self, "block", None if self.qtype == "int8" else 64)
        is_int = isinstance(self.block, int) and self.block > 0
        if self.block is not None and (not is_int or self.block is True):
            raise ValueError(
                f"`block={self.block!r}`: must be a positive integer, or None; pass the number of "
                "inputs that share a scale, such as 64."
            )
        try:
            is_float = self.dtype is None or jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)
        except TypeError:  # not a dtype
            is_float = False
        if not is_float:
            raise ValueError(
                f"`dtype={self.dtype!r}`: must be a floating-point dtype, or None; pass one, "
                "such as 'bfloat16'."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QwixWeight(Packed):
    """Weight quantised by Qwix, with two 4-bit numbers per byte.

    They are packed into bytes here because some back ends unpack arrays of 4-bit dtypes in
    computations.

    Attributes:
      qvalue: int8 for qtype int8, with the weight's shape; otherwise uint8, with ``axis`` halved.
      scale: float, with as many axes as ``qvalue``; each size divides that of the weight.
      qtype: ``"int8"``, ``"int4"`` or ``"nf4"``; static.
      axis: axis of the pairs, negative, counted from the end; None: one number per byte. Static.
    """

    qvalue: jax.Array
    scale: jax.Array
    qtype: str = dataclasses.field(metadata={"static": True})
    axis: int | None = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, array: qwix.QArray, qtype: str, axes: Sequence[int]) -> QwixWeight:
        """Return a result of ``qwix.quantize``, its 4-bit numbers packed along one axis.

        Args:
          array: the result.
          qtype: its type; int8 is not packed.
          axes: candidates for the packed axis, counted from the end. The first of even size is
            used.
        """
        if qtype == "int8":
            return cls(array.qvalue, array.scale, qtype, None)
        values = array.qvalue.astype(jnp.uint8) & 15
        axis = next((axis for axis in axes if array.shape[axis] % 2 == 0), None)
        values = values if axis is None else packed.pack_nibbles(values, axis)
        return cls(values, array.scale, qtype, axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, stack axes included."""
        shape = list(self.qvalue.shape)
        if self.axis is not None:
            shape[self.axis] *= 2
        return tuple(shape)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the scales and of the dequantised weight."""
        return self.scale.dtype

    @property
    def array(self) -> qwix.QArray:
        """Unpacked weight as a ``qwix.QArray``; its gradient is zero."""
        values, scale = jax.lax.stop_gradient((self.qvalue, self.scale))
        if self.axis is not None:
            values = packed.unpack(values, self.axis, 4)
        if self.qtype == "int4":  # sign-extend the 4-bit two's complement
            values = (values ^ 8).astype(jnp.int8) - 8
        return qwix.QArray(values, scale, qtype=self.qtype)

    def dequantize(self, dtype: DTypeLike | None = None) -> jax.Array:
        """Return the weight, computed in the dtype of its scales; its gradient is zero.

        Args:
          dtype: of the result; None for that of the scales.
        """

        def dense(weight: QwixWeight) -> jax.Array:
            return qwix_models.dequantized(weight.array, dtype)

        return with_auto_axes(dense, self.qvalue, self)

    def requantize(self, weight: jax.Array) -> QwixWeight:
        """Return another weight, quantised with the blocks of this one."""
        sizes = list(enumerate(zip(self.shape, self.scale.shape)))
        channelwise = tuple(i for i, (size, scales) in sizes if size == scales)
        tiled = tuple((i, n // m) for i, (n, m) in sizes if m not in (1, n))
        axes = () if self.axis is None else (self.axis,)
        return _quantize(weight.astype(self.dtype), self.qtype, channelwise, tiled, axes)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(
    weight: jax.Array,
    qtype: str,
    channelwise: tuple[int, ...],
    tiled: tuple[tuple[int, int], ...],
    axes: tuple[int, ...],
) -> QwixWeight:
    def quantized(weight: jax.Array) -> QwixWeight:
        array = qwix.quantize(weight, qtype, channelwise_axes=channelwise, tiled_axes=dict(tiled))
        return QwixWeight.of(array, qtype, axes)

    return with_auto_axes(quantized, weight, weight)


def quantize_weight(weight: jax.Array, recipe: str | Recipe, layer: Layout) -> QwixWeight:
    """Return one weight, quantised by Qwix.

    A block covers input axes from the last one on: whole axes while they fit into the block, then
    the largest divisor of the next axis that fits.

    Args:
      weight: float weight with the axes of ``layer``, lifted stack axes in front.
      recipe: a :class:`Recipe` or the name of one.
      layer: the layout of the weight.

    >>> packed = quantize_weight(jnp.ones((256, 8)), "nf4", Layout())
    >>> packed.shape, packed.qvalue.shape, packed.scale.shape
    ((256, 8), (128, 8), (4, 8))
    """
    recipe = _recipe(recipe)
    first = weight.ndim - layer.ndim
    ins = [first + axis for axis in layer.ins]
    channelwise = [axis for axis in range(weight.ndim) if axis not in ins]
    tiled = {}
    rest = recipe.block if isinstance(recipe.block, int) else weight.size
    for axis in reversed(ins):
        size = weight.shape[axis]
        tile = next(n for n in range(min(rest, size), 0, -1) if size % n == 0)
        rest = rest // tile if tile == size else 1
        if tile == 1:
            channelwise.append(axis)
        elif tile < size:
            tiled[axis] = tile
    weight = weight if recipe.dtype is None else weight.astype(recipe.dtype)
    outs = [first + axis for axis in layer.outs]
    axes = tuple(axis - weight.ndim for axis in (*reversed(ins), *reversed(outs)))
    return _quantize(weight, recipe.qtype, tuple(channelwise), tuple(tiled.items()), axes)


_Model = TypeVar("_Model", bound=nnx.Module)


@overload
def quantize(model: _Model, recipe: str | Recipe, *inputs: PyTree, **kwargs: Any) -> _Model: ...


@overload
def quantize(
    model: nn.Module | linen_frontend.AdaptedModule,
    recipe: str | Recipe,
    variables: Mapping[str, PyTree],
    *inputs: PyTree,
    **kwargs: Any,
) -> tuple[Any, dict[str, PyTree]]: ...


def quantize(
    model: nn.Module | nnx.Module | linen_frontend.AdaptedModule,
    recipe: str | Recipe,
    *inputs: PyTree,
    **kwargs: Any,
) -> PyTree:
    """Return a model with a quantised base: an NNX model, or a linen module and its variables.

    :class:`Recipe` has the equations. Weights are quantised one at a time. Under ``jax.eval_shape``
    nothing is allocated.

    Args:
      model: a linen module or an NNX model, with or without adapters; not changed. The adapters
        are the same in the result.
      recipe: ``"int8"``, ``"int4"``, ``"nf4"`` or a :class:`Recipe`.
      *inputs: for linen the variables, then the arguments of a call of the model, which is traced
        to find its layers. None for NNX.
      **kwargs: for linen, keyword arguments of that call.

    Returns:
      ``(module, variables)`` for linen: the module is called and adapted like ``model``; the
      variables have the packed weights in a collection ``quantized`` and the other parameters in
      ``params``, so that ``jax.grad`` with respect to ``params`` and adapters needs no filter. For
      NNX a model of the same class, in which each quantised weight is a ``PackedWeight``, which is
      not an ``nnx.Param``, so ``nnx.grad`` needs no filter.

    Raises:
      TypeError: ``model`` is neither a linen nor an NNX module, or linen's variables are missing.
      ValueError: the recipe is invalid or selects no layer, or a selected layer cannot be quantised
        or is quantised already.

    >>> import flax.linen as nn
    >>> model, x = nn.Dense(4), jnp.ones((2, 64))
    >>> variables = model.init(jax.random.key(0), x)
    >>> quantised, packed = quantize(model, "int8", variables, x)
    >>> sorted(packed["params"]), packed["quantized"]["kernel"].qvalue.dtype
    (['bias'], dtype('int8'))
    >>> bool(jnp.allclose(quantised.apply(packed, x), model.apply(variables, x), atol=0.1))
    True
    >>> model = nnx.Linear(64, 4, rngs=nnx.Rngs(0))
    >>> quantised = quantize(model, "int8")
    >>> quantised.kernel.get_raw_value().qvalue.dtype, quantised.kernel.shape
    (dtype('int8'), (64, 4))
    """
    recipe = _recipe(recipe)
    if isinstance(model, nnx.Module):
        return _quantized_nnx(model, recipe)
    if not isinstance(model, (nn.Module, linen_frontend.AdaptedModule)):
        raise TypeError(
            f"`model={type(model).__name__}`: neither a flax.linen nor a flax.nnx module; pass a "
            "linen module and its variables, or an NNX module."
        )
    if not inputs:
        raise TypeError(
            "`variables`: are missing; call quantize(module, recipe, variables, *inputs)."
        )
    variables, *inputs_ = inputs
    return _quantized_linen(model, recipe, variables, inputs_, kwargs)


def _quantized_linen(
    module: nn.Module | linen_frontend.AdaptedModule,
    recipe: Recipe,
    variables: Mapping[str, PyTree],
    inputs: Sequence[PyTree],
    kwargs: Mapping[str, Any],
) -> tuple[Any, dict[str, PyTree]]:
    if isinstance(module, linen_frontend.AdaptedModule):
        inner, variables = _quantized_linen(module.module, recipe, variables, inputs, kwargs)
        return dataclasses.replace(module, module=inner), variables
    linen_layers.check_variables(variables)
    params = linen_layers.join_quantized(variables)["params"]
    weights: dict[str, Packed] = {}
    found = linen_layers.candidates(module, variables, tuple(inputs), kwargs)
    for path, target in _targets(found, recipe):
        parts = weight_path(params, path, target.layer.weight)
        place, weight = "/".join(parts), meta.unbox(get_path(params, parts))
        weights[place] = quantize_weight(_floats(weight, place), recipe, target.layer)
    module, variables = packed.pack_linen(module, variables, weights)
    return module, {**variables, "params": _cast(variables["params"], recipe.dtype)}


def _quantized_nnx(model: nnx.Module, recipe: Recipe) -> nnx.Module:
    weights: dict[str, Packed] = {}
    for path, target in _targets(nnx_candidates.candidates(model, of_adapted=True), recipe):
        place = f"{path}/{target.layer.weight}".lstrip("/")
        variable = getattr(dict(nnx_variables.modules(model))[path], target.layer.weight)
        value = nnx_variables.sharded_variable(variable).get_raw_value()
        weights[place] = quantize_weight(_floats(value, place), recipe, target.layer)
    model = packed.pack_nnx(model, weights)
    if recipe.dtype is not None:

        def is_base(path: tuple, leaf: object) -> bool:
            return type(leaf) is nnx.Param

        nnx.update(model, _cast(nnx.state(model, is_base), recipe.dtype))
    return model


class MergeLoss(NamedTuple):
    """Relative error of a merged weight W', which W + ΔW is rounded to. Norms are Frobenius norms.

    :func:`merge` returns it and has an example.

    Attributes:
      weight: float, ``‖W' − (W + ΔW)‖ / ‖W + ΔW‖``.
      increment: float, ``‖W' − (W + ΔW)‖ / ‖ΔW‖``; at 1 the error is as large as the increment. If
        ΔW is 0, it is 1 for any error and 0 for none.
    """

    weight: float
    increment: float


class Merged(NamedTuple):
    """Model with merged increments, and the errors of merging.

    :func:`merge` returns it and has an example.

    Attributes:
      result: variables for linen, a model for NNX.
      errors: ``{path: MergeLoss}`` of the quantised layers that had an adapter.
    """

    result: Any
    errors: dict[str, MergeLoss]


@overload
def merge(
    variables: nnx.Module, adapters: None = None, *, to: _Format = "requantize"
) -> Merged: ...


@overload
def merge(
    variables: Mapping[str, PyTree], adapters: Mapping[str, PyTree], *, to: _Format = "requantize"
) -> Merged: ...


def merge(variables: PyTree, adapters: PyTree = None, *, to: _Format = "requantize") -> Merged:
    """Merge adapters into a quantised base, as floats or requantised.

    Each merged weight is ``W + ΔW`` with ``ΔW = s · P Λ Q``
    (`AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_), computed in float32 and rounded to the
    target format. The result contains the rounding errors. Weights are dequantised one at a time.
    Layers that are not quantised are merged as by :func:`adalora_jax.merge`.

    Args:
      variables: variables of a quantised linen module; or an adapted NNX model, whose base may also
        be quantised by ``qwix.quantize_model``. Not changed.
      adapters: for linen variables, as in :func:`adalora_jax.merge`, with the masks applied.
      to: format of the result. A floating-point dtype: all quantised weights are dequantised to it,
        and the result is a float model. ``"requantize"``: each merged weight has its previous
        format. A recipe or the name of one: each merged weight is quantised by it.

    Returns:
      ``(result, errors)``: variables or a model without adapters, and a :class:`MergeLoss` per
      quantised layer that had an adapter.

    Raises:
      ValueError: ``to`` is invalid, is not a dtype for a GPTQ weight or is a recipe for a model
        that Qwix quantised; or as in :func:`adalora_jax.merge`.

    >>> import adalora_jax, flax.linen as nn
    >>> model, x = nn.Dense(4), jnp.ones((2, 64))
    >>> quantised, variables = quantize(model, "int8", model.init(jax.random.key(0), x), x)
    >>> options = {"init_lora_weights": False}
    >>> config = AdaLoraConfig(total_step=10, target_modules=".*", **options)
    >>> adapted = adalora_jax.linen.adapt(quantised, config)
    >>> adapters = adapted.init(jax.random.key(1), variables, x)
    >>> merged, errors = merge(variables, adapters, to="float32")
    >>> list(merged), errors[""].weight < 1e-6
    (['params'], True)
    >>> expected = adapted.apply(variables, adapters, x)
    >>> bool(jnp.allclose(model.apply(merged, x), expected, atol=1e-3))
    True
    >>> base = quantize(nnx.Sequential(nnx.Linear(64, 4, rngs=nnx.Rngs(0))), "nf4")
    >>> config = AdaLoraConfig(total_step=10, target_modules="all-linear", **options)
    >>> merged, errors = merge(adalora_jax.nnx.adapt(base, config))
    >>> type(merged.layers[0].kernel).__name__, 0 < errors["layers/0"].weight < 0.2
    ('PackedWeight', True)
    """
    if isinstance(variables, nnx.Module):
        return _merged_nnx(variables, to)
    linen_layers.check_variables(variables)
    whole = linen_layers.join_quantized(variables)
    weights = {p: w for p, w in by_path(whole["params"]).items() if is_packed(w)}
    merged, errors = {}, {}
    for path, adapter in found_adapters(dict(adapters)).items():
        layer = adapter.layout or Layout()
        place = "/".join(weight_path(whole["params"], path, layer.weight))
        if place in weights:
            weight = weights[place]
            delta = _checked_increment(path, weight, adapter, layer)
            merged[place], errors[path] = _store_merged(weight, delta, layer, to)
    if _dtype(to) is not None:
        rest = {place: weight for place, weight in weights.items() if place not in merged}
        merged |= {place: weight.dequantize(to) for place, weight in rest.items()}
    rest = {path: node for path, node in adapters.items() if path not in errors}
    params = replaced(whole["params"], merged)
    result = {**whole, "params": params}
    return Merged(merging.merge(linen_layers.split_quantized(result), rest), errors)


def _checked_increment(path: str, weight: Packed, adapter: Adapter, layer: Layout) -> jax.Array:
    check_fit(layer, adapter, weight.shape, path)
    if layer.kind == "unknown" or layer.note:
        raise ValueError(
            f"`variables`: the increment of {path!r} cannot be merged: "
            + (layer.note or "it was read without like=adapters of this model")
            + "; serve the adapted model, or merge a float model and quantise the result."
        )
    return weight_increment(layer, adapter, weight.shape)


def _merged_nnx(model: nnx.Module, to: _Format) -> Merged:
    model = nnx.clone(model)
    dtype = _dtype(to)
    dense: dict[int, Any] = {}  # a tied weight has several layers
    errors = _merge_by_qwix(model, to)
    for path, module in nnx_variables.modules(model):
        if not isinstance(module, packed.PackedLayer):
            continue
        adaptation = getattr(module, "adalora", None)
        layer = adaptation.layout if adaptation else nnx_layers.layer_of(module)
        layer = require_layer(layer, module)
        variable = getattr(module, layer.weight)
        weight = variable.get_raw_value()
        if adaptation is not None:
            if is_packed(weight) and id(variable) not in dense:
                delta = _checked_increment(path, weight, adaptation.adapter, layer)
                dense[id(variable)], errors[path] = _store_merged(weight, delta, layer, to)
            del module.adalora
            _compat.set_class(module, nnx_layers.base_class(type(module)))
        new = dense.get(id(variable), weight)
        if is_packed(new) and dtype is not None:
            new = dense[id(variable)] = new.dequantize(dtype)
        if is_packed(new):
            variable.set_value(new)
        else:
            packed.unpack_layer(module, layer.weight, new)
    has_adapters = any(isinstance(m, nnx_layers.Adapted) for _, m in nnx_variables.modules(model))
    result = nnx_merging.merged(model) if has_adapters else nnx_merging.release_saved(model)
    return Merged(result, errors)


def _merge_by_qwix(model: nnx.Module, to: _Format) -> dict[str, MergeLoss]:
    """Merge into the weights that ``qwix.quantize_model`` quantised, in place; return the errors.

    Raises:
      ValueError: ``to`` is a recipe, or an increment cannot be merged.
    """
    dtype, errors = _dtype(to), {}
    weights = qwix_models.weights(model)
    if weights and dtype is None and to != "requantize":
        raise ValueError(
            f"`to={to!r}`: Qwix quantised this model, and its code cannot use this library's "
            "packed weights; pass to='requantize', or a dtype and the result to "
            "quantization.quantize."
        )
    for path, module, name, weight in weights:
        adaptation, layer = getattr(module, "adalora", None), nnx_layers.layer_of(module)
        new: Any = weight if dtype is None else weight.dequantize(dtype)
        if adaptation is not None and layer is not None and layer.weight == name:
            delta = _checked_increment(path, weight, adaptation.adapter, layer)
            new, errors[path] = _store_merged(weight, delta, layer, to)
            del module.adalora
            _compat.set_class(module, nnx_layers.base_class(type(module)))
        setattr(module, name, weight.variable(new))
    if weights and dtype is not None:
        qwix_models.release(model)
    return errors


def _store_merged(
    weight: Packed, delta: jax.Array, layer: Layout, to: _Format
) -> tuple[Packed | jax.Array, MergeLoss]:
    """Return ``W + ΔW`` in the format ``to``, and its error."""
    target = weight.dequantize(jnp.float32) + delta
    if (dtype := _dtype(to)) is not None:
        new = target.astype(dtype)
    elif to == "requantize":
        new = weight.requantize(target)
    else:
        new = quantize_weight(target.astype(weight.dtype), cast("str | Recipe", to), layer)
    back = new.dequantize(jnp.float32) if isinstance(new, Packed) else new.astype(jnp.float32)
    error, whole, learnt = (float(jnp.sqrt(jnp.sum(a**2))) for a in (back - target, target, delta))
    return new, MergeLoss(error / whole, error / learnt if learnt else float(error > 0))


def _dtype(to: _Format) -> jnp.dtype | None:
    """Return ``to`` as a floating-point dtype; None for ``"requantize"`` and for recipes.

    Raises:
      ValueError: ``to`` is none of these.
    """
    if to == "requantize" or isinstance(to, Recipe) or to in _QTYPES:
        return None
    try:
        dtype = jnp.dtype(to)
    except TypeError:
        dtype = jnp.dtype(int)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`to={to!r}`: must be a floating-point dtype, 'requantize', a Recipe or one of "
            f"{', '.join(map(repr, _QTYPES))}; pass one of these."
        )
    return dtype


def _recipe(recipe: str | Recipe) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else Recipe(qtype=recipe)


def _targets(
    candidates: Mapping[str, Candidate], recipe: Recipe
) -> Iterable[tuple[str, targets.Target]]:
    """Return the layers that the recipe selects, as pairs of path and target."""
    candidates = {
        path: c._replace(
            cannot_adapt=f"it is inside of {c.wrapper}, which would not find its weight"
        )
        if c.wrapper and c.layer
        else c
        for path, c in candidates.items()
    }
    if recipe.target_modules is None:
        # Other modules remain candidates, so that exclude_modules may name them.
        def fits(candidate: Candidate) -> bool:
            return candidate.layer is not None and candidate.layer.kind in _KINDS

        candidates = {p: c if fits(c) else c._replace(layer=None) for p, c in candidates.items()}
    config = AdaLoraConfig(
        total_step=1,
        target_modules=".*" if recipe.target_modules is None else recipe.target_modules,
        exclude_modules=recipe.exclude_modules,
    )
    return targets.select(candidates, config).items()


def _floats(weight: PyTree, place: str) -> PyTree:
    if not jnp.issubdtype(weight.dtype, jnp.floating) or is_packed(weight):
        raise ValueError(f"`model`: {place!r} is quantised already; quantise the float model.")
    return weight


def _cast(tree: PyTree, dtype: str | None) -> PyTree:
    """Cast the floating-point leaves to ``dtype``; None returns the tree unchanged."""
    if dtype is None:
        return tree

    def floating(leaf: jax.Array) -> bool:
        return jnp.issubdtype(leaf.dtype, jnp.floating)

    return jax.tree.map(lambda leaf: leaf.astype(dtype) if floating(leaf) else leaf, tree)
