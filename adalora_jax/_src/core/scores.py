"""How much every triplet matters: smoothed sensitivity, its uncertainty, and the scores."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.config import AdaLoraConfig

_MOST = 1e6  # of Ī ÷ Ū, where there is no uncertainty
_PRIOR = 1e-4  # δ, the precision of a prior: that of a weight decay of 1e-4
_TOGETHER = 8  # leaves in one test: more streams of memory than that no processor reads ahead


class ScoreInputs(NamedTuple):
    """What a score may look at, for one adapter; every field has the adapter's shapes.

    ``sensitivity`` and ``uncertainty`` are the float32 moving averages Ī and Ū.
    """

    weight: Adapter
    gradient: Adapter
    sensitivity: Adapter
    uncertainty: Adapter


def raw_sensitivity(weight: jax.Array, gradient: jax.Array) -> jax.Array:
    """``I = |w · g|`` (Eq. 8 of the paper), in float32 whatever the parameters are.

    >>> raw_sensitivity(jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0]))
    Array([3., 8.], dtype=float32)
    """
    return jnp.abs(weight.astype(jnp.float32) * gradient.astype(jnp.float32))


def smooth(
    raw: jax.Array, sensitivity: jax.Array, uncertainty: jax.Array, config: AdaLoraConfig
) -> tuple[jax.Array, jax.Array]:
    """One step of the two moving averages (Eqs. 9 and 10), started at 0, without bias correction::

        Ī ← β1 Ī + (1 − β1) I
        Ū ← β2 Ū + (1 − β2) |I − Ī|        with the new Ī

    >>> config = AdaLoraConfig(total_step=10, beta1=0.5, beta2=0.5)
    >>> [float(x) for x in smooth(jnp.float32(4), jnp.float32(0), jnp.float32(0), config)]
    [2.0, 1.0]
    """
    sensitivity = config.beta1 * sensitivity + (1 - config.beta1) * raw
    deviation = jnp.abs(raw - sensitivity)
    return sensitivity, config.beta2 * uncertainty + (1 - config.beta2) * deviation


@functools.partial(jax.jit, static_argnames="config")
def smooth_batch(
    weights: Sequence[Adapter],
    gradients: Sequence[Adapter],
    sensitivity: Sequence[Adapter],
    uncertainty: Sequence[Adapter],
    config: AdaLoraConfig,
) -> list[tuple[Adapter, Adapter]]:
    """``(Ī, Ū)`` of each adapter after :func:`smooth` took in its ``|w · g|``."""
    pairs = [
        [_smooth_leaf(*leaves, config=config) for leaves in zip(*adapter)]
        for adapter in zip(weights, gradients, sensitivity, uncertainty)
    ]
    return [(Adapter(*(s for s, _ in pair)), Adapter(*(u for _, u in pair))) for pair in pairs]


@functools.partial(jax.jit, static_argnames="config")  # one trace for all leaves that are alike
def _smooth_leaf(weight, gradient, sensitivity, uncertainty, config):
    return smooth(raw_sensitivity(weight, gradient), sensitivity, uncertainty, config)


@jax.jit
def finite_batch(weights: Sequence[Adapter], gradients: Sequence[Adapter]) -> jax.Array:
    """Whether ``w · g`` is finite in every element of adapters that are :func:`tree.alike`.

    A finite number times 0 is 0, any other is NaN, and so is a sum in which there is a NaN. One
    kernel reads several leaves at once, so they must be of one role: sharded alike.
    """
    tests = []
    for field in zip(*(zip(*pair) for pair in zip(weights, gradients))):
        zeros = [0 * raw_sensitivity(*pair) for pair in field]
        starts = range(0, len(zeros), _TOGETHER)
        groups = [zeros[start : start + _TOGETHER] for start in starts]
        tests += [jnp.all(functools.reduce(jnp.add, group) == 0) for group in groups]
    return jnp.all(jnp.stack(tests))


def triplet_mean(element_scores: Adapter) -> jax.Array:
    """A triplet's score from its elements' (Eq. 7): ``s(λ_i) + mean_j s(p_ij) + mean_j s(q_ij)``.

    Args:
      element_scores: with the shapes of an adapter.

    Returns:
      ``[..., r]``.

    >>> triplet_mean(Adapter(p=jnp.ones((2, 3)), lam=jnp.zeros(2), q=2 * jnp.ones((2, 4))))
    Array([3., 3.], dtype=float32)
    """
    p, lam, q = element_scores
    return lam + jnp.mean(p, axis=-1) + jnp.mean(q, axis=-1)


@jax.jit
def largest(averages: Sequence[jax.Array]) -> jax.Array:
    """Return the largest entry of all of them."""
    return jnp.max(jnp.stack([jnp.max(leaf) for leaf in averages]))


def representable(of_lam: jax.Array) -> jax.Array:
    """Return the factor of all averages with which float32 represents the products of two.

    ``Ī · Ū`` of averages below 1e-19 would be 0, of those above 1e19 infinite, and either way there
    would be no order. The factor brings the largest average of a λ between 2⁻⁵⁰ and 2⁵⁰, as near
    as it gets; it is a power of two, which is exact, and 1 for a λ that is there already. It goes
    no further, for the averages of p and q may be much larger, by the penalty's gradient. Those of
    λ are few, and all of them are on every device.

    Args:
      of_lam: the largest average of a λ; 0, of which nothing follows, gives 1.

    >>> [float(representable(jnp.float32(2.0**n))) for n in (-60, -40, 0, 40, 60)]
    [1024.0, 1.0, 1.0, 1.0, 0.0009765625]
    """
    exponent = jnp.frexp(of_lam)[1] - 1
    factor = jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -50, 50) - exponent)
    return jnp.where(of_lam > 0, factor, 1)


def triplet_scores(
    evidence: ScoreInputs, config: AdaLoraConfig, factor: ArrayLike = 1
) -> jax.Array:
    """The score by which the triplets of one adapter are ranked.

    ``config.score`` is one of

    * ``"sensitivity_uncertainty"``: ``Ī · Ū`` (Eq. 11), the paper's and PEFT's;
    * ``"smoothed_sensitivity"``: ``Ī``;
    * ``"sensitivity"``: ``I``, of this step alone;
    * ``"upper_confidence"``: ``Ī + Ū``;
    * ``"sensitivity_over_uncertainty"``: ``Ī ÷ Ū``, at most 1e6, and 0 where ``Ī = 0``: what is
      steadily useful (IGU-LoRA);
    * ``"signal_to_noise"``: ``|w| / σ`` of a weight's posterior (Chen and Garner 2024), with
      ``σ⁻² = h + δ`` and the Fisher information ``(Ī / w)²`` as h, so ``√(Ī² + δ w²)``; δ is 1e-4;
    * ``"magnitude"``: ``|λ|``, whatever ``score_over`` says;

    summed over the triplet by :func:`triplet_mean`, or of λ alone with ``score_over="lam"``; or a
    function that takes an :class:`ScoreInputs` and returns the scores of the triplets.

    Args:
      evidence: of one adapter.
      config: for ``score`` and ``score_over``.
      factor: :func:`representable`; it multiplies both averages in ``Ī · Ū``.

    Returns:
      ``[..., r]``, float32 for the built-in scores.

    Raises:
      ValueError: a function returned another shape.
    """
    if callable(config.score):
        scores = jnp.asarray(config.score(evidence))
        if scores.shape != evidence.weight.lam.shape:
            raise ValueError(
                f"score={config.score!r} returned shape {scores.shape} for an adapter whose lam "
                f"has shape {evidence.weight.lam.shape}: it must return one score a triplet."
            )
        return scores
    if config.score == "magnitude":
        return jnp.abs(evidence.weight.lam.astype(jnp.float32))
    elements = jax.tree.map(functools.partial(_element_score, config.score, factor), *evidence)
    return elements.lam if config.score_over == "lam" else triplet_mean(elements)


def _element_score(score, factor, weight, gradient, sensitivity, uncertainty):
    if score == "sensitivity_uncertainty":
        return (factor * sensitivity) * (factor * uncertainty)
    if score == "upper_confidence":
        return sensitivity + uncertainty
    if score == "smoothed_sensitivity":
        return sensitivity
    if score == "sensitivity_over_uncertainty":
        known = uncertainty > 0
        ratio = jnp.minimum(sensitivity / jnp.where(known, uncertainty, 1), _MOST)
        return jnp.where(known | (sensitivity == 0), ratio, _MOST)
    if score == "signal_to_noise":
        return jnp.hypot(sensitivity, _PRIOR**0.5 * weight.astype(jnp.float32))
    return raw_sensitivity(weight, gradient)
