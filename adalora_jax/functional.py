"""Adapters for functions of a parameter pytree: plain JAX, Equinox, Haiku, or any other library.

:func:`adapt` traces ``fn(params, *inputs)`` and reads from its products which axes of each weight
are inputs and outputs. It returns an :class:`AdaptedFunction`, whose ``init`` makes the adapters
and whose ``apply`` runs the function with them. :func:`merge` and :func:`unmerge` add the
increments to the parameters and subtract them again. :func:`describe` shows the weights that a
config would adapt, and :func:`resolve` replaces a function as ``target_modules`` by the paths that
it selects.

``apply`` computes ``fn(params with W + ΔW)`` for every use of a weight. It runs the function's
jaxpr and adds ``s · ((x qᵀ) · λ) p`` to each product with an adapted weight, so ``ΔW`` is not
formed and, in bfloat16, not rounded like the weight. Every other use of a weight sees ``W + ΔW``.
"""

from adalora_jax._src.modules.functional_frontend import (
    AdaptedFunction,
    adapt,
    describe,
    resolve,
)
from adalora_jax._src.modules.functional_params import merge, unmerge

__all__ = [
    "AdaptedFunction",
    "adapt",
    "describe",
    "merge",
    "resolve",
    "unmerge",
]
