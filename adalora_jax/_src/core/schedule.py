"""Budget b(t) for the active triplets of all adapters, and the cost per triplet."""

from __future__ import annotations

import array
import functools
import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Int, Int32

from adalora_jax._src.core import checks
from adalora_jax._src.core.config import AdaLoraConfig, check_config


def budget(
    config: AdaLoraConfig,
    step: Int[ArrayLike, "*steps"],
    n_adapters: int,
    *,
    initial: int | None = None,
) -> Int32[Array, "*steps"]:
    """Return the budget b(t) at ``step``: the number of triplets that may be active in total.

    With n = ``n_adapters``, ``b0 = init_r · n``, ``bT = min(target_r · n, b0)`` and ``c``, which
    falls linearly from 1 at ``tinit`` to 0 at ``total_step − tfinal``::

        cubic    b = ⌊(b0 − bT) c³ + bT⌋
        linear   b = ⌊b0 − (1 − c)(b0 − bT)⌋
        grow     b = ⌊b1 + (1 − c)(bT − b1)⌋    b1 = min(n, bT): one triplet per matrix

    The budget is b0 up to and including ``tinit`` and bT from the final step on. ``"cubic"`` is the
    schedule of `AdaLoRA <https://arxiv.org/abs/2303.10512>`_ as in the authors' code and in PEFT,
    which differs from the equation printed in the paper. Values are computed in Python's float64
    for any dtype of ``step`` and any precision setting, so they equal PEFT's exactly.

    With ``"grow"``, as in `IncreLoRA <https://arxiv.org/abs/2308.12043>`_, ``init_r`` is the
    maximum rank of a matrix. The first mask keeps the best triplets of the warm-up; the others stay
    in the adapters with λ = 0 and receive gradients, so later masks can make them active.

    A function as ``config.budget_schedule`` is called as ``schedule(config, step, n_adapters)``,
    with an int32 array as step, and returns b between ``tinit`` and the final step. The result is
    rounded down and clipped to [0, b0]. NaN counts as b0, so nothing is pruned.

    Args:
      config: the schedule and its phases.
      step: optimizer step, counted from 0; a Python int or an integer array, traced or not.
      n_adapters: int: number of matrices that share the budget; every slice of a stack is one. In
        another ``budget_unit`` than triplets: the cost of one triplet of each matrix, summed over
        the matrices, see ``AdaLoraConfig.budget_unit``.
      initial: int: b0, if not all adapters start at ``init_r``. None: ``init_r · n_adapters``.

    Returns:
      int32 array in the shape of ``step``, in ``config.budget_unit``.

    Raises:
      TypeError: ``config`` is not an :class:`AdaLoraConfig`.
      ValueError: ``n_adapters`` or ``initial`` is not an integer of at least 0 that an int32 can
        count, or a function as ``config.budget_schedule`` returned another shape than the step's.

    >>> config = AdaLoraConfig(total_step=1000, init_r=12, target_r=8, budget_schedule="linear")
    >>> [int(budget(config, step, 10)) for step in (0, 500, 999)]
    [120, 100, 80]
    """
    check_config(config)
    n_adapters = checks.integer("n_adapters", n_adapters, minimum=0)
    initial = config.init_r * n_adapters if initial is None else initial
    initial = checks.integer("initial", initial, minimum=0)
    target = min(config.target_r * n_adapters, initial)
    step = jnp.asarray(step, jnp.int32)
    if callable(config.budget_schedule):
        between = jnp.floor(jnp.asarray(config.budget_schedule(config, step, n_adapters)))
        if between.shape != step.shape:
            raise ValueError(
                f"`budget_schedule={config.budget_schedule!r}`: returned shape {between.shape} for "
                f"a step of shape {step.shape}; return one number per step."
            )
        between = jnp.clip(jnp.where(between == between, between, initial), 0, initial)
        between = between.astype(jnp.int32)
    else:
        starts, values = _staircase(config, initial, target, min(n_adapters, target))
        # For one step, all comparisons at once are one kernel; a binary search is a loop.
        method = "scan" if step.ndim else "compare_all"
        place = jnp.searchsorted(jnp.asarray(starts), step, side="right", method=method)
        between = jnp.asarray(values)[place - 1]
    between = jnp.where(step <= config.tinit, jnp.int32(initial), between)
    return jnp.where(step >= config.final_step, jnp.int32(target), between)


def cost(config: AdaLoraConfig, path: str, in_features: int, out_features: int) -> int:
    """Return the cost of one triplet of the adapter at ``path``, in ``config.budget_unit``.

    ``"triplets"``: 1. ``"parameters"``: ``in + out + 1``, so a triplet of a wide layer costs more
    than one of a narrow layer. ``"flops"``: ``2 in + 2 out + 1``, its additions and multiplications
    for one input of a dense layer. If some layers run more often than others, such as convolutions
    and experts, pass a function ``(path, in_features, out_features) -> int``.

    The budget then falls from the cost of ``init_r`` triplets of each matrix to the cost of
    ``target_r`` triplets of each matrix. A custom schedule receives the cost of one triplet of each
    matrix, summed over the matrices, as ``n_adapters``.

    Raises:
      ValueError: a function returned a value that is not an integer of at least 1.

    >>> config = AdaLoraConfig(total_step=10, budget_unit="parameters")
    >>> cost(config, "mlp/up", 512, 2048), cost(config, "attn/query", 512, 512)
    (2561, 1025)
    """
    unit, both = config.budget_unit, in_features + out_features
    if callable(unit):
        value = unit(path, in_features, out_features)
        call = f"budget_unit({path!r}, {in_features}, {out_features})"
        return checks.integer(call, value, minimum=1)
    return {"triplets": 1, "parameters": both + 1, "flops": 2 * both + 1}[unit]


@functools.lru_cache(maxsize=128)
def _staircase(
    config: AdaLoraConfig, initial: int, target: int, first: int
) -> tuple[array.array[int], array.array[int]]:
    """Return the steps at which a built-in schedule changes, and its values from there on.

    Both are computed in float64 ahead of time, since in float32 the floor differs at some steps.

    Args:
      config: the schedule and its phases.
      initial: b0.
      target: bT.
      first: b1 of ``"grow"``.
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
    return array.array("i", starts), array.array("i", values)
