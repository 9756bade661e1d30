"""The best of all triplets: which scores survive a budget, exactly, without sorting them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

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
    dtype = jnp.result_type(*leaves)
    bounds = limits or [()] * len(leaves)
    entries = [entry(leaf.astype(dtype), *own) for leaf, own in zip(leaves, bounds)]
    return treedef.unflatten(kept(entries, cut(in_a_row(entries), count)))


class Entry(NamedTuple):
    """The scores of one leaf as they take part, on every device.

    A turn is 0 for the scores of a matrix that are kept first, 1 for those that compete for what
    is left, and 2 for those that are never kept. Without limits all compete, and it is None.
    """

    keys: jax.Array  # unsigned integers in the order of the scores
    turns: jax.Array | None
    cost: jax.Array | None  # int32, positive: what each takes of the count; 1 where it is None


class Cut(NamedTuple):
    """What a score needs to survive: more than ``lowest``, or being of the first that equal it."""

    lowest: jax.Array  # a key
    equal: jax.Array  # how many of those that equal it are kept, or for how much
    all_equal: jax.Array  # whether those are all that there are


def entry(
    scores: jax.Array,
    least: chex.Numeric | None = None,
    most: chex.Numeric = 0,
    *,
    alive: jax.Array | None = None,
    cost: chex.Numeric | None = None,
) -> Entry:
    """The scores of one leaf, with the limits of its matrices if there are any.

    All that are ranked together must have one dtype, and costs if any of them has one. With
    ``alive``, booleans in the shape of the scores, those that are not alive are never kept.

    >>> entry(jnp.array([2.0, 3.0, 4.0]), 1, 2).turns
    Array([2, 1, 0], dtype=int32)
    """
    scores, turns = _everywhere(scores), None
    if alive is not None:
        bounds = (0, scores.shape[-1]) if least is None else (least, most)
        turns = _turn(scores, *bounds, _everywhere(alive))
    elif least is not None:
        turns = _turn(scores, least, most)
    return Entry(_ascending(scores), turns, None if cost is None else jnp.asarray(cost, jnp.int32))


def in_a_row(entries: Sequence[Entry]) -> Entry:
    """All keys in one row, with the turn of each where there are limits, and the cost of each.

    >>> in_a_row([entry(jnp.array([2, 3])), entry(jnp.array([0]))])[0] - jnp.uint32(2**31)
    Array([2, 3, 0], dtype=uint32)
    """
    keys, turns, costs = zip(*entries)
    flat = lambda parts: jnp.concatenate([part.ravel() for part in parts])
    if costs[0] is not None:
        costs = [jnp.broadcast_to(cost, key.shape) for cost, key in zip(costs, keys)]
    turns, costs = (None if part[0] is None else flat(part) for part in (turns, costs))
    return Entry(flat(keys), turns, costs)


def cut(row: Entry, count: chex.Numeric) -> Cut:
    """Where to cut so that ``count`` survive, or all that may if there are fewer.

    With costs, so many survive as ``count`` pays for, from the highest down: up to the first that
    is too dear, also where a cheaper one behind it would fit.

    The lowest key that survives is found bit by bit, from the highest down: a bit belongs to it if
    enough keys are as high with that bit set. That is 32 sums over the row, whatever its length,
    and needs neither a sort nor the scatter that turns its order into a mask.

    Args:
      row: ``[n]`` keys, turns and costs; the costs have a sum below 2³¹.
      count: how many, or for how much; may be traced.

    >>> cut(Entry(jnp.array([1, 5, 5, 5], jnp.uint32), None, None), 2)[:2]
    (Array(5, dtype=uint32), Array(2, dtype=int32))
    """
    keys, turns, costs = row
    among = jnp.ones_like(keys, bool) if turns is None else turns == 1

    def number(mask) -> Any:
        return jnp.sum(mask if costs is None else jnp.where(mask, costs, 0), dtype=jnp.int32)

    if turns is not None:
        count = count - number(turns == 0)
    width = 8 * keys.dtype.itemsize

    def settle(place, lowest):
        bit = jax.lax.shift_left(jnp.ones((), keys.dtype), (width - 1 - place).astype(keys.dtype))
        return jnp.where(number(among & (keys >= lowest | bit)) >= count, lowest | bit, lowest)

    lowest = jax.lax.fori_loop(0, width, settle, jnp.zeros((), keys.dtype))
    equal = count - number(among & (keys > lowest))
    return Cut(lowest, equal, equal >= number(among & (keys == lowest)))


def kept(entries: Sequence[Entry], cut: Cut) -> list[jax.Array]:
    """The masks of all leaves. Equal scores at the cut are rare, and are only then counted.

    >>> entries = [entry(jnp.array([2, 3])), entry(jnp.array([2, 2]))]
    >>> kept(entries, Cut(jnp.uint32(2 + 2**31), jnp.int32(2), jnp.bool(False)))
    [Array([ True,  True], dtype=bool), Array([ True, False], dtype=bool)]
    """

    def in_order():
        left, masks = cut.equal, []
        for one in entries:
            mask, left = _first(one, cut.lowest, left)
            masks.append(mask)
        return masks

    return jax.lax.cond(
        cut.all_equal, lambda: [_from(one, cut.lowest) for one in entries], in_order
    )


# Jitted, so that leaves of one shape are traced once; and the same program for each of them,
# without its place in a row, so that they are compiled once.


@jax.jit
def _from(entry, lowest):
    return _by_turn(entry, entry.keys >= lowest)


@jax.jit
def _first(entry, lowest, left):
    """The mask where ``left`` of the keys that equal the lowest may stay, and what then is left."""
    above, tied = entry.keys > lowest, _by_turn(entry, entry.keys == lowest, first=False)

    def count():
        place = jnp.cumsum(tied.ravel(), dtype=jnp.int32).reshape(tied.shape)
        stay = jnp.sum(tied, dtype=jnp.int32)
        if entry.cost is not None:
            place, stay = entry.cost * place, entry.cost * stay
        return _by_turn(entry, above | (tied & (place <= left))), jnp.maximum(left - stay, 0)

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


def _turn(
    scores: jax.Array, least: chex.Numeric, most: chex.Numeric, alive: jax.Array | None = None
) -> jax.Array:
    by = (-scores,) if alive is None else (-scores, ~alive)
    order = jnp.lexsort(by, axis=-1)
    place = jnp.argsort(order, axis=-1)  # the inverse permutation: each score's place in its row
    least = jnp.minimum(least, most)
    turn = (place >= least).astype(jnp.int32) + (place >= most).astype(jnp.int32)
    return turn if alive is None else jnp.where(alive, turn, 2)


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
