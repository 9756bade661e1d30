"""The sensitivity of a parameter and its moving averages, element by element."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32, Shaped


def raw_sensitivity(
    weight: Shaped[Array, "*shape"], gradient: Shaped[Array, "*shape"]
) -> Float32[Array, "*shape"]:
    """Return the sensitivity ``I = |w · g|`` in float32, for parameters of any dtype.

    This is `AdaLoRA, Eq. (8) <https://arxiv.org/abs/2303.10512>`_.

    >>> raw_sensitivity(jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0]))
    Array([3., 8.], dtype=float32)
    """
    return jnp.abs(weight.astype(jnp.float32) * gradient.astype(jnp.float32))


def smooth(
    raw: Float32[Array, "*shape"],
    sensitivity: Float32[Array, "*shape"],
    uncertainty: Float32[Array, "*shape"],
    betas: tuple[float, float],
) -> tuple[Float32[Array, "*shape"], Float32[Array, "*shape"]]:
    """Return the moving averages Ī and Ū after one step.

    They start at 0 and have no bias correction (`AdaLoRA, Eqs. (9) and (10)
    <https://arxiv.org/abs/2303.10512>`_)::

        Ī ← β1 Ī + (1 − β1) I
        Ū ← β2 Ū + (1 − β2) |I − Ī|        with the new Ī

    Args:
      raw: the sensitivity I of this step, float32.
      sensitivity: Ī before the step, in the shape of ``raw``.
      uncertainty: Ū before the step, in the shape of ``raw``.
      betas: β1 and β2, the share of the previous average.

    >>> [float(x) for x in smooth(jnp.float32(4), jnp.float32(0), jnp.float32(0), (0.5, 0.5))]
    [2.0, 1.0]
    """
    sensitivity = average(sensitivity, raw, betas[0])
    return sensitivity, average(uncertainty, jnp.abs(raw - sensitivity), betas[1])


def average(
    old: Float32[Array, "*shape"], new: Float32[Array, "*shape"], beta: float
) -> Float32[Array, "*shape"]:
    """Return an exponential moving average after one step, ``beta · old + (1 − beta) · new``.

    >>> average(jnp.float32(4), jnp.float32(0), 0.25)
    Array(1., dtype=float32)
    """
    return beta * old + (1 - beta) * new
