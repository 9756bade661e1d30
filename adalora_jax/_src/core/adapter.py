"""The adapter of one weight: its three factors and what is computed from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adalora_jax._src.core.layout import Layout
from adalora_jax._src.core.low_rank import low_rank, low_rank_plain, observed, wide


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["p", "lam", "q"],
    meta_fields=["scale", "layout"],
)
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The increment ``ΔW = s · P Λ Q`` of one weight, one triplet per row.

    Triplet i is ``(p[i], lam[i], q[i])``, so pruning, slicing and stacking all select rows. Leading
    axes are stacked layers; each slice is a matrix with r triplets. The dense form of the increment
    is ``s · qᵀ diag(lam) p``, ``[..., in, out]``.

    A pytree with three leaves. The scale and the layout are static: they are part of its structure,
    so every function that takes adapters knows their weights. Iteration, ``_asdict`` and
    ``_replace`` work as those of a NamedTuple of the three leaves; ``_replace`` changes static
    fields, too.

    Attributes:
      p: left singular vectors ``[..., r, out]``, the paper's P transposed.
      lam: singular values ``[..., r]``, which are pruned.
      q: right singular vectors ``[..., r, in]``.
      scale: the factor s, fixed for the adapter's life, also after compaction; None where it is not
        known, as in a mapping of arrays.
      layout: the weight that the adapter belongs to; None for a dense ``kernel [..., in, out]``.

    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)), scale=0.5)
    >>> len(jax.tree.leaves(adapter)), jax.tree.map(jnp.zeros_like, adapter).scale
    (3, 0.5)
    """

    _fields: ClassVar[tuple[str, ...]] = ("p", "lam", "q")

    p: jax.Array
    lam: jax.Array
    q: jax.Array
    scale: float | None = 1.0
    layout: Layout | None = dataclasses.field(default=None, repr=False)

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.p, self.lam, self.q))

    def _replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    def _asdict(self) -> dict[str, jax.Array]:
        return dict(zip(self._fields, self))


class Observer(Adapter):
    """An adapter that adds nothing; the gradient of its q, of any loss, is ``q Σ xᵀx``.

    The sum is over all inputs x of its layer, see :func:`~adalora_jax._src.core.low_rank.observed`.
    """


jax.tree_util.register_dataclass(
    Observer, data_fields=["p", "lam", "q"], meta_fields=["scale", "layout"]
)


def known_scale(adapter: Adapter, name: str = "adapter") -> float:
    """Return the adapter's scale.

    Raises:
      ValueError: it is not known.
    """
    if adapter.scale is None:
        raise ValueError(
            f"the scale of {name!r} is not known, since it was given as a mapping of p, lam and q: "
            "pass Adapter objects, as adapted.init, nnx.adapters and checkpoint.restore return "
            "them."
        )
    return adapter.scale


def increment(
    adapter: Adapter,
    x: jax.Array,
    key: jax.Array | None = None,
    *,
    scale: ArrayLike,
    dropout_rate: float = 0.0,
    forward_mode: bool = False,
    precision: Any = None,
) -> jax.Array:
    """``s · ((x qᵀ) · lam) p``: what the adapter adds to its layer's output.

    Args:
      adapter: with leading axes, x has the same ones in front.
      x: ``[*stack, ..., in]``; the dtype of the computation and of the result.
      key: for the dropout of x; without it there is none.
      scale: s, usually ``adapter.scale``.
      dropout_rate: in [0, 1); static.
      forward_mode: leave the derivative to JAX, which is slower and has ``jax.jvp``.
      precision: as in ``jax.lax.dot_general``.

    >>> import jax, jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3)))
    >>> increment(adapter, jnp.ones((5, 3)), scale=0.5).shape
    (5, 4)
    """
    stack = adapter.lam.shape[:-1]
    key = key if dropout_rate else None
    product: Any = low_rank_plain if forward_mode else low_rank

    def term(adapter, x, key):
        if isinstance(adapter, Observer):
            return observed(x, adapter.q, adapter.p.shape[-1])
        c = _scaled(adapter.lam, scale if key is None else scale / (1 - dropout_rate))
        return product(x, adapter.p, c, adapter.q, seed_of(key), dropout_rate, precision)

    for _ in stack:
        term = jax.vmap(term)
    return term(adapter, x, keys_of(key, stack))


def seed_of(key: jax.Array | None) -> jax.Array | None:
    """What :func:`~adalora_jax._src.core.low_rank.keep` makes a mask from; None without a key.

    >>> seed_of(jax.random.key(0)).shape
    (2,)
    """
    if key is None:
        return None
    # The words of the key itself: drawing numbers from it would take longer than the mask does.
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return (jax.random.key_data(key) if typed else key).ravel()[:2]


def keys_of(key: jax.Array | None, stack: tuple[int, ...]) -> jax.Array | None:
    """A key for each slice of a stack; None without a key.

    >>> keys_of(jax.random.key(0), (2, 3)).shape, keys_of(None, (2, 3))
    ((2, 3), None)
    """
    return jax.random.split(key, stack) if key is not None and stack else key


def _scaled(lam, scale):
    dtype = wide(lam.dtype)
    return lam.astype(dtype) * jnp.asarray(scale, dtype)


@functools.partial(jax.jit, static_argnames=("dropout_rate", "forward_mode", "precision"))
def forward(
    adapter: Adapter,
    x: jax.Array,
    kernel: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    forward_mode: bool = False,
    precision: Any = None,
) -> jax.Array:
    """Return the adapted layer's output, ``y = x W + b + s · ((x qᵀ) · lam) p``. Jitted.

    Args:
      adapter: of this layer, with its scale s. With leading (stack) axes, x, kernel and bias have
        them too.
      x: ``[..., in]``.
      kernel: W, ``[in, out]``; without it only the increment is computed.
      bias: b, ``[out]``.
      mask: ``[r]`` booleans; a triplet whose entry is false does not count.
      dropout_rate: of the adapter's input, in [0, 1); static.
      dropout_key: needed when ``dropout_rate > 0``; without it there is no dropout.
      forward_mode: leave the derivative to JAX, which is slower and has ``jax.jvp``; static.
      precision: as in ``jax.lax.dot_general``; static.

    Returns:
      ``[..., out]``, in the dtype that ``x @ kernel`` has (that of x without a kernel).

    Raises:
      ValueError: shapes do not fit, ``dropout_rate`` is outside [0, 1), or the adapter's scale is
        not known.

    >>> import jax, jax.numpy as jnp
    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.zeros(2), jnp.ones((2, 3)))
    >>> x, kernel = jnp.ones((2, 3)), jnp.ones((3, 4))
    >>> bool((forward(adapter, x, kernel) == x @ kernel).all())
    True
    """
    check_adapter(adapter)
    stack = adapter.lam.shape[:-1]
    in_features, out_features = adapter.q.shape[-1], adapter.p.shape[-1]
    if x.shape[-1:] != (in_features,) or x.shape[: len(stack)] != stack:
        raise ValueError(
            f"x has shape {x.shape}, but the adapter takes {[*stack, '...', in_features]}."
        )
    if kernel is not None and kernel.shape != (*stack, in_features, out_features):
        raise ValueError(
            f"kernel has shape {kernel.shape}, but the adapter is for a kernel of shape "
            f"{(*stack, in_features, out_features)}: initialise the adapter for this kernel."
        )
    if bias is not None and bias.shape != (*stack, out_features):
        raise ValueError(f"bias has shape {bias.shape} instead of {(*stack, out_features)}.")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate={dropout_rate} must be at least 0 and below 1.")
    dtype = x.dtype if kernel is None else jnp.result_type(x, kernel)
    if not jnp.issubdtype(dtype, jnp.inexact):  # an increment is never cut to an integer
        dtype = jnp.result_type(dtype, *adapter)
    if mask is not None:
        adapter = adapter._replace(lam=jnp.where(mask, adapter.lam, 0))
    y = increment(
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


def delta_weight(adapter: Adapter) -> jax.Array:
    """Return the dense increment ``s · qᵀ diag(lam) p``, ``[..., in, out]``, in at least float32.

    Raises:
      ValueError: the adapter's scale is not known, or its shapes do not belong together.

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
    """Refuses an adapter whose three shapes do not belong together.

    Raises:
      ValueError: naming the adapter and its shapes.
    """
    p, lam, q = (tuple(jnp.shape(leaf)) for leaf in adapter)
    if not lam or p[:-1] != lam or q[:-1] != lam:
        raise ValueError(
            f"{name} has p {p}, lam {lam} and q {q}: they must be [..., r, out], [..., r] and "
            "[..., r, in] with the same r and the same leading axes."
        )
