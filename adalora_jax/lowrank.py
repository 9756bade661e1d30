"""The one hot operation: ``((x qᵀ) · c) p`` with its own derivative."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def low_rank(
    x: jax.Array, p: jax.Array, c: jax.Array, q: jax.Array, precision: Any = None
) -> jax.Array:
    """``y = ((x qᵀ) · c) p``, the product with a rank-r matrix in SVD form.

    Autodiff's weight gradients put the large operand, the activations, on the left of their
    products, and XLA's CPU back end then transposes it. The derivative here always puts the small
    ``[tokens, r]`` operand on the left::

        gc = g pᵀ,  dp = (h · c)ᵀ g,  dc = Σ_tokens h · gc,  dq = (gc · c)ᵀ x,  dx = (gc · c) q

    with ``h = x qᵀ``. What is kept for it is x and h. Sums over tokens are accumulated in at
    least float32, because sums in bfloat16 stall. Forward-mode differentiation is not defined;
    :func:`low_rank_plain` has it.

    Args:
      x: ``[..., in]``; its dtype is the dtype of the computation and of the result.
      p: ``[r, out]``. c: ``[r]``. q: ``[r, in]``; any float dtypes.
      precision: as in ``jax.lax.dot_general``.

    Returns:
      ``[..., out]`` in the dtype of x.

    >>> import jax, jax.numpy as jnp
    >>> x, p, q = jnp.ones((5, 3)), jnp.ones((2, 4)), jnp.ones((2, 3))
    >>> low_rank(x, p, jnp.array([1.0, 0.5]), q)[0]
    Array([4.5, 4.5, 4.5, 4.5], dtype=float32)
    """
    return _forward(x, p, c, q, precision)[0]


def low_rank_plain(
    x: jax.Array, p: jax.Array, c: jax.Array, q: jax.Array, precision: Any = None
) -> jax.Array:
    """:func:`low_rank` left to JAX to differentiate, for forward mode (``jax.jvp``, ``hessian``).

    >>> import jax, jax.numpy as jnp
    >>> x, p, c, q = jnp.ones((5, 3)), jnp.ones((2, 4)), jnp.ones(2), jnp.ones((2, 3))
    >>> jax.jvp(lambda c: low_rank_plain(x, p, c, q), (c,), (c,))[1].shape
    (5, 4)
    """
    return _forward(x, p, c, q, precision)[0]


def wide(dtype: Any) -> Any:
    """The dtype to accumulate in: ``dtype``, but at least float32.

    >>> wide(jnp.bfloat16), wide(jnp.float64)
    (dtype('float32'), dtype('float64'))
    """
    dtype = jnp.dtype(dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def explicit_sharding(like: jax.Array, spec: Iterable[Any]) -> NamedSharding | None:
    """What to tell JAX of a product's sharding where mesh axes are explicit; None where not.

    >>> explicit_sharding(jnp.ones((2, 3)), ("data", None)) is None
    True
    """
    mesh = jax.typeof(like).sharding.mesh
    if not mesh.axis_names or not mesh.are_all_axes_explicit:
        return None
    used, kept = set(), []
    for entry in spec:  # a mesh axis splits one axis only: the first that it can
        names = set(entry if isinstance(entry, tuple) else (entry,)) - {None}
        kept.append(None if names & used else entry)
        used |= names
    return NamedSharding(mesh, PartitionSpec(*kept))


def _forward(x, p, c, q, precision):
    dtype = wide(x.dtype)
    at = lambda of: explicit_sharding(x, (*_spec(x)[:-1], *of))
    h = _contract(x, q.astype(x.dtype), x.ndim - 1, 1, precision, dtype, at(_spec(q)[:1]))
    scaled = (h * _row(c, h)).astype(x.dtype)
    at_y = at(_spec(p)[1:])
    y = _contract(scaled, p.astype(x.dtype), x.ndim - 1, 0, precision, x.dtype, at_y)
    return y, (x, p, c, q, h)


def _backward(precision, residuals, g):
    x, p, c, q, h = residuals
    dtype, last, tokens = h.dtype, x.ndim - 1, tuple(range(x.ndim - 1))
    at = lambda like: explicit_sharding(like, _spec(like))
    gc = _contract(g, p.astype(g.dtype), last, 1, precision, dtype, at(h))
    scaled = (h * _row(c, h)).astype(x.dtype)
    dh = (gc * _row(c, h)).astype(x.dtype)
    dp = _contract(scaled, g, tokens, tokens, precision, dtype, at(p))
    dc = jnp.sum(h * gc, axis=tokens)
    dq = _contract(dh, x, tokens, tokens, precision, dtype, at(q))
    dx = _contract(dh, q.astype(x.dtype), last, 0, precision, x.dtype, at(x))
    return dx, dp.astype(p.dtype), dc.astype(c.dtype), dq.astype(q.dtype)


low_rank.defvjp(_forward, _backward)


def _row(c, like):
    """``c [r]`` as ``[1, ..., r]``, in the dtype of ``like [..., r]``."""
    return jnp.expand_dims(c.astype(like.dtype), range(like.ndim - 1))


def _spec(array):
    return tuple(jax.typeof(array).sharding.spec)


def _contract(a, b, a_axes, b_axes, precision, dtype, out_sharding):
    """``dot_general`` over the named axes, without batch axes."""
    as_tuple = lambda axes: axes if isinstance(axes, tuple) else (axes,)
    return lax.dot_general(
        a,
        b,
        ((as_tuple(a_axes), as_tuple(b_axes)), ((), ())),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=out_sharding,
    )
