"""The best of all triplets: which scores survive a budget, exactly, without sorting them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adalora_jax._src.core.pytree import PyTree

Limits = Sequence[tuple[ArrayLike, ArrayLike]]  # (least, most) for the matrices of each leaf


def keep_best(
    scores: PyTree,
    count: ArrayLike,
    limits: Limits | None = None,
    costs: Sequence[ArrayLike] | None = None,
) -> PyTree:
    """Masks that keep exactly the ``count`` highest scores over all leaves together.

    Ties are broken by position: earlier leaves, then earlier rows. NaN ranks below every number.

    With ``limits``, every matrix (row of a leaf) keeps its ``least`` best scores first; what is
    left of ``count`` goes to the highest of the others, at most ``most`` in a matrix. No other
    masks within the limits keep a higher sum. If the limits leave no room for ``count``, the
    number nearest to it that they allow is kept.

    With ``costs``, it is the most of them that ``count`` pays for, from the highest down: up to the
    first that is too dear, also where a cheaper one behind it would fit.

    Args:
      scores: a tree of arrays of any shapes.
      count: how many to keep; may be traced.
      limits: ``(least, most)`` for the matrices of each leaf, in the order of the leaves.
      costs: of each score of a leaf, in the order of the leaves; positive integers. What all scores
        cost is below 2³¹.

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
    entries = [entry(leaf.astype(dtype), *rest) for leaf, *rest in rows]
    return treedef.unflatten(kept(entries, cut(in_a_row(entries), count)))


class Entry(NamedTuple):
    """The scores of one leaf as they take part, on every device; or of several, in a row.

    A turn is 0 for the scores of a matrix that are kept first, 1 for those that compete for what
    is left, and 2 for those that are never kept. Where all compete it is None, and so is the cost
    where it is 1.
    """

    keys: jax.Array  # unsigned integers in the order of the scores
    turns: jax.Array | None
    cost: jax.Array | None  # of each of the scores


class Cut(NamedTuple):
    """What a score needs to survive: more than ``lowest``, or being of the first that equal it."""

    lowest: jax.Array  # a key
    left: jax.Array  # what those that equal it may cost
    all_equal: jax.Array  # whether that is enough for all of them


def entry(
    scores: jax.Array,
    limits: tuple[ArrayLike, ArrayLike] | None = None,
    alive: jax.Array | None = None,
    cost: ArrayLike | None = None,
) -> Entry:
    """The scores of one leaf, with what is known of its matrices.

    Args:
      scores: of one dtype in all leaves that are ranked together.
      limits: the least and the most that a matrix keeps.
      alive: False where a score is never kept.
      cost: of each of the scores.

    >>> entry(jnp.array([2.0, 3.0, 4.0]), (1, 2)).turns
    Array([2, 1, 0], dtype=int32)
    """
    scores, turns = _everywhere(scores), None
    if limits is not None or alive is not None:
        fit = jnp.ones_like(scores, bool) if alive is None else _everywhere(alive)
        turns = _turn(scores, fit, *(limits or (0, scores.shape[-1])))
    price = None if cost is None else jnp.full(scores.shape, cost, jnp.int32)
    return Entry(_ascending(scores), turns, price)


def in_a_row(entries: Sequence[Entry]) -> Entry:
    """All of them in one row.

    >>> in_a_row([entry(jnp.array([2, 3])), entry(jnp.array([0]))]).keys - jnp.uint32(2**31)
    Array([2, 3, 0], dtype=uint32)
    """
    flat = lambda parts: jnp.concatenate([part.ravel() for part in parts])
    fields: Any = (None if parts[0] is None else flat(parts) for parts in zip(*entries))
    return Entry(*fields)


def cut(row: Entry, count: ArrayLike) -> Cut:
    """Where to cut so that ``count`` survive, or all that may if there are fewer.

    The lowest key that survives is found bit by bit, from the highest down: a bit belongs to it if
    enough keys are as high with that bit set. That is 32 sums over the row, whatever its length,
    and needs neither a sort nor the scatter that turns its order into a mask.

    >>> cut(Entry(jnp.array([1, 5, 5, 5], jnp.uint32), None, None), 2)[:2]
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
    return Cut(lowest, left, jnp.asarray(left >= total(among & (keys == lowest))))


def _total(entry: Entry, mask: jax.Array) -> jax.Array:
    """What those in a mask cost."""
    price = mask if entry.cost is None else jnp.where(mask, entry.cost, 0)
    return jnp.sum(price, dtype=jnp.int32)


def kept(entries: Sequence[Entry], cut: Cut) -> list[jax.Array]:
    """The masks of all leaves. Equal scores at the cut are rare, and are only then counted.

    >>> entries = [entry(jnp.array([2, 3])), entry(jnp.array([2, 2]))]
    >>> kept(entries, Cut(jnp.uint32(2 + 2**31), jnp.int32(2), jnp.bool(False)))
    [Array([ True,  True], dtype=bool), Array([ True, False], dtype=bool)]
    """

    def in_order():
        left, masks = cut.left, []
        for one in entries:
            mask, left = _first(one, cut.lowest, left)
            masks.append(mask)
        return masks

    at_once = lambda: [_from(one, cut.lowest) for one in entries]
    masks = jax.lax.cond(cut.all_equal, at_once, in_order)
    # Or how a mask is to lie would spread to the scores, and they would have to be sent twice.
    return [_everywhere(mask) for mask in masks]


# Jitted, so that leaves of one shape are traced once; and the same program for each of them,
# without its place in a row, so that they are compiled once.


@jax.jit
def _from(entry, lowest):
    return _by_turn(entry, entry.keys >= lowest)


@jax.jit
def _first(entry, lowest, left):
    """The mask where ``left`` pays for keys that equal the lowest, and what then is left."""
    above, tied = entry.keys > lowest, _by_turn(entry, entry.keys == lowest, first=False)

    def count():
        price = tied if entry.cost is None else jnp.where(tied, entry.cost, 0)
        spent = jnp.cumsum(price.ravel(), dtype=jnp.int32).reshape(tied.shape)
        after = jnp.maximum(left - _total(entry, tied), 0)
        return _by_turn(entry, above | (tied & (spent <= left))), after

    # A branch, or XLA would put what was left before each leaf into the program of the leaf.
    return jax.lax.cond(left > 0, count, lambda: (_by_turn(entry, above), jnp.zeros_like(left)))


def _by_turn(entry, mask, first=True):
    if entry.turns is None:
        return mask
    mask = (entry.turns == 1) & mask
    return mask | (entry.turns == 0) if first else mask


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


def _turn(scores: jax.Array, alive: jax.Array, least: ArrayLike, most: ArrayLike) -> jax.Array:
    order = jnp.lexsort((-scores, ~alive), axis=-1)
    place = jnp.argsort(order, axis=-1)  # the inverse permutation: each score's place in its row
    least = jnp.minimum(least, most)
    turn = (place >= least).astype(jnp.int32) + (place >= most).astype(jnp.int32)
    return jnp.where(alive, turn, 2)


def _everywhere(scores: jax.Array) -> jax.Array:
    """The scores on every device, in one row of their own.

    Adapters may be sharded differently. Explicit mesh axes want one sharding for what is
    concatenated; automatic ones would spread the sharding of one adapter to the others, which
    indexing with an array does not.
    """
    mesh = jax.typeof(scores).sharding.mesh
    if mesh.are_all_axes_explicit:
        everywhere = jax.sharding.PartitionSpec(*[None] * scores.ndim)
        scores = jax.sharding.reshard(scores, jax.sharding.NamedSharding(mesh, everywhere))
    return scores.ravel()[jnp.arange(scores.size)].reshape(scores.shape)
