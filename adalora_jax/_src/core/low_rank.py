"""The low-rank product ``((x qᵀ) · c) p`` with a custom derivative, and its dropout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import PrecisionLike
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Inexact, Shaped, UInt32

Weights = TypeVar("Weights")
Output = TypeVar("Output")
Spec: TypeAlias = Iterable[str | tuple[str, ...] | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def low_rank(
    x: Inexact[Array, "*tokens in"],
    p: Inexact[Array, "r out"],
    c: Inexact[Array, " r"],
    q: Inexact[Array, "r in"],
    seed: UInt32[Array, "2"] | None = None,
    rate: float = 0.0,
    precision: PrecisionLike = None,
) -> Inexact[Array, "*tokens out"]:
    """Compute ``y = ((x qᵀ) · c) p``, the product with a rank-r matrix in SVD form.

    In JAX's own derivative, the weight gradients are products with the large operand, the
    activations, on the left, and XLA's CPU back end then transposes it. This derivative always has
    the small ``[tokens, r]`` operand on the left::

        gc = g pᵀ,  m = hᵀ g,  dp = c · m,  dc = Σ_out p · m,  dq = (gc · c)ᵀ x,  dx = (gc · c) q

    with ``h = x qᵀ``. The activations stored for it are x and h. With a seed, ``x · keep`` replaces
    x, where ``keep`` is the mask of zeros and ones from :func:`dropout_mask`; the derivative
    recomputes the mask. Sums over tokens are accumulated in at least float32, because sums in
    bfloat16 stall. Forward-mode differentiation is not defined; use :func:`low_rank_autodiff` for
    it.

    Args:
      x: layer inputs ``[..., in]``; their dtype is that of the computation and of the result.
      p: ``[r, out]``, any float dtype.
      c: scaled singular values ``[r]``, any float dtype.
      q: ``[r, in]``, any float dtype.
      seed: ``[2]`` uint32 for dropout of x; None for no dropout. The factor ``1 / (1 - rate)`` is
        not applied: multiply c by it.
      rate: dropout probability in [0, 1); static.
      precision: as in ``jax.lax.dot_general``; static.

    Returns:
      ``[..., out]`` in the dtype of x.

    >>> import jax, jax.numpy as jnp
    >>> x, p, q = jnp.ones((5, 3)), jnp.ones((2, 4)), jnp.ones((2, 3))
    >>> low_rank(x, p, jnp.array([1.0, 0.5]), q)[0]
    Array([4.5, 4.5, 4.5, 4.5], dtype=float32)
    """
    return _forward(x, p, c, q, seed, rate, precision)[0]


def low_rank_autodiff(
    x: Inexact[Array, "*tokens in"],
    p: Inexact[Array, "r out"],
    c: Inexact[Array, " r"],
    q: Inexact[Array, "r in"],
    seed: UInt32[Array, "2"] | None = None,
    rate: float = 0.0,
    precision: PrecisionLike = None,
) -> Inexact[Array, "*tokens out"]:
    """Compute :func:`low_rank` with JAX's own derivative, for ``jax.jvp`` and ``jax.hessian``.

    ``AdaLoraConfig(forward_mode=True)`` selects it for all layers of a model.

    >>> import jax, jax.numpy as jnp
    >>> x, p, c, q = jnp.ones((5, 3)), jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3))
    >>> jax.jvp(lambda c: low_rank_autodiff(x, p, c, q), (c,), (c,))[1].shape
    (5, 4)
    """
    return _forward(x, p, c, q, seed, rate, precision)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def linear_with_dropout(
    function: Callable[[Array, Weights], Output],
    x: Inexact[Array, "..."],
    weights: Weights,
    seed: UInt32[Array, "2"] | None,
    rate: float,
) -> Output:
    """Compute ``function(x · keep, weights)``, storing x for the derivative and not ``x · keep``.

    It serves layers whose adapter output is not computed by :func:`low_rank`. The function must be
    linear in each of its arguments; otherwise the derivative repeats its computation.

    >>> import jax, jax.numpy as jnp
    >>> x, seed = jnp.ones(4), jnp.zeros(2, jnp.uint32)
    >>> linear_with_dropout(lambda x, w: x * w, x, 2 * x, seed, 0.0)
    Array([2., 2., 2., 2.], dtype=float32)
    """
    return function(apply_dropout(x, seed, rate), weights)


def apply_dropout(
    x: Inexact[Array, "*axes"], seed: UInt32[Array, "2"] | None, rate: float
) -> Inexact[Array, "*axes"]:
    """Return x with 0 where the mask from :func:`dropout_mask` is False; x itself without a seed.

    >>> apply_dropout(jnp.ones(3), None, 0.5)
    Array([1., 1., 1.], dtype=float32)
    """
    if seed is None:
        return x
    kept = dropout_mask(seed, x.shape, rate)
    return jnp.where(reshard(kept, x), x, jnp.zeros((), x.dtype))


def dropout_mask(seed: UInt32[Array, "2"], shape: Sequence[int], rate: float) -> Bool[Array, "..."]:
    """Return booleans that are False with probability ``rate``, each a hash of its index.

    Every index is hashed into 32 bits, one axis after the other. That takes 4 % of the time of
    ``jax.random.bernoulli`` on a CPU and is fused into its consumer, so computing the mask twice is
    cheaper than storing it. Sharded arrays get the same values as unsharded ones. The hash function
    is Wellons's `lowbias32 <https://nullprogram.com/blog/2018/07/31/>`_, of the family of
    MurmurHash3's finalizer. It is meant for dropout only; use ``jax.random`` for anything else.

    Args:
      seed: ``[2]`` uint32, any two numbers, such as ``jax.random.key_data(key)``.
      shape: shape of the result.
      rate: probability of False, in [0, 1).

    >>> kept = dropout_mask(jnp.array([1, 2], jnp.uint32), (100, 100), 0.25)
    >>> 0.73 < float(kept.mean()) < 0.77
    True
    """
    bits = seed[0]
    for axis in range(len(shape)):
        extent = [size if axis == other else 1 for other, size in enumerate(shape)]
        index = (lax.broadcasted_iota(jnp.uint32, extent, axis) + 1) * jnp.uint32(0x9E3779B9)
        bits = bits ^ seed[1] if axis == len(shape) - 1 else bits
        bits = _mixed(jnp.broadcast_to(bits, jnp.broadcast_shapes(jnp.shape(bits), extent)) ^ index)
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mixed(bits: UInt32[Array, "*axes"]) -> UInt32[Array, "*axes"]:
    """Permute the 32-bit integers so that every input bit affects every output bit."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def opaque_false(after: Shaped[Array, "..."]) -> Bool[Array, ""]:
    """Return False, computed from a float array such that XLA cannot fold it to a constant.

    A computation that uses the result runs after the array is available and is not merged with an
    equal computation earlier in the program. An ``optimization_barrier`` has the same purpose, but
    on a CPU XLA removes it before it merges common subexpressions and schedules. Other platforms
    use the barrier, because reading one element of a sharded array needs communication. So do
    arrays with an explicit sharding, of which JAX does not slice one element.

    >>> opaque_false(jnp.ones(3))
    Array(False, dtype=bool)
    """

    def on_cpu(array: Shaped[Array, "..."]) -> Bool[Array, ""]:
        element = array[(0,) * array.ndim]
        return (element != element) & (element == element)

    def elsewhere(array: Shaped[Array, "..."]) -> Bool[Array, ""]:
        false, _ = lax.optimization_barrier((jnp.zeros((), bool), array))
        return false

    if explicit_mesh(after) is not None:
        return elsewhere(after)
    return lax.platform_dependent(after, cpu=on_cpu, default=elsewhere)


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype to accumulate in: ``dtype``, but at least float32.

    >>> accumulation_dtype(jnp.bfloat16), accumulation_dtype(jnp.float64)
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def explicit_mesh(array: Shaped[Array, "..."]) -> AbstractMesh | None:
    """Return the mesh that is part of an array's type if some of its axes are explicit.

    >>> explicit_mesh(jnp.ones(3)) is None
    True
    """
    mesh = jax.typeof(array).sharding.mesh
    return mesh if mesh.explicit_axes else None


def spec_of_type(array: Shaped[Array, "..."]) -> tuple[str | tuple[str, ...] | None, ...]:
    """Return the explicit axes over which an array is sharded, one entry for each of its axes.

    >>> spec_of_type(jnp.ones((2, 3)))
    (None, None)
    """
    spec = jax.typeof(array).sharding.spec
    return *spec, *[None] * (array.ndim - len(spec))


def explicit_sharding(like: Shaped[Array, "..."], spec: Spec) -> NamedSharding | None:
    """Return the ``out_sharding`` of a product on a mesh with explicit axes; None on other meshes.

    >>> explicit_sharding(jnp.ones((2, 3)), ("data", None)) is None
    True
    """
    mesh = explicit_mesh(like)
    if mesh is None:
        return None
    used, kept = set(), []
    for entry in spec:  # a mesh axis may shard only one array axis: the first one wins
        names = set(entry if isinstance(entry, tuple) else (entry,)) - {None}
        kept.append(None if names & used else entry)
        used |= names
    return NamedSharding(mesh, PartitionSpec(*kept))


def reshard(
    array: Shaped[Array, "*shape"], like: Shaped[Array, "..."], spec: Spec | None = None
) -> Shaped[Array, "*shape"]:
    """Return an array with a spec on the explicit axes of another array's mesh.

    Args:
      array: any array.
      like: the other array.
      spec: the spec; None for that of ``like``.

    >>> reshard(jnp.zeros(2), jnp.ones(2))
    Array([0., 0.], dtype=float32)
    """
    sharding = explicit_sharding(like, spec_of_type(like) if spec is None else spec)
    return array if sharding is None else jax.sharding.reshard(array, sharding)


def _forward(
    x: Inexact[Array, "*tokens in"],
    p: Inexact[Array, "r out"],
    c: Inexact[Array, " r"],
    q: Inexact[Array, "r in"],
    seed: UInt32[Array, "2"] | None,
    rate: float,
    precision: PrecisionLike,
) -> tuple[Inexact[Array, "*tokens out"], tuple[Array | None, ...]]:
    dtype = accumulation_dtype(x.dtype)

    def at(of: tuple[str | tuple[str, ...] | None, ...]) -> NamedSharding | None:
        return explicit_sharding(x, (*spec_of_type(x)[:-1], *of))

    seen = apply_dropout(x, seed, rate)
    h = _contract(seen, q.astype(x.dtype), x.ndim - 1, 1, precision, dtype, at(spec_of_type(q)[:1]))
    scaled = (h * _row(c, h)).astype(x.dtype)
    at_y = at(spec_of_type(p)[1:])
    y = _contract(scaled, p.astype(x.dtype), x.ndim - 1, 0, precision, x.dtype, at_y)
    return y, (x, p, c, q, seed, h)


def _backward(
    rate: float,
    precision: PrecisionLike,
    residuals: tuple[Any, ...],
    g: Inexact[Array, "*tokens out"],
) -> tuple[Array | None, ...]:
    x, p, c, q, seed, h = residuals
    dtype, last, tokens = h.dtype, x.ndim - 1, tuple(range(x.ndim - 1))

    def at(like: Shaped[Array, "..."]) -> NamedSharding | None:
        return explicit_sharding(like, spec_of_type(like))

    seed = _recompute_seed(seed, g)
    gc = _contract(g, p.astype(g.dtype), last, 1, precision, dtype, at(h))
    dh = (gc * _row(c, h)).astype(x.dtype)
    # dp and dc share hᵀ g, so dc is a sum along rows of length out, not down columns of tokens.
    m = _contract(h.astype(x.dtype), g, tokens, tokens, precision, dtype, at(p))
    dp = m * c.astype(dtype)[:, None]
    dc = jnp.sum(m * p.astype(dtype), axis=1)
    dq = _contract(dh, apply_dropout(x, seed, rate), tokens, tokens, precision, dtype, at(q))
    dx = _contract(dh, q.astype(x.dtype), last, 0, precision, x.dtype, at(x))
    dx = apply_dropout(dx, seed, rate)
    cotangents = dx, dp.astype(p.dtype), dc.astype(c.dtype), dq.astype(q.dtype)
    return *map(_as_varying_as, cotangents, (x, p, c, q)), None


low_rank.defvjp(_forward, _backward)


def _linear_with_dropout_forward(
    function: Callable[[Array, Weights], Output],
    x: Inexact[Array, "..."],
    weights: Weights,
    seed: UInt32[Array, "2"] | None,
    rate: float,
) -> tuple[Output, tuple[Array, Weights, Array | None]]:
    return function(apply_dropout(x, seed, rate), weights), (x, weights, seed)


def _linear_with_dropout_backward(
    function: Callable[[Array, Weights], Output],
    rate: float,
    residuals: tuple[Array, Weights, Array | None],
    g: Inexact[Array, "..."],
) -> tuple[Array, Weights, None]:
    x, weights, seed = residuals
    seed = _recompute_seed(seed, g)
    _, pull = jax.vjp(
        lambda x, weights: function(apply_dropout(x, seed, rate), weights), x, weights
    )
    return *pull(g), None


linear_with_dropout.defvjp(_linear_with_dropout_forward, _linear_with_dropout_backward)


def _recompute_seed(
    seed: UInt32[Array, "2"] | None, g: Inexact[Array, "..."]
) -> UInt32[Array, "2"] | None:
    """Return the seed made dependent on g, so that the mask is recomputed instead of stored."""
    return None if seed is None or g.size == 0 else seed ^ opaque_false(g).astype(seed.dtype)


def _as_varying_as(
    cotangent: Inexact[Array, "*axes"], primal: Inexact[Array, "*axes"]
) -> Inexact[Array, "*axes"]:
    """Return the cotangent summed over the mesh axes on which it varies but the primal does not.

    Under ``jax.shard_map(check_vma=True)`` the transposes of JAX's own products do the same.
    """
    extra = _varying(cotangent) - _varying(primal)
    # All processes must compile the same program, but a set's order differs between them.
    axes = tuple(name for name in jax.typeof(cotangent).sharding.mesh.axis_names if name in extra)
    return lax.psum(cotangent, axes) if axes else cotangent


def _varying(array: Shaped[Array, "..."]) -> frozenset[str]:
    """Return the mesh axes on which an array varies inside a ``shard_map``."""
    kind = getattr(jax.typeof(array), "manual_axis_type", None)
    return frozenset(kind.varying if kind is not None else ())


def _row(c: Inexact[Array, " r"], like: Inexact[Array, "*tokens r"]) -> Inexact[Array, "... r"]:
    """Return ``c [r]`` as ``[1, ..., r]``, in the dtype of ``like [..., r]``."""
    return jnp.expand_dims(c.astype(like.dtype), range(like.ndim - 1))


def _contract(
    a: Inexact[Array, "..."],
    b: Inexact[Array, "..."],
    a_axes: int | tuple[int, ...],
    b_axes: int | tuple[int, ...],
    precision: PrecisionLike,
    dtype: jnp.dtype,
    out_sharding: NamedSharding | None,
) -> Inexact[Array, "..."]:
    """Compute ``dot_general`` over the given axes, without batch axes."""

    def as_tuple(axes: int | tuple[int, ...]) -> tuple[int, ...]:
        return axes if isinstance(axes, tuple) else (axes,)

    return lax.dot_general(
        a,
        b,
        ((as_tuple(a_axes), as_tuple(b_axes)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )
