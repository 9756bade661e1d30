"""Figures of the rank allocation: ranks, budgets and scores over the steps of a run.

The functions take a list of the results of :func:`adalora_jax.info`, from every step or every few
steps. The arrays may be on the device, and results that ``jax.lax.scan`` stacked into one are
accepted as well. Every function returns a new :class:`matplotlib.figure.Figure`, which a notebook
displays and ``figure.savefig("ranks.png")`` writes. ``pyplot`` and its global state are not used.
"""

from adalora_jax._src.plot import (
    importance_history,
    lifetimes,
    rank_curves,
    rank_heatmap,
    rank_history,
)

__all__ = [
    "importance_history",
    "lifetimes",
    "rank_curves",
    "rank_heatmap",
    "rank_history",
]
