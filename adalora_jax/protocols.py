"""Signatures of the functions that :class:`~adalora_jax.AdaLoraConfig` accepts instead of a name.

===================================================  ===========================================
:class:`ScoreFunction`, of a :class:`ScoreInputs`    ``score``: scores of the triplets
:class:`BudgetSchedule`                              ``budget_schedule``: budget at a step
:class:`BudgetCost`                                  ``budget_unit``: cost of one triplet
:class:`InitFunction`                                ``init``: initial values of a matrix
:class:`ProxFunction`                                ``prox``: map of λ after each update
:class:`TargetFunction`                              ``target_modules``, ``exclude_modules``:
                                                     selection of layers
===================================================  ===========================================
"""

from adalora_jax._src.core.protocols import (
    BudgetCost,
    BudgetSchedule,
    InitFunction,
    ProxFunction,
    ScoreFunction,
    TargetFunction,
)
from adalora_jax._src.core.scores import ScoreInputs

__all__ = [
    "BudgetCost",
    "BudgetSchedule",
    "InitFunction",
    "ProxFunction",
    "ScoreFunction",
    "ScoreInputs",
    "TargetFunction",
]
