"""Exact top-b selection of triplets over all adapters, without sorting."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Int, Int32, Shaped, UInt

from adalora_jax._src.core import explicit_axes

Limits = Sequence[tuple[ArrayLike, ArrayLike]]  # (least, most) per matrix, for each leaf


def keep_best(
    scores: Any,
    count: ArrayLike,
    limits: Limits | None = None,
    costs: Sequence[ArrayLike] | None = None,
) -> Any:
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
    row = concatenate([rank_scores(leaf.astype(dtype), *rest) for leaf, *rest in rows])
    mask = apply_threshold(row, find_threshold(row, count))
    ends = itertools.accumulate(leaf.size for leaf in leaves)
    spans = [mask[end - leaf.size : end] for end, leaf in zip(ends, leaves)]
    return treedef.unflatten([span.reshape(leaf.shape) for span, leaf in zip(spans, leaves)])


class RankedScores(NamedTuple):
    """Replicated sort keys of one leaf, or of several leaves concatenated.

    Attributes:
      keys: unsigned integers in the order of the scores.
      tiers: int32 per score: 0 for the scores that a matrix keeps first, 1 for those that compete
        for the remainder, 2 for those that are never kept; None if all compete.
      cost: int32 cost per score; None if it is 1.
    """

    keys: UInt[Array, "*shape"]
    tiers: Int32[Array, "*shape"] | None
    cost: Int32[Array, "*shape"] | None


class Threshold(NamedTuple):
    """The threshold of a selection: keys above ``lowest`` are kept, and the first ties with it.

    Attributes:
      lowest: the lowest key that is kept, a scalar in the dtype of the keys.
      ties: int32 scalar: of the keys equal to ``lowest``, those before this position are kept.
    """

    lowest: UInt[Array, ""]
    ties: Int32[Array, ""]


def rank_scores(
    scores: Shaped[Array, "*stack r"],
    limits: tuple[ArrayLike, ArrayLike] | None = None,
    eligible: Bool[Array, "*stack r"] | None = None,
    cost: ArrayLike | None = None,
) -> RankedScores:
    """Return the :class:`RankedScores` of one leaf.

    Args:
      scores: ``[..., r]``; leaves that are ranked together have one dtype.
      limits: minimum and maximum number of scores to keep per matrix.
      eligible: booleans ``[..., r]``: False for a score that is never kept.
      cost: cost per score.

    >>> rank_scores(jnp.array([2.0, 3.0, 4.0]), (1, 2)).tiers
    Array([2, 1, 0], dtype=int32)
    """
    scores, tiers = replicate(scores), None
    if limits is not None or eligible is not None:
        fit = jnp.ones_like(scores, bool) if eligible is None else replicate(eligible)
        tiers = _assign_tiers(scores, fit, *(limits or (0, scores.shape[-1])))
    costs = None if cost is None else jnp.full(scores.shape, cost, jnp.int32)
    return RankedScores(_order_preserving_bits(scores), tiers, costs)


def concatenate(entries: Sequence[RankedScores]) -> RankedScores:
    """Concatenate entries into one, with flat arrays.

    >>> entries = [rank_scores(jnp.array([2, 3])), rank_scores(jnp.array([0]))]
    >>> concatenate(entries).keys - jnp.uint32(2**31)
    Array([2, 3, 0], dtype=uint32)
    """

    def flat(parts: Sequence[Shaped[Array, "..."]]) -> Shaped[Array, " n"]:
        return jnp.concatenate([part.ravel() for part in parts])

    fields: Any = (None if parts[0] is None else flat(parts) for parts in zip(*entries))
    return RankedScores(*fields)


def find_threshold(
    row: RankedScores, count: ArrayLike, positions: ArrayLike | None = None
) -> Threshold:
    """Find the threshold that keeps ``count`` scores, or all eligible ones if there are fewer.

    The lowest kept key is found bit by bit, from the highest bit down: a bit is set if enough keys
    are at least as high with it set. That takes one sum over the row per bit of a key (32 for
    float32), and needs neither a sort nor the scatter that turns a sort order into a mask. The
    position up to which ties are kept is found likewise.

    Args:
      row: all scores that are ranked together.
      count: number of scores to keep, or their total cost.
      positions: int32 positions by which ties are broken, lowest first; by default those in
        the row.

    >>> find_threshold(RankedScores(jnp.array([1, 5, 5, 5], jnp.uint32), None, None), 2)
    Threshold(lowest=Array(5, dtype=uint32), ties=Array(3, dtype=int32))
    """
    keys, tiers, _ = row
    among = jnp.ones_like(keys, bool) if tiers is None else tiers == 1
    total = functools.partial(_total, row)
    if tiers is not None:
        count = count - total(tiers == 0)
    lowest = _largest_with(
        lambda key: total(among & (keys >= key)) >= count, keys.dtype, 8 * keys.dtype.itemsize
    )
    remainder = count - total(among & (keys > lowest))
    tied, positions = among & (keys == lowest), _positions(keys, positions)
    ties = _largest_with(
        lambda position: total(tied & (positions < position)) <= remainder,
        jnp.int32,
        keys.size.bit_length(),
    )
    return Threshold(lowest, ties)


def _largest_with(
    holds: Callable[[Array], Bool[Array, ""]], dtype: DTypeLike, width: int
) -> Shaped[Array, ""]:
    """Return the largest integer of ``width`` bits for which a monotonic condition holds.

    The condition holds for every integer up to that one; if it does not hold for 0, 0 is returned.
    """

    def set_bit(place: Int[Array, ""] | int, found: Shaped[Array, ""]) -> Shaped[Array, ""]:
        shift = jnp.asarray(width - 1 - place, dtype)  # an int where jit is disabled
        candidate = found | jax.lax.shift_left(jnp.ones((), dtype), shift)
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, width, set_bit, jnp.zeros((), dtype))


def _positions(keys: UInt[Array, " n"], positions: ArrayLike | None) -> Int32[Array, " n"]:
    if positions is None:
        return jnp.arange(keys.size, dtype=jnp.int32)
    return jnp.asarray(positions)


def _total(entry: RankedScores, mask: Bool[Array, "..."]) -> Int32[Array, ""]:
    """Return the total cost of the scores in a mask."""
    costs = mask if entry.cost is None else jnp.where(mask, entry.cost, 0)
    return jnp.sum(costs, dtype=jnp.int32)


def apply_threshold(
    row: RankedScores, threshold: Threshold, positions: ArrayLike | None = None
) -> Bool[Array, " n"]:
    """Return the mask of a row: True for keys above the threshold and for its first ties.

    Args:
      row, positions: as in :func:`find_threshold`.
      threshold: its result.

    >>> row = rank_scores(jnp.array([2, 3, 2, 2]))
    >>> apply_threshold(row, Threshold(jnp.uint32(2 + 2**31), jnp.int32(2)))
    Array([ True,  True, False, False], dtype=bool)
    """
    first = _positions(row.keys, positions) < threshold.ties
    mask = (row.keys > threshold.lowest) | ((row.keys == threshold.lowest) & first)
    if row.tiers is not None:
        mask = (row.tiers == 0) | ((row.tiers == 1) & mask)
    return mask


def _order_preserving_bits(scores: Shaped[Array, "*shape"]) -> UInt[Array, "*shape"]:
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
    scores: Shaped[Array, "*stack r"],
    eligible: Bool[Array, "*stack r"],
    least: ArrayLike,
    most: ArrayLike,
) -> Int32[Array, "*stack r"]:
    order = jnp.lexsort((-scores, ~eligible), axis=-1)
    place = jnp.argsort(order, axis=-1)  # the inverse permutation: positions when sorted
    least = jnp.minimum(least, most)
    turn = (place >= least).astype(jnp.int32) + (place >= most).astype(jnp.int32)
    return jnp.where(eligible, turn, 2)


def replicate(scores: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Return the scores replicated on every device.

    Adapters may have different shardings. With explicit mesh axes, arrays need one sharding to be
    concatenated. With automatic axes, XLA would propagate the sharding of one adapter to the
    others; indexing with an array prevents that.
    """
    return explicit_axes.replicate(scores).ravel()[jnp.arange(scores.size)].reshape(scores.shape)
