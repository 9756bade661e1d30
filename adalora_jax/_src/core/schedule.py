"""The budget b(t): how many triplets may live in all adapters together, and what each costs."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from adalora_jax._src.core import checks
from adalora_jax._src.core.config import AdaLoraConfig


def budget(
    config: AdaLoraConfig,
    step: ArrayLike,
    n_adapters: int,
    *,
    initial: int | None = None,
) -> jax.Array:
    """Triplets allowed in total at ``step``.

    With ``b0 = init_r · n``, ``bT = target_r · n`` and ``c`` falling from 1 at ``tinit`` to 0 at
    ``total_step − tfinal``::

        cubic    b = ⌊(b0 − bT) c³ + bT⌋        (the code of the paper and of PEFT)
        linear   b = ⌊b0 − (1 − c)(b0 − bT)⌋
        grow     b = ⌊b1 + (1 − c)(bT − b1)⌋    b1 = min(n, bT): rises from one triplet a matrix

    b0 up to and including ``tinit``, bT from the final step on. The values are those of Python's
    float64, at any ``step`` type and precision setting, so they are PEFT's to the last triplet.

    In a run that grows, as in IncreLoRA, ``init_r`` is what a matrix can rise to. It starts with
    the best triplets of the warm-up; the others are there all the time, with λ = 0 and a gradient.

    A function as ``config.budget_schedule`` is called as ``schedule(config, step, n_adapters)``
    with a traced step and gives b in between; it is rounded down and kept within 0 and b0. A NaN
    prunes nothing: it counts as b0.

    Args:
      config: the schedule and its phases.
      step: optimizer step counted from 0; a Python int or an integer array, traced or not.
      n_adapters: matrices that share the budget; every slice of a stack is one. Where the budget
        is counted in another unit, what one triplet of each costs together, see :func:`cost`.
      initial: b0 where the adapters do not all start at ``init_r``.

    Returns:
      int32, in the shape of ``step``.

    Raises:
      ValueError: a function as ``config.budget_schedule`` gave another shape than the step's.

    >>> config = AdaLoraConfig(total_step=1000, init_r=12, target_r=8, budget_schedule="linear")
    >>> [int(budget(config, step, 10)) for step in (0, 500, 999)]
    [120, 100, 80]
    """
    initial = config.init_r * n_adapters if initial is None else initial
    target = min(config.target_r * n_adapters, initial)
    step = jnp.asarray(step, jnp.int32)
    if callable(config.budget_schedule):
        between = jnp.floor(jnp.asarray(config.budget_schedule(config, step, n_adapters)))
        if between.shape != step.shape:
            raise ValueError(
                f"budget_schedule={config.budget_schedule!r} returned shape {between.shape} for a "
                f"step of shape {step.shape}: it must return one number."
            )
        between = jnp.clip(jnp.where(between == between, between, initial), 0, initial)
        between = between.astype(jnp.int32)
    else:
        starts, values = _staircase(config, initial, target, min(n_adapters, target))
        between = jnp.asarray(values)[jnp.searchsorted(starts, step, side="right") - 1]
    between = jnp.where(step <= config.tinit, jnp.int32(initial), between)
    return jnp.where(step >= config.final_step, jnp.int32(target), between)


def cost(config: AdaLoraConfig, path: str, in_features: int, out_features: int) -> int:
    """What one triplet of the adapter at ``path`` takes from the budget, by ``config.budget_unit``.

    ``"triplets"``: 1. ``"parameters"``: ``in + out + 1``, so a triplet of a wide layer costs more
    than one of a narrow layer. ``"flops"``: ``2 in + 2 out + 1``, its additions and multiplications
    for one input of a dense layer. Where layers are run differently often, as convolutions or
    experts are, a function says it: ``(path, in_features, out_features)`` → a whole number.

    The budget is then what ``init_r`` triplets of each matrix cost, falling to what ``target_r`` of
    each cost, and a schedule of one's own gets the cost of one of each as ``n_adapters``.

    Raises:
      ValueError: a function gave something else than a whole number of at least 1.

    >>> config = AdaLoraConfig(total_step=10, budget_unit="parameters")
    >>> cost(config, "mlp/up", 512, 2048), cost(config, "attn/query", 512, 512)
    (2561, 1025)
    """
    unit, both = config.budget_unit, in_features + out_features
    if callable(unit):
        value = unit(path, in_features, out_features)
        return checks.integer(f"budget_unit={unit!r} for {path!r}: {value!r}", value, minimum=1)
    return {"triplets": 1, "parameters": both + 1, "flops": 2 * both + 1}[unit]


@functools.lru_cache(maxsize=128)
def _staircase(
    config: AdaLoraConfig, initial: int, target: int, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """The steps at which a built-in schedule changes and its values from there on.

    Computed in float64 ahead of time: in float32 the floor falls on the other side at some steps.
    """
    span = config.total_step - config.tfinal - config.tinit
    starts, values = [0], [initial]
    for step in range(config.tinit + 1, config.final_step):
        c = 1 - (step - config.tinit) / span
        if config.budget_schedule == "cubic":
            value = math.floor((initial - target) * c**3 + target)
        elif config.budget_schedule == "grow":
            value = math.floor(first + (1 - c) * (target - first))
        else:
            value = math.floor(initial - (1 - c) * (initial - target))
        if value != values[-1]:
            starts.append(step)
            values.append(value)
    return np.array(starts, np.int32), np.array(values, np.int32)
