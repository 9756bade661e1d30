"""Adapters for ``flax.linen`` models, whose code does not change.

While the model runs, an interceptor adds each adapter's output to that of its layer. The adapters
are inserted into the model's ``params``, next to the weights that they adapt, so ``nn.scan``,
``nn.vmap`` and ``nn.remat`` slice and stack them like any other parameter.

:func:`adapt` returns an :class:`AdaptedModule`, whose ``init`` makes the adapters and whose
``apply`` runs the model with them. :func:`describe` shows the layers that a config would adapt, and
:func:`resolve` replaces a function as ``target_modules`` by the layers that it selects.
"""

from adalora_jax._src.modules.linen_frontend import (
    AdaptedModule,
    BoundModule,
    adapt,
    describe,
    resolve,
)

__all__ = [
    "AdaptedModule",
    "BoundModule",
    "adapt",
    "describe",
    "resolve",
]
