"""Exact top-b selection of triplets over all adapters, without sorting."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adalora_jax._src.core.pytree import PyTree

Limits = Sequence[tuple[ArrayLike, ArrayLike]]  # (least, most) per matrix, for each leaf


def keep_best(
    scores: PyTree,
    count: ArrayLike,
    limits: Limits | None = None,
    costs: Sequence[ArrayLike] | None = None,
) -> PyTree:
    """Return masks that keep exactly the ``count`` highest scores of all leaves together.

    Ties are broken by position: earlier leaves, then earlier rows. NaN ranks below every number.

    With ``limits``, every matrix (row of a leaf) first keeps its ``least`` highest scores; the
    remainder of ``count`` goes to the highest other scores, at most ``most`` per matrix in total.
    No other masks within the limits keep a higher sum. If the limits do not allow ``count``, the
    nearest number that they allow is kept.

    With ``costs``, ``count`` is an amount to spend: scores are kept from the highest down until the
    next one would exceed it. Cheaper ones after that are not tried.

    Args:
      scores: a tree of arrays of any shapes.
      count: number of scores to keep, or their total cost; an integer scalar, may be traced.
      limits: ``(least, most)`` per matrix, for each leaf in the order of the leaves.
      costs: cost per score, for each leaf in the order of the leaves; positive integers. The total
        cost of all scores is below 2³¹.

    Returns:
      A tree of booleans in the structure and shapes of ``scores``; True for a kept score.

    >>> keep_best({"a": jnp.array([1.0, 3.0]), "b": jnp.array([jnp.nan, 1.0])}, 2)
    {'a': Array([ True,  True], dtype=bool), 'b': Array([False, False], dtype=bool)}
    >>> keep_best({"a": jnp.array([2.0, 3.0]), "b": jnp.array([0.0, 1.0])}, 2, [(0, 2), (1, 2)])
    {'a': Array([False,  True], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    >>> keep_best({"a": jnp.array([2.0, 3.0]), "b": jnp.array([0.0, 4.0])}, 6, costs=[1, 5])
    {'a': Array([False,  True], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    """
    leaves, treedef = jax.tree.flatten(scores)
    dtype, none = jnp.result_type(*leaves), [None] * len(leaves)
    rows: Any = zip(leaves, limits or none, none, costs or none)
    entries = [rank_scores(leaf.astype(dtype), *rest) for leaf, *rest in rows]
    return treedef.unflatten(apply_threshold(entries, find_threshold(concatenate(entries), count)))


class RankedScores(NamedTuple):
    """Replicated sort keys of one leaf, or of several leaves concatenated.

    Attributes:
      keys: unsigned integers in the order of the scores.
      turns: int32 per score: 0 for the scores that a matrix keeps first, 1 for those that compete
        for the remainder, 2 for those that are never kept; None if all compete.
      cost: int32 cost per score; None if it is 1.
    """

    keys: jax.Array
    turns: jax.Array | None
    cost: jax.Array | None


class Threshold(NamedTuple):
    """The threshold of a selection: keys above ``lowest`` are kept, and the first ties with it.

    Attributes:
      lowest: the lowest key that is kept, a scalar in the dtype of the keys.
      left: int32 scalar: total cost allowed for the keys equal to ``lowest``.
      all_equal: boolean scalar: True if that suffices for all of them.
    """

    lowest: jax.Array
    left: jax.Array
    all_equal: jax.Array


def rank_scores(
    scores: jax.Array,
    limits: tuple[ArrayLike, ArrayLike] | None = None,
    alive: jax.Array | None = None,
    cost: ArrayLike | None = None,
) -> RankedScores:
    """Return the :class:`RankedScores` of one leaf.

    Args:
      scores: ``[..., r]``; leaves that are ranked together have one dtype.
      limits: minimum and maximum number of scores to keep per matrix.
      alive: booleans ``[..., r]``: False for a score that is never kept.
      cost: cost per score.

    >>> rank_scores(jnp.array([2.0, 3.0, 4.0]), (1, 2)).turns
    Array([2, 1, 0], dtype=int32)
    """
    scores, turns = _replicate(scores), None
    if limits is not None or alive is not None:
        fit = jnp.ones_like(scores, bool) if alive is None else _replicate(alive)
        turns = _assign_tiers(scores, fit, *(limits or (0, scores.shape[-1])))
    price = None if cost is None else jnp.full(scores.shape, cost, jnp.int32)
    return RankedScores(_order_preserving_bits(scores), turns, price)


def concatenate(entries: Sequence[RankedScores]) -> RankedScores:
    """Concatenate entries into one, with flat arrays.

    >>> entries = [rank_scores(jnp.array([2, 3])), rank_scores(jnp.array([0]))]
    >>> concatenate(entries).keys - jnp.uint32(2**31)
    Array([2, 3, 0], dtype=uint32)
    """
    flat = lambda parts: jnp.concatenate([part.ravel() for part in parts])
    fields: Any = (None if parts[0] is None else flat(parts) for parts in zip(*entries))
    return RankedScores(*fields)


def find_threshold(row: RankedScores, count: ArrayLike) -> Threshold:
    """Find the threshold that keeps ``count`` scores, or all eligible ones if there are fewer.

    The lowest kept key is found bit by bit, from the highest bit down: a bit is set if enough keys
    are at least as high with it set. That takes one sum over the row per bit of a key (32 for
    float32), and needs neither a sort nor the scatter that turns a sort order into a mask.

    >>> find_threshold(RankedScores(jnp.array([1, 5, 5, 5], jnp.uint32), None, None), 2)[:2]
    (Array(5, dtype=uint32), Array(2, dtype=int32))
    """
    keys, turns, _ = row
    among = jnp.ones_like(keys, bool) if turns is None else turns == 1
    total = functools.partial(_total, row)
    if turns is not None:
        count = count - total(turns == 0)
    width = 8 * keys.dtype.itemsize

    def settle(place, lowest):
        shift = jnp.asarray(width - 1 - place, keys.dtype)  # an int where jit is disabled
        bit = jax.lax.shift_left(jnp.ones((), keys.dtype), shift)
        return jnp.where(total(among & (keys >= lowest | bit)) >= count, lowest | bit, lowest)

    lowest = jax.lax.fori_loop(0, width, settle, jnp.zeros((), keys.dtype))
    left = jnp.asarray(count - total(among & (keys > lowest)))
    return Threshold(lowest, left, jnp.asarray(left >= total(among & (keys == lowest))))


def _total(entry: RankedScores, mask: jax.Array) -> jax.Array:
    """Return the total cost of the scores in a mask."""
    price = mask if entry.cost is None else jnp.where(mask, entry.cost, 0)
    return jnp.sum(price, dtype=jnp.int32)


def apply_threshold(entries: Sequence[RankedScores], cut: Threshold) -> list[jax.Array]:
    """Return the masks of all leaves; ties at the threshold are counted only if some are dropped.

    >>> entries = [rank_scores(jnp.array([2, 3])), rank_scores(jnp.array([2, 2]))]
    >>> apply_threshold(entries, Threshold(jnp.uint32(2 + 2**31), jnp.int32(2), jnp.bool(False)))
    [Array([ True,  True], dtype=bool), Array([ True, False], dtype=bool)]
    """

    def in_order():
        left, masks = cut.left, []
        for one in entries:
            mask, left = _mask_with_ties(one, cut.lowest, left)
            masks.append(mask)
        return masks

    at_once = lambda: [_mask_at_or_above(one, cut.lowest) for one in entries]
    masks = jax.lax.cond(cut.all_equal, at_once, in_order)
    # Otherwise the mask's sharding propagates to the scores and costs a second all-gather.
    return [_replicate(mask) for mask in masks]


# Jitted, so that leaves of one shape are traced once. Their program does not depend on a leaf's
# position, so it is also compiled once.


@jax.jit
def _mask_at_or_above(entry, lowest):
    return _combine_tiers(entry, entry.keys >= lowest)


@jax.jit
def _mask_with_ties(entry, lowest, left):
    """Return the mask if ``left`` may be spent on keys equal to ``lowest``, and the remainder."""
    above, tied = entry.keys > lowest, _combine_tiers(entry, entry.keys == lowest, first=False)

    def count():
        price = tied if entry.cost is None else jnp.where(tied, entry.cost, 0)
        spent = jnp.cumsum(price.ravel(), dtype=jnp.int32).reshape(tied.shape)
        after = jnp.maximum(left - _total(entry, tied), 0)
        return _combine_tiers(entry, above | (tied & (spent <= left))), after

    # Without the branch, XLA would inline the computation of ``left`` into the leaf's program.
    return jax.lax.cond(
        left > 0, count, lambda: (_combine_tiers(entry, above), jnp.zeros_like(left))
    )


def _combine_tiers(entry, mask, first=True):
    if entry.turns is None:
        return mask
    mask = (entry.turns == 1) & mask
    return mask | (entry.turns == 0) if first else mask


def _order_preserving_bits(scores: jax.Array) -> jax.Array:
    """Convert scores to unsigned integers of the same order; NaN is lowest, 0 equals −0.

    The bits of positive floats, read as integers, have the floats' order; those of negative floats
    have the reverse order.
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


def _assign_tiers(
    scores: jax.Array, alive: jax.Array, least: ArrayLike, most: ArrayLike
) -> jax.Array:
    order = jnp.lexsort((-scores, ~alive), axis=-1)
    place = jnp.argsort(order, axis=-1)  # the inverse permutation: positions when sorted
    least = jnp.minimum(least, most)
    turn = (place >= least).astype(jnp.int32) + (place >= most).astype(jnp.int32)
    return jnp.where(alive, turn, 2)


def _replicate(scores: jax.Array) -> jax.Array:
    """Return the scores replicated on every device.

    Adapters may have different shardings. With explicit mesh axes, arrays need one sharding to be
    concatenated. With automatic axes, XLA would propagate the sharding of one adapter to the
    others; indexing with an array prevents that.
    """
    mesh = jax.typeof(scores).sharding.mesh
    if mesh.are_all_axes_explicit:
        everywhere = jax.sharding.PartitionSpec(*[None] * scores.ndim)
        scores = jax.sharding.reshard(scores, jax.sharding.NamedSharding(mesh, everywhere))
    return scores.ravel()[jnp.arange(scores.size)].reshape(scores.shape)
