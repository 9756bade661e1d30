"""Compaction: adapters and optimizer states without the pruned triplets, and a table of ranks."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array, Bool, Int

from adalora_jax._src.core import pytree, text
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.allocator import AllocatorState, map_state
from adalora_jax._src.core.evaluation import (
    apply_masks,
    check_masks,
    masks,
    ranks,
    unfinished,
)
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.roles import (
    ByRole,
    group_by_role,
    map_leaves,
    shapes_by_path,
    stack,
)


def compact(
    params: PyTree, opt_state: PyTree, tx: optax.GradientTransformation | None = None
) -> PyTree:
    """Return the parameters, or with ``tx`` also the state, without their pruned triplets."""
    if pytree.is_stacked(params):
        raise ValueError(
            "`params`: are stacked by role, whose adapters may get different ranks; pass "
            "unstack(params) and unstack(opt_state)."
        )
    by_path = jax.device_get(masks(opt_state))
    if problem := unfinished(opt_state):
        message = f"`opt_state`: {problem}; call finish(opt_state, params) first."
        if tx is not None:
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    _check_all_masked(pytree.adapters(params), by_path, "opt_state")
    params = apply_masks(params, by_path)
    cuts = _selections(params, by_path)
    small = _without_removed(jax.tree.map(_take_rows, params, cuts))
    return small if tx is None else (small, _take_state_rows(tx, opt_state, cuts, by_path, small))


def _check_all_masked(
    adapters: Mapping[str, Adapter], by_path: Mapping[str, Any], name: str
) -> None:
    """Raise if an adapter has no mask among those of the argument ``name``."""
    if lacking := [path for path in adapters if path not in by_path]:
        raise ValueError(
            f"`{name}`: has no mask for {lacking[0]!r}, only for "
            f"{', '.join(list(by_path)[:8])}; pass the state of the run that trained these "
            "parameters."
        )


class _Selection:
    """The remaining rows of one leaf of an adapter.

    Attributes:
      name: name of the leaf, for error messages.
      shape: shape of the leaf.
      rows: ``[..., rank]`` indices of the remaining triplets.
      after: number of axes after the triplet axis.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], rows: Int[Any, "... rank"], after: int
    ) -> None:
        self.name, self.shape, self.rows, self.after = name, shape, rows, after


def _selections(params: PyTree, by_path: Mapping[str, Bool[Any, "... _"]]) -> PyTree:
    """Return a tree with a ``_Selection`` per leaf of an adapter and False for other leaves."""

    def cuts(path: str, adapter: Adapter) -> Adapter:
        rows = surviving_rows(by_path[path])[0]

        def make(name: str, after: int) -> _Selection:
            return _Selection(f"{path}.{name}", getattr(adapter, name).shape, rows, after)

        leaves: Any = make("p", 1), make("lam", 0), make("q", 1)
        return Adapter(*leaves, scale=adapter.scale, layout=adapter.layout)

    plain = jax.tree.map(lambda leaf: False, params)
    found = pytree.adapters(params)
    values: Any = {path: cuts(path, adapter) for path, adapter in found.items()}
    return pytree.insert_adapters(plain, values)


def _take_rows(leaf: PyTree, cut: _Selection | Literal[False]) -> PyTree:
    """Return the remaining rows of a leaf of an adapter, or of an array of the leaf's shape."""
    if cut is False:
        return leaf
    if cut.rows.shape[-1] == 0:
        return _REMOVED
    before = leaf.ndim - len(cut.shape)  # extra leading axes, such as a history's
    if before < 0 or leaf.shape[before:] != cut.shape:
        if leaf.size == 1:
            return leaf  # an optimizer's placeholder
        raise ValueError(
            f"`opt_state`: the optimizer has an array of shape {leaf.shape} for {cut.name!r} of "
            f"shape {cut.shape}, whose rows cannot be selected; compact the parameters alone, "
            "compact(params, opt_state), and start the final phase with tx.init."
        )
    index = cut.rows.reshape(*(1,) * before, *cut.rows.shape, *(1,) * cut.after)
    return jnp.take_along_axis(leaf, index, axis=leaf.ndim - cut.after - 1)


def _take_state_rows(
    tx: optax.GradientTransformation,
    opt_state: PyTree,
    cuts: PyTree,
    by_path: Mapping[str, Bool[Any, "... _"]],
    small: PyTree,
) -> PyTree:
    """Return the optimizer's state for the compacted parameters."""
    message = (
        "`opt_state`: after the selection of rows, the optimizer's state does not have the shapes "
        "of tx.init for the compacted parameters; compact the parameters alone, "
        "compact(params, opt_state), and start the final phase with tx.init."
    )

    rows = pytree.adapters(cuts)
    remaining = pytree.adapters(small)
    roles = group_by_role(remaining)

    def cut_allocator(state: AllocatorState) -> AllocatorState:
        def short(path: str, a: Adapter) -> Adapter:
            return a._replace(**map_leaves(_take_rows, a, rows[path])._asdict())

        def take(values: Mapping[str, Adapter]) -> dict[str, Adapter]:
            return {path: short(path, values[path]) for path in remaining}

        active = {path: surviving_rows(by_path[path])[1] for path in remaining}
        averages = [stack(roles, take(part)) for part in (state.sensitivity, state.uncertainty)]
        return state._replace(
            masks=stack(roles, active), sensitivity=averages[0], uncertainty=averages[1]
        )

    state = _without_removed(map_state(tx, _take_rows, cut_allocator, opt_state, cuts))
    expected = jax.eval_shape(tx.init, small)

    def shapes(node: PyTree) -> list[tuple[int, ...]]:
        return [tuple(leaf.shape) for leaf in jax.tree.leaves(node)]

    if shapes(expected) != shapes(state):
        raise ValueError(message)
    return state


def summary(adapters: PyTree, state: PyTree = None) -> str:
    """Return a text table of the adapters: sizes, ranks and active parameters per matrix.

    Args:
      adapters: any tree with adapters in it, or what :func:`adalora_jax.stack` returned.
      state: an optimizer's state, or masks, as in :func:`adalora_jax.masks`; None counts every
        triplet as active.

    Returns:
      A table with one row per matrix and one for the total, and with the columns path, ``in``,
      ``out``, active triplets (``rank``), all triplets (``of``) and active parameters.

    Raises:
      ValueError: ``adapters`` contains no adapter, ``state`` no masks, or those of other adapters.

    >>> import jax.numpy as jnp, adalora_jax as adalora
    >>> adapter = adalora.Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)))
    >>> print(summary({"query": adapter}, {"query": jnp.array([True, True, False, False])}))
    adapter   in   out   rank   of   parameters
    query      5     6      2    4           24
    total                   2    4           24
    """
    way_out = "pass the adapters, or adalora_jax.nnx.adapters(model)"
    found = shapes_by_path(
        pytree.require_adapters(adapters, "adapters", way_out, pytree.trained_adapters)
    )
    if state is None:
        state = {path: jnp.ones(a.lam.shape, bool) for path, a in found.items()}
    else:
        by_path = masks(state)
        _check_all_masked(found, by_path, "state")
        check_masks({path: a.lam for path, a in found.items()}, by_path, "state")
    rank_of = ranks(state)
    rows = []
    for path, adapter in found.items():
        *stack, rank = adapter.lam.shape
        sizes = adapter.q.shape[-1], adapter.p.shape[-1]
        for index in itertools.product(*map(range, stack)):
            row = pytree.row_name(path, index)
            rows.append((row, *sizes, rank_of[row], rank, rank_of[row] * (sum(sizes) + 1)))
    totals = [sum(row[column] for row in rows) for column in (3, 4, 5)]
    header = ("adapter", "in", "out", "rank", "of", "parameters")
    return text.table([header, *rows, ("total", "", "", *totals)])


def surviving_rows(
    mask: Bool[Any, "*stack r"],
) -> tuple[Int[Any, "*stack rank"], Bool[Array, "*stack rank"]]:
    """Return the remaining rows of an adapter, and False for those that pad a slice of a stack.

    The mask and the rows are arrays of the host, which every process of a mesh may index with.

    >>> mask = jnp.array([[True, False, True], [False, True, False]])
    >>> rows, active = surviving_rows(jax.device_get(mask))
    >>> rows.tolist(), active.tolist()
    ([[0, 2], [1, 0]], [[True, True], [True, False]])
    """
    count = mask.sum(axis=-1, keepdims=True)
    rank = int(count.max(initial=0))
    rows = (~mask).argsort(axis=-1, kind="stable")[..., :rank]
    return rows, jax.lax.broadcasted_iota(jnp.int32, rows.shape, rows.ndim - 1) < count


_REMOVED = object()  # replaces a leaf whose adapter has rank 0


def _without_removed(node: PyTree) -> PyTree:
    """Return the tree without the entries of mappings whose leaves were all removed."""
    children, treedef = tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
    if jax.tree_util.treedef_is_leaf(treedef) or isinstance(node, ByRole):
        return node

    def gone(child: PyTree) -> bool:
        return {id(leaf) for leaf in jax.tree.leaves(child)} == {id(_REMOVED)}

    if isinstance(node, Mapping):
        remaining: Any = {key.key: _without_removed(c) for (key,), c in children if not gone(c)}
        return type(node)(remaining)  # pyright: ignore[reportCallIssue]
    return treedef.unflatten([_without_removed(child) for _, child in children])
