"""Pictures of what the allocator did: where the rank went, when, and by which scores.

A run is drawn from a list of what :func:`adalora_jax.info` gave, one a step or one every so many
steps; they may stay on the device until then. ``jax.lax.scan`` stacks them into one, which will do
as well. Every function returns a :class:`matplotlib.figure.Figure` of its own, which a notebook
shows and ``figure.savefig("ranks.png")`` writes; ``pyplot`` and its global state are not involved.
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
