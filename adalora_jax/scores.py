"""How much every triplet matters: smoothed sensitivity, its uncertainty, and the scores."""

from adalora_jax._src.core.scores import ScoreInputs, triplet_mean

__all__ = [
    "ScoreInputs",
    "triplet_mean",
]
