"""The functions that a config takes in place of a name: what each is called with, and returns."""

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
