"""Adapter of one weight: its three factors, the layer's output with it, and the dense increment."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Inexact, Shaped, UInt32

from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.low_rank import accumulation_dtype, low_rank, low_rank_autodiff


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["p", "lam", "q"],
    meta_fields=["scale", "layout"],
)
@dataclasses.dataclass(frozen=True)
class Adapter:
    """Factors of the increment ``ΔW = s · P Λ Q`` of one weight, one triplet per row.

    This is the increment of `AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_ with a scale s.
    Triplet i is ``(p[i], lam[i], q[i])``, so pruning, slicing and stacking all select rows. Leading
    axes are stacked layers; each slice is the adapter of one matrix, with r triplets. The dense
    form of the increment is ``s · qᵀ diag(lam) p``, ``[..., in, out]``.

    An adapter is a pytree with three leaves, which are arrays or, as after ``jax.tree.map``, values
    in place of arrays, such as PartitionSpecs; they are typed as arrays. The scale and the layout
    are static, a part of the tree's structure, so every function that takes adapters has access to
    them. Iteration, ``_asdict`` and ``_replace`` work as for a NamedTuple of the three leaves;
    ``_replace`` also changes static fields.

    Attributes:
      p: float array ``[..., r, out]``: left singular vectors, the paper's P transposed.
      lam: float array ``[..., r]``: singular values, which are pruned.
      q: float array ``[..., r, in]``: right singular vectors.
      scale: float, static: the factor s, constant for the whole run, also after compaction. None:
        not known, as for a mapping of arrays.
      layout: Layout, static: axes of the adapted weight. None: a dense ``kernel [..., in, out]``.

    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)), scale=0.5)
    >>> len(jax.tree.leaves(adapter)), jax.tree.map(jnp.zeros_like, adapter).scale
    (3, 0.5)
    """

    _fields: ClassVar[tuple[str, ...]] = ("p", "lam", "q")

    p: Float[Array, "*stack r out"]
    lam: Float[Array, "*stack r"]
    q: Float[Array, "*stack r in"]
    scale: float | None = 1.0
    layout: Layout | None = dataclasses.field(default=None, repr=False)

    def __iter__(self) -> Iterator[Array]:
        return iter((self.p, self.lam, self.q))

    def _replace(self, **changes: Any) -> Adapter:
        return dataclasses.replace(self, **changes)

    def _asdict(self) -> dict[str, Array]:
        return dict(zip(self._fields, self))


def known_scale(adapter: Adapter, path: str = "") -> float:
    """Return the adapter's scale.

    Args:
      adapter: any adapter.
      path: path of the adapter, for the message; empty for an adapter without one.

    Raises:
      ValueError: the scale is None.
    """
    if adapter.scale is None:
        subject = f"adapters[{path!r}]" if path else "adapter"
        raise ValueError(
            f"`{subject}`: the scale is not known, since p, lam and q were given as a mapping; "
            "pass Adapter objects, as adapted.init, nnx.adapters and checkpoint.restore return "
            "them."
        )
    return adapter.scale


def dense_output(
    adapter: Adapter,
    x: Inexact[Array, "... in"],
    key: Array | None = None,
    *,
    scale: ArrayLike,
    dropout_rate: float = 0.0,
    forward_mode: bool = False,
    precision: PrecisionLike = None,
) -> Inexact[Array, "... out"]:
    """Return the adapter output ``s · ((x qᵀ) · lam) p``, the adapter's term in the layer's output.

    Args:
      adapter: the factors, with any leading (stack) axes.
      x: ``[*stack, ..., in]``; its dtype is the dtype of the computation and of the result.
      key: PRNG key for the dropout of x; None: no dropout.
      scale: s, usually ``adapter.scale``.
      dropout_rate: in [0, 1); static.
      forward_mode: True: use JAX's autodiff, which is slower and supports ``jax.jvp``.
      precision: as in ``jax.lax.dot_general``.

    Returns:
      ``[*stack, ..., out]``.

    >>> import jax, jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))
    >>> dense_output(adapter, jnp.ones((5, 3)), scale=0.5).shape
    (5, 4)
    """
    stack = adapter.lam.shape[:-1]
    key = key if dropout_rate else None
    product = low_rank_autodiff if forward_mode else low_rank

    def term(adapter: Adapter, x: Array, key: Array | None) -> Array:
        c = _scaled(adapter.lam, scale if key is None else scale / (1 - dropout_rate))
        return product(x, adapter.p, c, adapter.q, seed_of(key), dropout_rate, precision)

    for _ in stack:
        term = jax.vmap(term)
    return term(adapter, x, keys_of(key, stack))


def seed_of(key: Array | None) -> UInt32[Array, "2"] | None:
    """Return the seed of ``low_rank.dropout_mask``; None without a key.

    >>> seed_of(jax.random.key(0)).shape
    (2,)
    """
    if key is None:
        return None
    # The key's own words, since drawing random numbers from it would cost more than the mask.
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return (jax.random.key_data(key) if typed else key).ravel()[:2]


def keys_of(key: Array | None, stack: tuple[int, ...]) -> Shaped[Array, "..."] | None:
    """Return one key per slice of a stack, the key itself without stack axes, or None for None.

    >>> keys_of(jax.random.key(0), (2, 3)).shape, keys_of(None, (2, 3))
    ((2, 3), None)
    """
    return jax.random.split(key, stack) if key is not None and stack else key


def _scaled(lam: Inexact[Array, "..."], scale: ArrayLike) -> Inexact[Array, "..."]:
    dtype = accumulation_dtype(lam.dtype)
    return lam.astype(dtype) * jnp.asarray(scale, dtype)


@functools.partial(jax.jit, static_argnames=("dropout_rate", "forward_mode", "precision"))
def forward(
    adapter: Adapter,
    x: Shaped[Array, "... in"],
    kernel: Shaped[Array, "..."] | None = None,
    bias: Shaped[Array, "..."] | None = None,
    *,
    mask: Bool[Array, "..."] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    forward_mode: bool = False,
    precision: PrecisionLike = None,
) -> Inexact[Array, "... out"]:
    """Return the adapted layer's output, ``y = x W + b + s · ((x qᵀ) · lam) p``. Jitted.

    The adapted weight ``W + s · qᵀ diag(lam) p`` is that of `AdaLoRA, Eq. (3)
    <https://arxiv.org/abs/2303.10512>`_ with a scale s.

    Args:
      adapter: the layer's adapter, with its scale s. Its leading (stack) axes, if any, also come
        first in x, kernel and bias.
      x: the layer's input, ``[*stack, ..., in]``.
      kernel: W, ``[*stack, in, out]``. None: the term ``x W`` is omitted.
      bias: b, ``[*stack, out]``. None: no bias.
      mask: booleans, ``[*stack, r]`` or broadcastable to it; triplets whose entry is False are
        ignored. None: all triplets count.
      dropout_rate: dropout probability of the adapter's input, in [0, 1); static.
      dropout_key: PRNG key for the dropout. None: no dropout, at any rate.
      forward_mode: True: use JAX's autodiff, which is slower and supports ``jax.jvp``; static.
      precision: as in ``jax.lax.dot_general``; static.

    Returns:
      ``[*stack, ..., out]``, in the dtype of ``x @ kernel`` (of x without a kernel); where that is
      an integer dtype, it is promoted with the adapter's dtypes.

    Raises:
      TypeError: ``adapter`` is not an :class:`Adapter`, or another argument is not an array.
      ValueError: shapes do not match, ``dropout_rate`` is outside [0, 1), or the adapter's scale is
        not known.

    >>> import jax, jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.zeros(2), jnp.ones((2, 3)))
    >>> x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    >>> bool((forward(adapter, x, kernel) == x @ kernel).all())
    True
    """
    check_adapter(adapter)
    for name, value in {"x": x, "kernel": kernel, "bias": bias, "mask": mask}.items():
        if not hasattr(value, "shape") and (name == "x" or value is not None):
            raise TypeError(f"`{name}={type(value).__name__}`: is not an array; pass one.")
    stack = adapter.lam.shape[:-1]
    in_features, out_features = adapter.q.shape[-1], adapter.p.shape[-1]
    if x.shape[-1:] != (in_features,) or x.shape[: len(stack)] != stack:
        raise ValueError(
            f"`x`: has shape {x.shape}, but the adapter is for inputs of shape "
            f"[{', '.join(map(str, (*stack, '...', in_features)))}]; pass the inputs of its layer."
        )
    if kernel is not None and kernel.shape != (*stack, in_features, out_features):
        raise ValueError(
            f"`kernel`: has shape {kernel.shape}, but the adapter is for a kernel of shape "
            f"{(*stack, in_features, out_features)}; initialise the adapter for this kernel."
        )
    if bias is not None and bias.shape != (*stack, out_features):
        raise ValueError(
            f"`bias`: has shape {bias.shape}, but the adapter is for a bias of shape "
            f"{(*stack, out_features)}; pass the bias of its layer."
        )
    if mask is not None and not _broadcasts(mask.shape, adapter.lam.shape):
        raise ValueError(
            f"`mask`: has shape {mask.shape}, but the adapter's triplets are "
            f"{adapter.lam.shape}; pass one boolean per triplet."
        )
    if not 0 <= dropout_rate < 1:
        raise ValueError(
            f"`dropout_rate={dropout_rate}`: must be at least 0 and below 1; pass a probability of "
            "dropping an input, such as 0.1."
        )
    dtype = x.dtype if kernel is None else jnp.result_type(x, kernel)
    if not jnp.issubdtype(dtype, jnp.inexact):  # the adapter output must not be truncated
        dtype = jnp.result_type(dtype, *adapter)
    if mask is not None:
        adapter = adapter._replace(lam=jnp.where(mask, adapter.lam, 0))
    y = dense_output(
        *(adapter, x.astype(dtype), dropout_key),
        scale=known_scale(adapter),
        dropout_rate=dropout_rate,
        forward_mode=forward_mode,
        precision=precision,
    )
    spread = (*stack, *[1] * (x.ndim - len(stack) - 1), out_features)
    if kernel is not None:
        product = functools.partial(jnp.matmul, precision=precision)
        for _ in stack:
            product = jax.vmap(product)
        y = product(x.astype(dtype), kernel.astype(dtype)) + y
    return y if bias is None else y + bias.astype(dtype).reshape(spread)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return jnp.broadcast_shapes(shape, to) == to
    except ValueError:
        return False


def delta_weight(adapter: Adapter) -> Float[Array, "... in out"]:
    """Return the dense increment ``ΔW = s · qᵀ diag(lam) p``.

    It is the term ``P Λ Q`` of `AdaLoRA, Eq. (3) <https://arxiv.org/abs/2303.10512>`_, scaled by s
    and transposed to Flax's ``[in, out]``.

    Args:
      adapter: factors ``p [..., r, out]``, ``lam [..., r]``, ``q [..., r, in]`` and the scale s.

    Returns:
      ``[..., in, out]``, in the dtype of ``lam`` but at least float32.

    Raises:
      TypeError: ``adapter`` is not an :class:`Adapter`.
      ValueError: the adapter's scale is not known, or its shapes do not match.

    >>> import jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.array([1.0, 2.0]), jnp.ones((2, 3)), scale=0.5)
    >>> delta_weight(adapter)[0]
    Array([1.5, 1.5, 1.5, 1.5], dtype=float32)
    """
    check_adapter(adapter)
    c = _scaled(adapter.lam, known_scale(adapter))
    rows = c[..., None] * adapter.p.astype(c.dtype)
    return jnp.einsum(
        "...ri,...ro->...io", adapter.q.astype(c.dtype), rows, precision=jax.lax.Precision.HIGHEST
    )


def check_adapter(adapter: Adapter, name: str = "adapter") -> None:
    """Check that the shapes of p, lam and q match.

    Args:
      adapter: any adapter.
      name: name of the adapter, for the message.

    Raises:
      TypeError: ``adapter`` is not an :class:`Adapter`.
      ValueError: they do not match; the message has the adapter's name and shapes.
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"`{name}`: is not an Adapter; pass one, Adapter(p, lam, q).")
    p, lam, q = (tuple(jnp.shape(leaf)) for leaf in adapter)
    if not lam or p[:-1] != lam or q[:-1] != lam:
        raise ValueError(
            f"`{name}`: has p {p}, lam {lam} and q {q}, which do not match; pass [..., r, out], "
            "[..., r] and [..., r, in] with the same r and the same leading axes."
        )
