"""What pruning left: ranks, rank patterns, smaller adapters, merged weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import numpy as np

from adalora_jax import tree
from adalora_jax.allocator import AdaLoraState, AllocatorState


def ranks(state_or_masks: Any) -> dict[str, int]:
    """``{path: rank}``: the live triplets of every adapter, a slice of a stack on its own row.

    Args:
      state_or_masks: an :class:`AllocatorState`, an :class:`AdaLoraState`, or masks.

    >>> import jax.numpy as jnp
    >>> ranks({"query": jnp.array([True, False]), "up": jnp.array([[True, True], [False, True]])})
    {'query': 1, 'up[0]': 2, 'up[1]': 1}
    """
    result = {}
    for path, mask in _masks(state_or_masks).items():
        live = mask.sum(axis=-1)
        for index in np.ndindex(live.shape):
            result[_row_name(path, index)] = int(live[index])
    return result


def rank_pattern(state_or_masks: Any) -> dict[str, list]:
    """``{path: [True, False, ...]}``, what PEFT calls by that name; nested lists for a stack.

    Args:
      state_or_masks: as in :func:`ranks`.

    >>> import jax.numpy as jnp
    >>> rank_pattern({"query": jnp.array([True, False])})
    {'query': [True, False]}
    """
    return {path: mask.tolist() for path, mask in _masks(state_or_masks).items()}


def summary(adapters: chex.ArrayTree, state_or_masks: Any = None) -> str:
    """A table for people: one row an adapter, with its shape, live rank and parameters.

    Args:
      adapters: any tree with adapters in it.
      state_or_masks: as in :func:`ranks`; without it every triplet counts as live.

    >>> import jax.numpy as jnp
    >>> from adalora_jax.adapter import Adapter
    >>> adapter = Adapter(jnp.ones((4, 6)), jnp.ones(4), jnp.ones((4, 5)))
    >>> print(summary({"query": adapter}, {"query": jnp.array([True, True, False, False])}))
    adapter   in   out   rank   of   parameters
    query      5     6      2    4           24
    total                   2    4           24
    """
    found = tree.adapters(adapters)
    if state_or_masks is None:
        state_or_masks = {path: np.ones(a.lam.shape, bool) for path, a in found.items()}
    live = ranks(state_or_masks)
    rows = []
    for path, adapter in found.items():
        *stack, rank = adapter.lam.shape
        sizes = adapter.q.shape[-1], adapter.p.shape[-1]
        for index in np.ndindex(*stack):
            row = _row_name(path, index)
            rows.append((row, *sizes, live[row], rank, live[row] * (sum(sizes) + 1)))
    totals = [sum(row[column] for row in rows) for column in (3, 4, 5)]
    header = ("adapter", "in", "out", "rank", "of", "parameters")
    return table([header, *rows, ("total", "", "", *totals)])


def table(rows: Sequence[Sequence[Any]], left: int = 1) -> str:
    """Rows of cells as aligned text, the first ``left`` columns to the left.

    >>> print(table([("a", 1), ("bcd", 23)]))
    a      1
    bcd   23
    """
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "   ".join(
            str(cell).ljust(width) if i < left else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _masks(state_or_masks: Any) -> dict[str, np.ndarray]:
    if isinstance(state_or_masks, AdaLoraState):
        state_or_masks = state_or_masks.allocator
    if isinstance(state_or_masks, AllocatorState):
        state_or_masks = state_or_masks.masks
    return tree.leaves_with_path(jax.device_get(state_or_masks))


def _row_name(path: str, index: tuple[int, ...]) -> str:
    return f"{path}[{','.join(map(str, index))}]" if index else path
