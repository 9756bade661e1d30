"""Layer kinds: how each one's weight is read as matrices, and its adapter output.

A weight of any number of axes is a stack of matrices ``[in, out]``: the layer sums over some axes
(in), some appear in its output (out), and some index separate matrices (stack). Both Flax front
ends use this module, which reads a layer's attributes by their names in linen or NNX.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import ArrayLike, DTypeLike

from adalora_jax._src.core.adapter import (
    Adapter,
    delta_weight,
    dense_output,
    known_scale,
    seed_of,
)
from adalora_jax._src.core.explicit_axes import take, with_auto_axes
from adalora_jax._src.core.layout import Layout, operands, weight_axes
from adalora_jax._src.core.low_rank import (
    accumulation_dtype,
    apply_dropout,
    explicit_sharding,
    linear_with_dropout,
    reshard,
    spec_of_type,
)
from adalora_jax._src.modules import einsum

_KINDS = {
    "Dense": "dense",
    "Linear": "dense",
    "DenseGeneral": "general",
    "LinearGeneral": "general",
    "Einsum": "einsum",
    "Embed": "embed",
    "Conv": "conv",
    "ConvTranspose": "conv",
    "DenseParams": "weight",
}
SUPPORTED = (
    "Dense, DenseGeneral, Linear, LinearGeneral, Einsum (also a custom module with one weight and "
    "an einsum equation), Embed, Conv, ConvTranspose"
)


def layer_of(
    module: object, weights: Mapping[str, int], equation: str | None = None
) -> Layout | None:
    """Return the layout of a module's weight; None if the module cannot be adapted.

    Args:
      module: a linen or NNX module.
      weights: ``{name: number of axes}`` of the module's own parameters, without lifted axes
        where these are known.
      equation: the equation of an einsum, if it is an argument of the call.

    >>> from flax import linen
    >>> layout = layer_of(linen.DenseGeneral((2, 3), axis=(-2, -1)), {"kernel": 4})
    >>> layout.kind, layout.ins, layout.outs
    ('general', (0, 1), (2, 3))
    """
    kind = _kind(module)
    if kind in ("dense", "weight"):
        return Layout("kernel", kind=kind)
    if kind == "embed":
        return Layout("embedding", kind=kind)
    if kind == "general":
        batch, axis, features = einsum.general_axes(module)
        ends = len(batch), len(batch) + len(axis), len(batch) + len(axis) + len(features)
        stack, ins, outs = (tuple(range(*e)) for e in zip((0, *ends), ends))
        return Layout("kernel", ins, outs, stack, kind)
    if kind == "conv":
        if getattr(module, "mask", None) is not None:
            return None
        size = getattr(module, "kernel_size", 1)
        n = 1 if isinstance(size, int) else len(size)
        ends = (n + 1, n) if getattr(module, "transpose_kernel", False) else (n, n + 1)
        return Layout("kernel", (*range(n), ends[0]), (ends[1],), kind=kind)
    equation = equation or einsum.equation_of(module)
    axes = weight_axes(equation) if equation else None
    ndim = max(weights.values(), default=0)
    named = [name for name, n in weights.items() if n == ndim]  # a bias has fewer axes
    if axes is None or len(named) != 1 or ndim < sum(map(len, axes)):
        return None
    stack, ins, outs = axes
    return Layout(named[0], ins, outs, stack, "einsum")


def require_layer(layer: Layout | None, module: object) -> Layout:
    """Return the layout of a module that has an adapter.

    Raises:
      ValueError: the module cannot be adapted; the message names its type and the kinds that can.
    """
    if layer is None:
        raise ValueError(
            f"`adapters`: a {type(module).__name__} has an adapter, but is not a layer of a kind "
            f"that can be adapted ({SUPPORTED}); leave it out."
        )
    return layer


def check_fit(layer: Layout, adapter: Adapter, shape: Sequence[int], path: str) -> None:
    """Raise an error if an adapter was made for another weight.

    Raises:
      ValueError: the shapes or axes of adapter and weight differ, or the adapter's file does not
        record the order of a convolution's inputs; the message names the path.
    """
    stack, in_features, out_features = layer.matrix(shape)
    sizes = (adapter.lam.shape[:-1], adapter.q.shape[-1], adapter.p.shape[-1])
    if len(shape) < layer.ndim or sizes != (stack, in_features, out_features):
        raise ValueError(
            f"`adapters[{path!r}]`: the adapter is for {list(sizes[0])} matrices of {sizes[1]} x "
            f"{sizes[2]}, but the weight {layer.weight!r} of shape {tuple(shape)} reads as "
            f"{list(stack)} of {in_features} x {out_features}; pass the adapters of this model."
        )
    made_for = adapter.layout
    if made_for is None:
        return
    if made_for.kind == "unknown" and layer.kind == "conv":
        raise ValueError(
            f"`adapters[{path!r}]`: the adapter comes from a file that does not specify the order "
            "of a convolution's inputs; read it with like=adapters of this model."
        )
    if made_for.kind != "unknown" and not made_for.same_axes(layer):
        raise ValueError(
            f"`adapters[{path!r}]`: the adapter is for a weight with the axes "
            f"stack={made_for.stack}, in={made_for.ins}, out={made_for.outs}, but {layer.weight!r} "
            f"has stack={layer.stack}, in={layer.ins}, out={layer.outs}; pass the adapters of this "
            "model."
        )


def weight_increment(layer: Layout, adapter: Adapter, shape: Sequence[int]) -> jax.Array:
    """Return the dense increment ΔW for a weight of this shape, in at least float32.

    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 6)), scale=0.5)
    >>> layer = Layout("kernel", (0, 1), (2,), kind="conv")
    >>> weight_increment(layer, adapter, (3, 2, 4)).shape
    (3, 2, 4)
    """
    return layer.to_weight(delta_weight(adapter), shape)


def merged_weight(
    path: str,
    weight: jax.Array,
    adapter: Adapter,
    layer: Layout,
    *,
    sign: int = 1,
    safe: bool,
    name: str = "variables",
) -> jax.Array:
    """Return ``W + ΔW`` (or with ``sign=-1`` ``W − ΔW``), rounded once to the weight's dtype.

    ``name`` is that of the caller's argument with the weight, for messages.

    Raises:
      ValueError: the adapter's scale is not known, the adapter is for another weight, the layer
        does not use its weight as it is stored, or with ``safe`` the result is not finite.
    """
    known_scale(adapter, path)
    check_fit(layer, adapter, weight.shape, path)
    if note := layer.note or (adapter.layout.note if adapter.layout else ""):
        raise ValueError(
            f"`{name}`: the increment of {path!r} cannot be merged: {note}; use the model unmerged."
        )
    merged = add_increment(weight, sign * weight_increment(layer, adapter, weight.shape))
    return require_finite(merged, path, name) if safe else merged


def check_not_quantised(is_quantised: bool, path: str) -> None:
    """Raise an error if the weight of the layer at ``path`` is quantised.

    Raises:
      ValueError: it is; the message names the function that merges into such weights.
    """
    if is_quantised:
        raise ValueError(
            f"`variables`: the weight of {path!r} is quantised and cannot be merged into in place; "
            "call adalora_jax.quantization.merge, which dequantises or requantises it and reports "
            "the error."
        )


def add_increment(weight: jax.Array, delta: jax.Array) -> jax.Array:
    """Return ``W + ΔW``, summed in at least float32 and rounded once, to the weight's dtype.

    >>> add_increment(jnp.ones(2, jnp.bfloat16), jnp.ones(2)).dtype
    dtype(bfloat16)
    """
    dtype = accumulation_dtype(weight.dtype)
    return (weight.astype(dtype) + delta.astype(dtype)).astype(weight.dtype)


def require_finite(weight: jax.Array, path: str, name: str = "variables") -> jax.Array:
    """Return the merged weight of the layer at ``path`` if all its entries are finite.

    Raises:
      ValueError: an entry is not finite.
    """
    if not bool(jnp.isfinite(weight).all()):
        raise ValueError(
            f"`{name}`: the merged weight of {path!r} is not finite in {weight.dtype}; check "
            "the adapter, or merge into a wider dtype."
        )
    return weight


def add_output(output: jax.Array, term: jax.Array) -> jax.Array:
    """Return a layer's output plus an adapter output, sharded like the layer's output.

    A layer can be called with another ``out_sharding`` than JAX would derive for the adapter's.

    >>> add_output(jnp.ones(2), jnp.ones(2))
    Array([2., 2.], dtype=float32)
    """
    return output + (reshard(term, output) if term.shape == output.shape else term)


def adapter_output(
    layer: Layout,
    module: object,
    adapter: Adapter,
    x: jax.Array,
    shape: Sequence[int],
    dtype: DTypeLike,
    *,
    key: jax.Array | None = None,
    dropout_rate: float = 0.0,
    forward_mode: bool = False,
    equation: str | None = None,
    attend: bool = False,
    convolve: Callable[[Any, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Return the adapter output, the term that an adapter adds to its layer's output.

    Args:
      layer: the layout of the module's weight, from :func:`layer_of`.
      module: the layer; its axes, groups, precision and weight scale are read.
      adapter: the adapter, with the layer's own stack axes in front.
      x: the layer's input; token ids for an embedding.
      shape: shape of the layer's own weight.
      dtype: dtype of the layer's output and of the computation.
      key: PRNG key for the dropout of x; None disables dropout. Not used for embeddings.
      dropout_rate: in [0, 1).
      forward_mode: use JAX's automatic derivative, see
        :func:`~adalora_jax._src.core.low_rank.low_rank_autodiff`.
      equation: the equation of an einsum, if it is an argument of the call.
      attend: an embedding is used as an output layer, ``x Eᵀ``.
      convolve: ``(module, x, kernel)``: apply the module's convolution with another kernel, and
        without groups.

    Returns:
      An array with the shape and dtype of the layer's output.
    """
    precision = getattr(module, "precision", None)
    # jax.vmap may pass NumPy arrays through unchanged, and custom derivatives reject them.
    adapter, x = jax.tree.map(jnp.asarray, adapter), jnp.asarray(x)
    scale = known_scale(adapter, getattr(module, "name", None) or type(module).__name__)
    scale = scale * weight_scale(layer, module)
    options: dict[str, Any] = {"scale": scale, "forward_mode": forward_mode, "precision": precision}
    if layer.kind == "embed":
        if attend:  # the transposed increment swaps the two factors
            transposed = adapter._replace(p=adapter.q, q=adapter.p)
            return dense_output(transposed, x.astype(dtype), **options)
        return _lookup(adapter, x, scale, dtype)
    x, options = x.astype(dtype), {**options, "dropout_rate": dropout_rate}
    if layer.kind == "dense":
        lead = x.shape[: x.ndim - len(layer.ins)]  # a declared layout may have several
        y = dense_output(adapter, x.reshape(*lead, -1), key, **options)
        return y.reshape(*lead, *(shape[axis] for axis in layer.outs))
    if layer.kind == "conv":
        kernel = conv_kernel(layer, adapter.q, shape, dtype)
        product = functools.partial(convolve_groups, convolve, module)
        seed = seed_of(key) if dropout_rate else None
        if seed is None or forward_mode:
            h: Any = product(apply_dropout(x, seed, dropout_rate), kernel)
        else:
            h = linear_with_dropout(product, x, kernel, seed, dropout_rate)
        scale = scale if seed is None else scale / (1 - dropout_rate)
        return _pointwise_conv(
            adapter, h, getattr(module, "feature_group_count", 1), scale, precision
        )
    labels = einsum.labels_of(layer, module, equation, x.ndim)
    return einsum.output(layer, labels, adapter, x, key, shape, options)


def _lookup(adapter: Adapter, ids: jax.Array, scale: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Return the rows ``ids`` of an embedding's increment, ``s · (q[:, ids]ᵀ · lam) p``."""
    rows = jnp.moveaxis(take(adapter.q, ids, 1), 0, -1).astype(
        accumulation_dtype(dtype)
    )  # [..., r]
    c = adapter.lam.astype(rows.dtype) * jnp.asarray(scale, rows.dtype)
    rows = rows * jnp.broadcast_to(c, rows.shape)
    at = explicit_sharding(rows, (*spec_of_type(rows)[:-1], *spec_of_type(adapter.p)[1:]))
    return jnp.matmul(rows.astype(dtype), adapter.p.astype(dtype), out_sharding=at).astype(dtype)


def conv_kernel(layer: Layout, q: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """Return ``q [r, in]`` as a kernel with r output features, for the inputs of one group."""
    shape = [q.shape[0] if axis in layer.outs else size for axis, size in enumerate(shape)]
    return layer.to_weight(q.T, shape).astype(dtype)


def convolve_groups(
    convolve: Callable[[Any, jax.Array, jax.Array], jax.Array],
    module: object,
    x: jax.Array,
    kernel: jax.Array,
) -> jax.Array:
    """Apply a kernel of r output features to each group of channels: ``[..., groups · r]``.

    The groups become a batch axis. In a grouped convolution, XLA computes the gradient of the
    kernel once for each device that has the same part of the batch, and returns their sum.

    Args:
      convolve: as in :func:`adapter_output`.
      module: the layer.
      x: its input, ``[..., groups · in]``.
      kernel: the kernel that all groups share.
    """
    groups = getattr(module, "feature_group_count", 1)
    if groups == 1:
        return convolve(module, x, kernel)

    def per_group(x: jax.Array, kernel: jax.Array) -> jax.Array:
        split = x.reshape(*x.shape[:-1], groups, -1)
        h = jax.vmap(functools.partial(convolve, module), (-2, None), -2)(split, kernel)
        return h.reshape(*h.shape[:-2], -1)

    whole = reshard(x, x, (*spec_of_type(x)[:-1], None))
    return with_auto_axes(per_group, whole, whole, kernel)


def _pointwise_conv(
    adapter: Adapter, h: jax.Array, groups: int, scale: ArrayLike, precision: PrecisionLike
) -> jax.Array:
    """Apply the 1 x 1 convolution that maps ``h [..., groups · r]`` to ``[..., out]``."""
    rank, out = adapter.p.shape
    dtype = accumulation_dtype(h.dtype)
    c = adapter.lam.astype(dtype) * jnp.asarray(scale, dtype)
    h = h.reshape(*h.shape[:-1], groups, rank)
    h = (h.astype(dtype) * jnp.broadcast_to(c, h.shape)).astype(h.dtype)
    p = adapter.p.astype(h.dtype).reshape(rank, groups, out // groups)
    y = jnp.einsum("...gr,rgo->...go", h, p, precision=precision)
    return y.reshape(*y.shape[:-2], out)


def _kind(module: object) -> str | None:
    """Return the kind of a Flax layer or of a subclass of one; None for other modules."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("flax.") and cls.__name__ in _KINDS:
            return _KINDS[cls.__name__]
    return None


def weight_scale(layer: Layout, module: object) -> float:
    """Return the factor by which an einsum module multiplies its weight before use; 1 if none.

    Gemma's einsum modules store it as ``w_scale``. An increment ΔW of their weight changes the
    layer by ``w_scale · ΔW``, merged or not.
    """
    own = layer.kind == "einsum" and not layer.equation  # a declared product has no factor
    scale = getattr(module, "w_scale", None) if own else None
    return scale if isinstance(scale, (int, float)) else 1.0


def input_shape(layer: Layout, module: object, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape of an example input of a layer; None if it is not known.

    >>> input_shape(Layout("kernel"), None, (6, 4))
    (2, 3, 6)
    """
    shape = shape[len(shape) - layer.ndim :]
    ins = [shape[axis] for axis in layer.ins]
    if layer.kind == "embed":
        return 2, 3
    if layer.kind == "conv":
        groups = getattr(module, "feature_group_count", 1)
        return 2, *[4 * size + 8 for size in ins[:-1]], ins[-1] * groups
    if layer.kind == "general":
        batch, axes, _ = einsum.general_axes(module)
        size = [2] * max(len(batch) + len(axes) + 1, *(a + 1 for a in axes), *(-a for a in axes))

        def in_order(axes: tuple[int, ...]) -> list[int]:
            return sorted(axis % len(size) for axis in axes)  # as Flax contracts them

        stack = [shape[axis] for axis in layer.stack]
        for axis, features in zip((*in_order(batch), *in_order(axes)), (*stack, *ins)):
            size[axis] = features
        return tuple(size)
    if layer.kind == "einsum":
        equation = einsum.equation_of(module)
        if equation is None:
            return None
        (xs, ws), _ = operands(equation)
        known = dict(zip(ws, shape))
        return tuple(known.get(label, 2) for label in xs.replace("...", ""))
    return 2, 3, *ins
