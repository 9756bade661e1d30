"""Scores of triplets, from their sensitivities and the moving averages of these."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.sensitivity import raw_sensitivity


class ScoreInputs(NamedTuple):
    """Inputs of a score for one adapter.

    Every field is an :class:`~adalora_jax.Adapter` with arrays of the shapes ``p [..., r, out]``,
    ``lam [..., r]`` and ``q [..., r, in]``.

    Attributes:
      weight: the parameters w, in their dtype.
      gradient: the gradients g of the parameters.
      sensitivity: float32: the smoothed sensitivity Ī, `AdaLoRA, Eq. (9)
        <https://arxiv.org/abs/2303.10512>`_.
      uncertainty: float32: the uncertainty Ū, `AdaLoRA, Eq. (10)
        <https://arxiv.org/abs/2303.10512>`_.

    >>> adapter = Adapter(jnp.ones((2, 4)), jnp.array([3.0, -2.0]), jnp.ones((2, 5)))
    >>> inputs = ScoreInputs(adapter, adapter, adapter, adapter)
    >>> jnp.abs(inputs.weight.lam * inputs.gradient.lam)
    Array([9., 4.], dtype=float32)
    """

    weight: Adapter
    gradient: Adapter
    sensitivity: Adapter
    uncertainty: Adapter


def triplet_mean(element_scores: Adapter) -> Float[Array, "*stack r"]:
    """Return the scores of triplets from the scores of their elements.

    ``S_i = s(λ_i) + mean_j s(p_ij) + mean_j s(q_ij)``, `AdaLoRA, Eq. (7)
    <https://arxiv.org/abs/2303.10512>`_.

    Args:
      element_scores: scores s of the elements, float arrays ``p [..., r, out]``, ``lam [..., r]``
        and ``q [..., r, in]``.

    Returns:
      One score per triplet, ``[..., r]``.

    >>> triplet_mean(Adapter(p=jnp.ones((2, 3)), lam=jnp.zeros(2), q=2 * jnp.ones((2, 4))))
    Array([3., 3.], dtype=float32)
    """
    p, lam, q = element_scores
    return lam + _mean(p) + _mean(q)


def _mean(elements: Float32[Array, "*stack r n"]) -> Float32[Array, "*stack r"]:
    """Return the mean over the last axis.

    XLA's kernels for CPUs that reduce an array with an axis of one entry take some ten times as
    long, so such axes are removed before.
    """
    ones = tuple(axis for axis, size in enumerate(elements.shape[:-1]) if size == 1)
    return jnp.expand_dims(jnp.mean(jnp.squeeze(elements, ones), axis=-1), ones)


def representable(of_lam: Float32[Array, ""]) -> Float32[Array, ""]:
    """Return the factor by which to multiply all averages so that float32 represents ``Ī · Ū``.

    Otherwise products of averages below 1e-19 underflow to 0 and products of averages above 1e19
    overflow to infinity, and the triplets have no order. The factor moves the largest average of a
    λ to the nearest end of the range from 2⁻⁵⁰ to 2⁵⁰, and is 1 for an average inside the range. It
    is a power of two, so the multiplication is exact. It scales no more than necessary, because the
    averages of p and q may be much larger, due to the penalty's gradient. Only averages of λ are
    used: they are few and replicated on every device.

    Args:
      of_lam: the largest average of a λ, float32 scalar; 0 has the factor 1.

    >>> [float(representable(jnp.float32(2.0**n))) for n in (-60, -40, 0, 40, 60)]
    [1024.0, 1.0, 1.0, 1.0, 0.0009765625]
    """
    exponent = jnp.frexp(of_lam)[1] - 1
    factor = jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -50, 50) - exponent)
    return jnp.where(of_lam > 0, factor, 1)


def needed_inputs(config: AdaLoraConfig) -> tuple[str, ...]:
    """Return which inputs, ``"params"`` and ``"grads"``, the score needs besides the averages.

    >>> needed_inputs(AdaLoraConfig(total_step=10, score="magnitude"))
    ('params',)
    """
    if callable(config.score) or config.score == "sensitivity":
        return ("params", "grads")
    return ("params",) if config.score == "magnitude" else ()


def triplet_scores(
    inputs: ScoreInputs, config: AdaLoraConfig, factor: Float32[Array, ""] | int = 1
) -> Shaped[Array, "*stack r"]:
    """Return the scores by which the triplets of one adapter are ranked.

    ``config.score`` is one of

    * ``"sensitivity_uncertainty"``: ``Ī · Ū``, as in `AdaLoRA, Eq. (11)
      <https://arxiv.org/abs/2303.10512>`_ and PEFT;
    * ``"smoothed_sensitivity"``: ``Ī``;
    * ``"sensitivity"``: ``I``, of this step alone;
    * ``"magnitude"``: ``|λ|``, for any ``score_reduction``;

    combined per triplet by :func:`triplet_mean`, or of λ alone with ``score_reduction="lam"``; or a
    function that takes a :class:`ScoreInputs` and returns the scores of the triplets.

    Args:
      inputs: weight, gradient and averages of one adapter.
      config: the source of ``score`` and ``score_reduction``.
      factor: the result of :func:`representable`, by which both averages in ``Ī · Ū`` are
        multiplied.

    Returns:
      One score per triplet, ``[..., r]``; float32 for the built-in scores.

    Raises:
      ValueError: a function returned another shape.
    """
    if callable(config.score):
        scores = jnp.asarray(config.score(inputs))
        if scores.shape != inputs.weight.lam.shape:
            raise ValueError(
                f"`score={config.score!r}`: returned shape {scores.shape} for an adapter whose lam "
                f"has shape {inputs.weight.lam.shape}; return one score per triplet."
            )
        return scores
    if config.score == "magnitude":
        return jnp.abs(inputs.weight.lam.astype(jnp.float32))
    elements = jax.tree.map(functools.partial(_element_score, config.score, factor), *inputs)
    return elements.lam if config.score_reduction == "lam" else triplet_mean(elements)


def _element_score(
    score: str,
    factor: Float32[Array, ""] | int,
    weight: Shaped[Array, "*shape"],
    gradient: Shaped[Array, "*shape"],
    sensitivity: Float32[Array, "*shape"],
    uncertainty: Float32[Array, "*shape"],
) -> Float32[Array, "*shape"]:
    if score == "sensitivity_uncertainty":
        return (factor * sensitivity) * (factor * uncertainty)
    if score == "smoothed_sensitivity":
        return sensitivity
    return raw_sensitivity(weight, gradient)
