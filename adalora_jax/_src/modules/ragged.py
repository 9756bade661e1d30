"""Products in which each group of rows has a matrix of its own, as of experts: ``ragged_dot``."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from adalora_jax._src import _compat
from adalora_jax._src.core.adapter import Adapter, known_scale
from adalora_jax._src.core.low_rank import accumulation_dtype


class Axes(NamedTuple):
    """Axes of a product of rows with the matrices of their groups.

    Attributes:
      row: axis of the input that the groups divide.
      x_summed: axes of the input that the product sums over.
      x_batch: axes of the input that the weight and the output have, too.
      group: axis of the weight that indexes the groups.
      summed: axes of the weight that the product sums over, in the order of ``x_summed``.
      batch: axes of the weight, in the order of ``x_batch``.
    """

    row: int
    x_summed: tuple[int, ...]
    x_batch: tuple[int, ...]
    group: int
    summed: tuple[int, ...]
    batch: tuple[int, ...]


def axes_of(eqn: core.JaxprEqn) -> Axes | None:
    """Return the axes of a ``ragged_dot_general``; None if its groups divide no axis of the output.

    >>> f = jax.lax.ragged_dot
    >>> x, w, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.array([3, 1])
    >>> axes_of(jax.make_jaxpr(f)(x, w, sizes).jaxpr.eqns[0])
    Axes(row=0, x_summed=(1,), x_batch=(), group=0, summed=(1,), batch=())
    """
    params = eqn.params
    numbers = params["ragged_dot_dimension_numbers"]
    (x_summed, summed), (x_batch, batch) = numbers.dot_dimension_numbers
    (row,), group = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    is_known = params["group_offset"] is None and not _compat.is_output_placed(params)
    if len(group) != 1 or row in x_summed or row in x_batch or not is_known:
        return None
    return Axes(row, tuple(x_summed), tuple(x_batch), group[0], tuple(summed), tuple(batch))


def term(
    eqn: core.JaxprEqn,
    x: jax.Array,
    group_sizes: jax.Array,
    adapter: Adapter,
    roles: Sequence[Sequence[Hashable]],
    dims: Sequence[Sequence[Hashable]],
    sizes: Mapping[Any, int],
) -> jax.Array | None:
    """Return ``s · ((x qᵀ) · λ) p``, with the factors of each row's group.

    Args:
      eqn: a ``ragged_dot_general`` with a weight of which ``axes_of`` is known.
      x: its input.
      group_sizes: its number of rows per group; further rows are zero in the result, too.
      adapter: factors of the weight's increment, ``[*stack, r, features]``.
      roles: the labels of the stack axes, of the inputs and of the outputs.
      dims: the labels that each dimension of the weight consists of.
      sizes: size of each label.

    Returns:
      An array of the output's shape; None if the groups are not the stack, or the product sums over
      other labels than the inputs or the outputs.
    """
    axes, (stack, ins, outs) = axes_of(eqn), roles
    if axes is None or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    stacked = (axes.group, *axes.batch)
    free = [d for d in range(len(dims)) if d not in (*stacked, *axes.summed)]
    shared, summed, kept = (
        {a for d in some for a in dims[d]} for some in (stacked, axes.summed, free)
    )
    c = adapter.lam.astype(accumulation_dtype(adapter.lam.dtype)) * known_scale(adapter)
    first, second = (adapter.q, ins), (c[..., None] * adapter.p.astype(c.dtype), outs)
    if summed == {*outs}:  # the increment is transposed
        first, second = second, first
    if shared != {*stack} or summed != {*first[1]} or kept != {*second[1]}:
        return None
    rank = object()  # the label of the triplets
    sizes = {**sizes, rank: adapter.lam.shape[-1]}

    def factor(leaf: jax.Array, labels: Sequence[Hashable], of: Sequence[int]) -> jax.Array:
        """Return ``[*stack, r, features]`` as ``[group, *batch, r, *dimensions of the weight]``."""
        order = [*stack, rank, *labels]
        parts = [*(dims[d] for d in stacked), (rank,), *(dims[d] for d in of)]
        leaf = leaf.reshape([sizes[a] for a in order])
        leaf = leaf.transpose([order.index(a) for part in parts for a in part])
        return leaf.reshape([math.prod(sizes[a] for a in part) for part in parts]).astype(x.dtype)

    batch = range(len(axes.batch))
    in_factor = [1 + i for i in batch]

    def product(
        x: jax.Array,
        factor: jax.Array,
        row: int,
        summed: tuple[Sequence[int], Sequence[int]],
        x_batch: Sequence[int],
    ) -> jax.Array:
        numbers = lax.RaggedDotDimensionNumbers((summed, (x_batch, in_factor)), [row], [0])
        return lax.ragged_dot_general(
            x, factor, group_sizes, numbers, precision=eqn.params["precision"]
        )

    left = [*axes.x_batch, *(d for d in range(x.ndim) if d not in (*axes.x_batch, *axes.x_summed))]
    at = 1 + len(batch)  # the axis of the triplets in a factor
    inner = [at + 1 + i for i in range(len(axes.summed))]
    h = product(x, factor(*first, axes.summed), axes.row, (axes.x_summed, inner), axes.x_batch)
    return product(h, factor(*second, free), left.index(axes.row), ([len(left)], [at]), batch)
