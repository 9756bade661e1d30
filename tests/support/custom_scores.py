"""Scores as functions, of which ``support.oracle`` has the formulas under the same names."""

import jax
import jax.numpy as jnp

from adalora_jax.scores import triplet_mean


def upper_confidence(inputs):
    """Return ``Ī + Ū`` per triplet."""
    return triplet_mean(jax.tree.map(jnp.add, inputs.sensitivity, inputs.uncertainty))


def sensitivity_over_uncertainty(inputs):
    """Return ``Ī / Ū`` per triplet (IGU-LoRA), at most 1e6 for each element."""
    ratio = lambda s, u: jnp.where(s > 0, jnp.minimum(s / jnp.maximum(u, 1e-30), 1e6), 0)
    return triplet_mean(jax.tree.map(ratio, inputs.sensitivity, inputs.uncertainty))


def signal_to_noise(inputs):
    """Return ``√(Ī² + δ w²)`` per triplet, with ``δ = 1e-4`` (Chen and Garner 2024)."""
    posterior = lambda w, s: jnp.hypot(s, 1e-2 * w)
    return triplet_mean(jax.tree.map(posterior, inputs.weight, inputs.sensitivity))
