"""The adapter of one weight: its three factors and what is computed from them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, Self

import chex
import jax
import jax.numpy as jnp

from adalora_jax.config import AdaLoraConfig
from adalora_jax.layout import Layout
from adalora_jax.lowrank import low_rank, low_rank_plain, observed, wide

_STD = 0.02  # of p and q at the start: PEFT's and loralib's


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

    The sum is over all inputs x of its layer, see :func:`~adalora_jax.lowrank.observed`.
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


def init_adapter(
    key: chex.PRNGKey,
    in_features: int,
    out_features: int,
    config: AdaLoraConfig,
    *,
    rank: int | None = None,
    stack: tuple[int, ...] = (),
) -> Adapter:
    """Return a fresh adapter, whose increment is zero with each of the built-in initial values.

    It is that of a dense ``kernel [*stack, in, out]``; ``adapt`` makes those of other layers.

    ``init="gaussian"``: λ = 0, p and q normal with standard deviation 0.02 (PEFT, loralib).
    ``init="lambda_one"``: λ = 1, p = 0, q as before. ``init="orthonormal"``: λ = 0, p and q with
    orthonormal rows, ``p pᵀ = q qᵀ = I``, drawn evenly from all such; more rows than a row is long
    cannot be that, and of those the columns are orthonormal (the penalty of
    ``orthogonality="squared"`` is smooth there, ``"frobenius"`` has a kink).
    ``init_lora_weights=False`` draws all three from the standard normal, so that the increment is
    not zero (PEFT's switch for tests).

    A function as ``config.init`` is called, once for each matrix of a stack, as
    ``init(key, in_features, out_features, rank, dtype)`` and gives ``(p, lam, q)``. If their
    product is not zero, the adapted model does not start as the base model.

    Args:
      key: a PRNG key.
      in_features, out_features: of the weight.
      config: gives the rank ``init_r``, the init and ``param_dtype``.
      rank: another rank than ``init_r``; the scale stays ``config.scaling``.
      stack: leading axes, for stacked weights.

    Returns:
      An :class:`Adapter` with ``p [*stack, r, out]``, ``lam [*stack, r]``, ``q [*stack, r, in]``.

    Raises:
      ValueError: a size is not positive, or a function gave other shapes.

    >>> import jax
    >>> adapter = init_adapter(jax.random.key(0), 6, 4, AdaLoraConfig(total_step=10, init_r=8))
    >>> [leaf.shape for leaf in adapter]
    [(8, 4), (8,), (8, 6)]
    """
    rank = config.init_r if rank is None else rank
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1.")
    if rank < 0:
        raise ValueError(f"rank={rank} must be at least 0.")
    dtype = jnp.dtype(config.param_dtype)
    if callable(config.init):
        return _own_init(key, in_features, out_features, rank, stack, config)
    shapes = ((*stack, rank, out_features), (*stack, rank), (*stack, rank, in_features))
    p, lam, q = (
        jax.random.normal(k, shape, dtype) for k, shape in zip(jax.random.split(key, 3), shapes)
    )
    if not config.init_lora_weights:
        factors = p, lam, q
    elif config.init == "lambda_one":
        factors = jnp.zeros_like(p), jnp.ones_like(lam), _STD * q
    elif config.init == "orthonormal":
        factors = _orthonormal(p), jnp.zeros_like(lam), _orthonormal(q)
    else:
        factors = _STD * p, jnp.zeros_like(lam), _STD * q
    return Adapter(*factors, scale=config.scaling)


def _own_init(key, in_features, out_features, rank, stack, config):
    """What a function gives, once for each matrix of a stack."""
    dtype = jnp.dtype(config.param_dtype)

    def one(key):
        leaves = [*config.init(key, in_features, out_features, rank, dtype)]
        wanted = [(rank, out_features), (rank,), (rank, in_features)]
        if (shapes := [jnp.shape(leaf) for leaf in leaves]) != wanted:
            raise ValueError(
                f"init={config.init!r} returned the shapes {shapes} for p, lam and q: they must be "
                f"{wanted}."
            )
        return Adapter(*(jnp.asarray(leaf, dtype) for leaf in leaves), scale=config.scaling)

    for _ in stack:
        one = jax.vmap(one)
    return one(keys_of(key, stack))


def _orthonormal(normal: jax.Array) -> jax.Array:
    """The rows of each normal matrix made orthonormal, or its columns where those are shorter."""
    wide_matrix = normal.shape[-2] < normal.shape[-1]
    tall = jnp.swapaxes(normal, -1, -2) if wide_matrix else normal
    q, r = jnp.linalg.qr(tall.astype(wide(normal.dtype)))
    # With the signs that make r's diagonal positive the distribution is even (Mezzadri 2007).
    q = q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]
    return (jnp.swapaxes(q, -1, -2) if wide_matrix else q).astype(normal.dtype)


def increment(
    adapter: Adapter,
    x: jax.Array,
    key: chex.PRNGKey | None = None,
    *,
    scale: chex.Numeric,
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


def seed_of(key: chex.PRNGKey | None) -> jax.Array | None:
    """What :func:`~adalora_jax.lowrank.keep` makes a mask from; None without a key.

    >>> seed_of(jax.random.key(0)).shape
    (2,)
    """
    if key is None:
        return None
    # The words of the key itself: drawing numbers from it would take longer than the mask does.
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return (jax.random.key_data(key) if typed else key).ravel()[:2]


def keys_of(key: chex.PRNGKey | None, stack: tuple[int, ...]) -> jax.Array | None:
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
    dropout_key: chex.PRNGKey | None = None,
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
    >>> adapter = init_adapter(jax.random.key(0), 3, 4, AdaLoraConfig(total_step=10))
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
