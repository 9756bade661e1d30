"""Building blocks of custom triplet scores, ``AdaLoraConfig(score=...)``.

A score function takes the :class:`ScoreInputs` of one adapter: weights, gradients, sensitivity and
uncertainty. :func:`triplet_mean` reduces scores of parameters to one per triplet (`AdaLoRA, Eq. (7)
<https://arxiv.org/abs/2303.10512>`_).
"""

from adalora_jax._src.core.scores import ScoreInputs, triplet_mean

__all__ = [
    "ScoreInputs",
    "triplet_mean",
]
