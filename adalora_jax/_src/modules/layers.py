"""Layer kinds: how each one's weight is read as matrices, and its adapter output.

A weight of any number of axes is a stack of matrices ``[in, out]``: the layer sums over some axes
(in), some appear in its output (out), and some index separate matrices (stack). Both Flax front
ends use this module, which reads a layer's attributes by their names in linen or NNX.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import ArrayLike, DTypeLike

from adalora_jax._src.core.adapter import (
    Adapter,
    delta_weight,
    dense_output,
    keys_of,
    known_scale,
    seed_of,
)
from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.low_rank import accumulation_dtype, apply_dropout, linear_with_dropout

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


def layer_of(module: Any, weights: Mapping[str, int], equation: str | None = None) -> Layout | None:
    """Return the layout of a module's weight; None if the module cannot be adapted.

    Args:
      module: a linen or NNX module.
      weights: ``{name: number of axes}`` of the module's own parameters, without lifted axes
        where these are known.
      equation: the equation of an einsum, if it is an argument of the call.

    >>> from flax import linen
    >>> layer_of(linen.DenseGeneral((2, 3), axis=(-2, -1)), {"kernel": 4})
    Layout(weight='kernel', ins=(0, 1), outs=(2, 3), stack=(), kind='general', shape=None, note='')
    """
    kind = _kind(module)
    if kind in ("dense", "weight"):
        return Layout("kernel", kind=kind)
    if kind == "embed":
        return Layout("embedding", kind=kind)
    if kind == "general":
        batch, axis, features = _general(module)
        ends = len(batch), len(batch) + len(axis), len(batch) + len(axis) + len(features)
        stack, ins, outs = (tuple(range(*e)) for e in zip((0, *ends), ends))
        return Layout("kernel", ins, outs, stack, kind)
    if kind == "conv":
        if getattr(module, "mask", None) is not None:
            return None
        n = 1 if isinstance(module.kernel_size, int) else len(module.kernel_size)
        ends = (n + 1, n) if getattr(module, "transpose_kernel", False) else (n, n + 1)
        return Layout("kernel", (*range(n), ends[0]), (ends[1],), kind=kind)
    equation = equation or _equation(module)
    axes = _einsum_axes(equation) if equation else None
    most = max(weights.values(), default=0)
    named = [name for name, n in weights.items() if n == most]  # a bias has fewer axes
    if axes is None or len(named) != 1 or most < sum(map(len, axes)):
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
    have = (adapter.lam.shape[:-1], adapter.q.shape[-1], adapter.p.shape[-1])
    if len(shape) < layer.ndim or have != (stack, in_features, out_features):
        raise ValueError(
            f"`adapters[{path!r}]`: the adapter is for {list(have[0])} matrices of {have[1]} x "
            f"{have[2]}, but the weight {layer.weight!r} of shape {tuple(shape)} reads as "
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
    path: str, weight: jax.Array, adapter: Adapter, layer: Layout, *, sign: int = 1, safe: bool
) -> jax.Array:
    """Return ``W + ΔW`` (or with ``sign=-1`` ``W − ΔW``), rounded once to the weight's dtype.

    Raises:
      ValueError: the adapter's scale is not known, the adapter is for another weight, the layer
        does not use its weight as it is stored, or with ``safe`` the result is not finite.
    """
    known_scale(adapter, path)
    check_fit(layer, adapter, weight.shape, path)
    if note := layer.note or (adapter.layout.note if adapter.layout else ""):
        raise ValueError(
            f"`variables`: the increment of {path!r} cannot be merged: {note}; use the model "
            "unmerged."
        )
    merged = add_increment(weight, sign * weight_increment(layer, adapter, weight.shape))
    return require_finite(merged, path) if safe else merged


def lora_pair(
    layer: Layout, module: object, adapter: Adapter, shape: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    """Return the increment of a weight as a LoRA in Qwix's layout: ``ΔW = A B``, with s and λ in B.

    A has the axes that the layer sums over, followed by the rank; B has the rank, followed by the
    other axes. An einsum keeps its axes, in the weight's order; other kinds flatten them into one.
    Stacked matrices with one shared input, such as keys and values, share one A, so their ranks
    add up.

    Raises:
      ValueError: the layer is not dense, general or einsum, its stacked matrices have separate
        inputs, or the adapter's scale is not known.

    >>> kv = Layout("w", (2,), (1, 3), (0,), "einsum")  # BSD,CKDH->CBSKH
    >>> adapter = Adapter(jnp.ones((2, 4, 15)), jnp.ones((2, 4)), jnp.ones((2, 4, 6)))
    >>> a, b = lora_pair(kv, None, adapter, (2, 3, 6, 5))
    >>> a.shape, b.shape
    ((6, 8), (8, 2, 3, 5))
    """
    lifted, own = layer._split(shape)
    (xs, ws), _ = _operands(_equation(module) or ",->")
    each_own = bool(lifted) or any(axis < len(ws) and ws[axis] in xs for axis in layer.stack)
    flat = layer.kind in ("dense", "general")
    if each_own or not (layer.kind == "einsum" or (flat and not layer.stack)):
        raise ValueError(
            f"`model`: a {type(module).__name__} with a weight of shape {tuple(shape)} has no "
            "equivalent LoRA in Qwix; leave it out of the adapters, or merge them."
        )

    def sizes(axes: tuple[int, ...]) -> list[int]:
        return [own[axis] for axis in axes]

    n, rank = math.prod(sizes(layer.stack)), adapter.lam.shape[-1]
    dtype = accumulation_dtype(adapter.p.dtype)
    scale = jnp.asarray(known_scale(adapter), dtype)
    c = (adapter.lam.astype(dtype) * scale).reshape(n, rank, 1)
    p = (adapter.p.astype(dtype).reshape(n, rank, -1) * c).astype(adapter.p.dtype)
    a, b = (
        adapter.q.reshape(n * rank, -1).T,
        jnp.einsum("nro,nm->nrmo", p, jnp.eye(n, dtype=p.dtype)),
    )
    if flat:
        return a, b.reshape(rank, -1)
    others = (*layer.stack, *layer.outs)
    order = [1 + others.index(axis) for axis in sorted(others)]
    b = b.reshape(n * rank, *sizes(others)).transpose(0, *order)
    return a.reshape(*sizes(layer.ins), n * rank), b


def add_increment(weight: jax.Array, delta: jax.Array) -> jax.Array:
    """Return ``W + ΔW``, summed in at least float32 and rounded once, to the weight's dtype.

    >>> add_increment(jnp.ones(2, jnp.bfloat16), jnp.ones(2)).dtype
    dtype(bfloat16)
    """
    dtype = accumulation_dtype(weight.dtype)
    return (weight.astype(dtype) + delta.astype(dtype)).astype(weight.dtype)


def require_finite(weight: jax.Array, path: str) -> jax.Array:
    """Return the merged weight of the layer at ``path`` if all its entries are finite.

    Raises:
      ValueError: an entry is not finite.
    """
    if not bool(jnp.isfinite(weight).all()):
        raise ValueError(
            f"`variables`: the merged weight of {path!r} is not finite in {weight.dtype}; check "
            "the adapter, or merge into a wider dtype."
        )
    return weight


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
    convolve: Callable[[Any, jax.Array, jax.Array, int], jax.Array],
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
      forward_mode: use JAX's automatic derivative, see ``low_rank_plain``.
      equation: the equation of an einsum, if it is an argument of the call.
      attend: an embedding is used as an output layer, ``x Eᵀ``.
      convolve: ``(module, x, kernel, features)``: apply the module's convolution with another
        kernel.

    Returns:
      An array with the shape and dtype of the layer's output.
    """
    precision = getattr(module, "precision", None)
    # jax.vmap may pass NumPy arrays through unchanged, and custom derivatives reject them.
    adapter, x = jax.tree.map(jnp.asarray, adapter), jnp.asarray(x)
    scale = known_scale(adapter, getattr(module, "name", None) or type(module).__name__)
    scale = scale * weight_scale(layer, module)
    how = {"scale": scale, "forward_mode": forward_mode, "precision": precision}
    if layer.kind == "embed":
        if attend:  # the transposed increment swaps the two factors
            turned = adapter._replace(p=adapter.q, q=adapter.p)
            return dense_output(turned, x.astype(dtype), **how)
        return _lookup(adapter, x, scale, dtype)
    x, how = x.astype(dtype), {**how, "dropout_rate": dropout_rate}
    if layer.kind == "dense":
        lead = x.shape[: x.ndim - len(layer.ins)]  # a declared layout may have several
        y = dense_output(adapter, x.reshape(*lead, -1), key, **how)
        return y.reshape(*lead, *(shape[axis] for axis in layer.outs))
    if layer.kind == "conv":
        kernel, features = conv_kernel(layer, module, adapter.q, shape, dtype)

        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return convolve(module, x, kernel, features)

        seed = seed_of(key) if dropout_rate else None
        if seed is None or forward_mode:
            h: Any = product(apply_dropout(x, seed, dropout_rate), kernel)
        else:
            h = linear_with_dropout(product, x, kernel, seed, dropout_rate)
        scale = scale if seed is None else scale / (1 - dropout_rate)
        return _pointwise_conv(
            adapter, h, getattr(module, "feature_group_count", 1), scale, precision
        )
    labels = einsum_labels(layer, module, equation, x.ndim)
    return _contraction(layer, labels, adapter, x, key, shape, how)


def einsum_labels(
    layer: Layout, module: object, equation: str | None, ndim: int
) -> tuple[str, str, str]:
    """Return the labels of input, weight and output of a general or an einsum layer."""
    if layer.kind == "general":
        equation = _general_equation(module, ndim)
    return _labels(equation or _equation(module) or "", ndim)


def stack_first(layer: Layout, labels: tuple[str, str, str], x: jax.Array) -> jax.Array:
    """Return an einsum's input as ``[*stack, *free, in]``, with those stack axes that it has."""
    xs, ws, _ = labels
    stack, ins = ([ws[axis] for axis in axes] for axes in (layer.stack, layer.ins))
    free = [a for a in xs if a not in stack and a not in ins]
    x = x.transpose([xs.index(a) for a in (*(a for a in stack if a in xs), *free, *ins)])
    return x.reshape(*x.shape[: x.ndim - len(ins)], -1)


def _contraction(
    layer: Layout,
    labels: tuple[str, str, str],
    adapter: Adapter,
    x: jax.Array,
    key: jax.Array | None,
    shape: Sequence[int],
    how: dict[str, Any],
) -> jax.Array:
    """Return the adapter output of ``y = einsum(x, W)``."""
    xs, ws, ys = labels
    axes = (layer.stack, layer.ins, layer.outs)
    stack, ins, outs = ("".join(ws[axis] for axis in axes) for axes in axes)
    free = [a for a in xs if a not in stack and a not in ins]
    size = dict(zip(xs, x.shape)) | dict(zip(ws, shape))
    x = stack_first(layer, labels, x)
    function = functools.partial(dense_output, **how)
    keys = keys_of(key, tuple(size[a] for a in stack if a in xs))
    for label in reversed(stack):
        own = 0 if label in xs else None  # a shared input has one dropout mask
        function = jax.vmap(function, in_axes=(0, own, own))
    order = [*stack, *free, *outs]
    y = function(adapter, x, keys).reshape([size[a] for a in order])
    return y.transpose([order.index(a) for a in ys])


def _lookup(adapter: Adapter, ids: jax.Array, scale: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Return the rows ``ids`` of an embedding's increment, ``s · (q[:, ids]ᵀ · lam) p``."""
    rows = jnp.moveaxis(jnp.take(adapter.q, ids, axis=1), 0, -1).astype(
        accumulation_dtype(dtype)
    )  # [..., r]
    c = adapter.lam.astype(rows.dtype) * jnp.asarray(scale, rows.dtype)
    rows = rows * jnp.broadcast_to(c, rows.shape)
    return (rows.astype(dtype) @ adapter.p.astype(dtype)).astype(dtype)


def conv_kernel(
    layer: Layout, module: object, q: jax.Array, shape: Sequence[int], dtype: DTypeLike
) -> tuple[jax.Array, int]:
    """Return ``q [r, in]`` as a kernel with r output features per group, and their number."""
    groups, rank = getattr(module, "feature_group_count", 1), q.shape[0]
    shape = [rank if axis in layer.outs else size for axis, size in enumerate(shape)]
    kernel = layer.to_weight(q.T, shape).astype(dtype)
    # Each group of outputs sees its own inputs through the same r kernels.
    kernel = jnp.concatenate([kernel] * groups, axis=layer.outs[0]) if groups > 1 else kernel
    return kernel, rank * groups


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


def _equation(module: object) -> str | None:
    for name in ("einsum_str", "equation", "eqn"):
        if isinstance(getattr(module, name, None), str):
            return getattr(module, name)
    return None


def weight_scale(layer: Layout, module: object) -> float:
    """Return the factor by which an einsum module multiplies its weight before use; 1 if none.

    Gemma's einsum modules store it as ``w_scale``. An increment ΔW of their weight changes the
    layer by ``w_scale · ΔW``, merged or not.
    """
    scale = getattr(module, "w_scale", None) if layer.kind == "einsum" else None
    return scale if isinstance(scale, (int, float)) else 1.0


def mapped_axes(value: object) -> list[int]:
    """Return the axes along which the enclosing ``jax.vmap`` calls map a value.

    >>> seen = []
    >>> _ = jax.vmap(lambda x: seen.extend(mapped_axes(x)), in_axes=1)(jnp.ones((2, 3)))
    >>> seen
    [1]
    """
    axes = []
    while value is not None:
        if isinstance(axis := getattr(value, "batch_dim", None), int):
            axes.append(axis)
        value = getattr(value, "val", getattr(value, "primal", None))
    return axes


def input_shape(layer: Layout, module: object, shape: Sequence[int]) -> tuple[int, ...] | None:
    """Return the shape of an example input of a layer; None if it is not known.

    >>> input_shape(Layout("kernel"), None, (6, 4))
    (2, 3, 6)
    """
    own = shape[len(shape) - layer.ndim :]
    ins = [own[axis] for axis in layer.ins]
    if layer.kind == "embed":
        return 2, 3
    if layer.kind == "conv":
        groups = getattr(module, "feature_group_count", 1)
        return 2, *[4 * size + 8 for size in ins[:-1]], ins[-1] * groups
    if layer.kind == "general":
        batch, axes, _ = _general(module)
        size = [2] * max(len(batch) + len(axes) + 1, *(a + 1 for a in axes), *(-a for a in axes))

        def in_order(axes: tuple[int, ...]) -> list[int]:
            return sorted(axis % len(size) for axis in axes)  # as Flax contracts them

        stack = [own[axis] for axis in layer.stack]
        for axis, features in zip((*in_order(batch), *in_order(axes)), (*stack, *ins)):
            size[axis] = features
        return tuple(size)
    if layer.kind == "einsum":
        equation = _equation(module)
        if equation is None:
            return None
        (xs, ws), _ = _operands(equation)
        known = dict(zip(ws, own))
        return tuple(known.get(label, 2) for label in xs.replace("...", ""))
    return 2, 3, *ins


def _general(module: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return batch axes, contracted axes and features of a DenseGeneral or a LinearGeneral."""

    def as_tuple(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, Iterable) else (value,)

    batch = module.batch_dims if hasattr(module, "batch_dims") else module.batch_axis
    features = module.features if hasattr(module, "features") else module.out_features
    return as_tuple(batch), as_tuple(module.axis), as_tuple(features)


def _general_equation(module: object, ndim: int) -> str:
    batch, axis, features = _general(module)
    xs = _letters(ndim)
    outs = _letters(len(features), skip=ndim)

    def in_order(axes: tuple[int, ...]) -> str:
        return "".join(xs[a] for a in sorted(a % ndim for a in axes))

    batch, ins = in_order(batch), in_order(axis)  # Flax sorts the axes
    free = "".join(a for a in xs if a not in batch + ins)
    return f"{xs},{batch}{ins}{outs}->{batch}{free}{outs}"


def _labels(equation: str, ndim: int) -> tuple[str, str, str]:
    """Return the labels of input, weight and output, with ``...`` expanded to an input's ndim.

    >>> _labels("...d, df -> ...f", 3)
    ('ABd', 'df', 'ABf')
    """
    (xs, ws), ys = _operands(equation)
    dots = "".join(a for a in string.ascii_uppercase + string.ascii_lowercase if a not in equation)
    dots = dots[: max(0, ndim - len(xs.replace("...", "")))]
    return xs.replace("...", dots), ws, ys.replace("...", dots)


def _operands(equation: str) -> tuple[list[str], str]:
    inputs, _, output = equation.replace(" ", "").partition("->")
    return inputs.split(","), output


def _roles(xs: str, ws: str, ys: str) -> tuple[str, str, str]:
    """Return the weight's stack, input and output labels.

    A label in all three operands is a stack label. So are equal leading labels of weight and
    output that are not in the input: such a weight holds one matrix for each of several outputs.
    """
    stack = [a for a in ws if a in xs and a in ys]
    for w, y in zip(ws, ys):
        if w != y or w in xs:
            break
        stack.append(w)
    stack = "".join(a for a in ws if a in stack)
    ins = "".join(a for a in ws if a in xs and a not in ys)
    return stack, ins, "".join(a for a in ws if a not in stack and a not in ins)


def _einsum_axes(equation: str) -> tuple[tuple[int, ...], ...] | None:
    """Return the weight's stack, in and out axes; None if the equation is not a sum of x W."""
    operands, ys = _operands(equation)
    if len(operands) != 2 or not ys or "..." in operands[1]:
        return None
    xs, ws = operands
    roles = _roles(xs, ws, ys)
    plain = len(set(ws)) == len(ws) and all(a in ys for a in roles[2])
    kept = all(a in ys or a in ws for a in xs.replace("...", ""))
    if not (plain and kept and roles[1] and roles[2]):
        return None
    return tuple(tuple(ws.index(a) for a in role) for role in roles)


def _letters(count: int, skip: int = 0) -> str:
    return string.ascii_letters[skip : skip + count]
