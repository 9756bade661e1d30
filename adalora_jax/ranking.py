"""The best of all triplets: which scores survive a budget, exactly, without sorting them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adalora_jax.tree import PyTree

Limits = Sequence[tuple[chex.Numeric, chex.Numeric]]  # (least, most) for the matrices of each leaf


def keep_best(scores: PyTree, count: chex.Numeric, limits: Limits | None = None) -> PyTree:
    """Masks that keep exactly the ``count`` highest scores over all leaves together.

    Ties are broken by position: earlier leaves, then earlier rows. NaN ranks below every number.

    With ``limits``, every matrix (row of a leaf) keeps its ``least`` best scores first; what is
    left of ``count`` goes to the highest of the others, at most ``most`` in a matrix. No other
    masks within the limits keep a higher sum. If the limits leave no room for ``count``, the
    number nearest to it that they allow is kept.

    Args:
      scores: a tree of arrays of any shapes.
      count: how many to keep; may be traced.
      limits: ``(least, most)`` for the matrices of each leaf, in the order of the leaves.

    >>> keep_best({"a": jnp.array([1.0, 3.0]), "b": jnp.array([jnp.nan, 1.0])}, 2)
    {'a': Array([ True,  True], dtype=bool), 'b': Array([False, False], dtype=bool)}
    >>> keep_best({"a": jnp.array([2.0, 3.0]), "b": jnp.array([0.0, 1.0])}, 2, [(0, 2), (1, 2)])
    {'a': Array([False,  True], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    """
    leaves, treedef = jax.tree.flatten(scores)
    return treedef.unflatten(split(kept(*in_a_row(leaves, limits), count), leaves))


def in_a_row(
    leaves: Sequence[jax.Array],
    limits: Limits | None = None,
    alive: Sequence[jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """All scores in one row, on every device, and the turn of each where there are limits.

    A turn is 0 for the scores of a matrix that are kept first, 1 for those that compete for what
    is left, and 2 for those that are never kept. With ``alive``, booleans of the leaves' shapes,
    those that are not alive are never kept.

    >>> in_a_row([jnp.array([2.0, 3.0]), jnp.array([0.0])])
    (Array([2., 3., 0.], dtype=float32), None)
    """
    rows = [_gathered(leaf) for leaf in leaves]
    if limits is None and alive is None:
        return jnp.concatenate(rows), None
    shaped = [row.reshape(leaf.shape) for row, leaf in zip(rows, leaves)]
    fit = [_gathered(leaf).reshape(leaf.shape) for leaf in alive or ()]
    fit = fit or [jnp.ones_like(leaf, bool) for leaf in shaped]
    limits = limits or [(0, leaf.shape[-1]) for leaf in shaped]
    turns = [_turn(leaf, ok, *bounds).ravel() for leaf, ok, bounds in zip(shaped, fit, limits)]
    return jnp.concatenate(rows), jnp.concatenate(turns)


def kept(
    row: jax.Array,
    turn: jax.Array | None,
    count: chex.Numeric,
    costs: jax.Array | None = None,
) -> jax.Array:
    """Which scores of a row are kept, as :func:`keep_best` says; with costs, :func:`highest`.

    >>> kept(jnp.array([2.0, 3.0, 0.0]), None, 1)
    Array([False,  True, False], dtype=bool)
    """
    if turn is None:
        return highest(row, count, jnp.ones_like(row, bool), costs)
    first = turn == 0
    return first | highest(row, count - _total(first, costs), turn == 1, costs)


def _total(mask: jax.Array, costs: jax.Array | None) -> jax.Array:
    """What is in a mask costs together: as many as there are without costs."""
    return jnp.sum(mask if costs is None else jnp.where(mask, costs, 0), dtype=jnp.int32)


def highest(
    row: jax.Array, count: chex.Numeric, among: jax.Array, costs: jax.Array | None = None
) -> jax.Array:
    """Which scores are the ``count`` highest of those ``among``; all of those if there are fewer.

    With ``costs``, the most of them that ``count`` pays for, from the highest down: up to the first
    that is too dear, also where a cheaper one behind it would fit.

    The lowest score that survives is found bit by bit, from the highest down: a bit belongs to it
    if enough scores are as high with that bit set. That is 32 sums over the row, whatever its
    length, and needs neither a sort nor the scatter that turns its order into a mask.

    Args:
      row: ``[n]`` scores.
      count: how many; may be traced.
      among: ``[n]`` booleans.
      costs: ``[n]`` int32, positive, with a sum below 2³¹; one each without them.

    >>> highest(jnp.array([1.0, 5.0, 5.0, 5.0]), 2, jnp.array([True, True, False, True]))
    Array([False,  True, False,  True], dtype=bool)
    """
    keys = _ascending(row)
    width = 8 * keys.dtype.itemsize
    number = functools.partial(_total, costs=costs)

    def settle(place, lowest):
        bit = jax.lax.shift_left(jnp.ones((), keys.dtype), (width - 1 - place).astype(keys.dtype))
        return jnp.where(number(among & (keys >= lowest | bit)) >= count, lowest | bit, lowest)

    lowest = jax.lax.fori_loop(0, width, settle, jnp.zeros((), keys.dtype))
    above, tied = among & (keys > lowest), among & (keys == lowest)
    spent = jnp.cumsum(tied if costs is None else jnp.where(tied, costs, 0), dtype=jnp.int32)
    return above | (tied & (spent <= count - number(above)))


def split(row: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """What :func:`in_a_row` joined, in its pieces again.

    >>> split(jnp.arange(3), [jnp.zeros(2), jnp.zeros(1)])
    [Array([0, 1], dtype=int32), Array([2], dtype=int32)]
    """
    sizes = [math.prod(leaf.shape) for leaf in like]
    ends = np.cumsum(sizes)
    return [
        row[jnp.arange(end - size, end)].reshape(leaf.shape)
        for end, size, leaf in zip(ends, sizes, like)
    ]


def _ascending(scores: jax.Array) -> jax.Array:
    """Unsigned integers in the order of the scores, NaN below all, 0 and −0 the same.

    The bits of positive floats are in their order as they are, those of negative ones in reverse.
    """
    exact = jnp.issubdtype(scores.dtype, jnp.integer) or scores.dtype == bool
    if scores.dtype.itemsize < 4:
        scores = scores.astype(jnp.int32 if exact else jnp.float32)
    bits = jax.lax.bitcast_convert_type(scores, f"uint{8 * scores.dtype.itemsize}")
    if jnp.issubdtype(scores.dtype, jnp.unsignedinteger):
        return bits
    sign = jnp.array(1 << (8 * bits.dtype.itemsize - 1), bits.dtype)
    if exact:
        return bits ^ sign
    bits = jnp.where(scores == 0, jnp.zeros((), bits.dtype), bits)
    bits = jnp.where(bits >= sign, ~bits, bits | sign)
    return jnp.where(jnp.isnan(scores), jnp.zeros((), bits.dtype), bits)


def _turn(
    scores: jax.Array, alive: jax.Array, least: chex.Numeric, most: chex.Numeric
) -> jax.Array:
    order = jnp.lexsort((-scores, ~alive), axis=-1)
    place = jnp.argsort(order, axis=-1)  # the inverse permutation: each score's place in its row
    least = jnp.minimum(least, most)
    turn = (place >= least).astype(jnp.int32) + (place >= most).astype(jnp.int32)
    return jnp.where(alive, turn, 2)


def _gathered(scores: jax.Array) -> jax.Array:
    """The scores in one row, on every device.

    Adapters may be sharded differently. Explicit mesh axes want one sharding for what is
    concatenated; automatic ones would spread the sharding of one adapter to the others, which
    indexing with an array does not.
    """
    mesh = jax.typeof(scores).sharding.mesh
    if mesh.are_all_axes_explicit:
        everywhere = jax.sharding.PartitionSpec(*[None] * scores.ndim)
        scores = jax.sharding.reshard(scores, jax.sharding.NamedSharding(mesh, everywhere))
    return scores.ravel()[jnp.arange(scores.size)]
