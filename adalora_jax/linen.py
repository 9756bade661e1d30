"""Adapters for ``flax.linen`` models, whose code stays as it is.

While the model runs, an interceptor adds each adapter's term to the output of its layer. For
that the adapters are joined into the model's ``params``, next to the weights they adapt, so that
``nn.scan``, ``nn.vmap`` and ``nn.remat`` slice and stack them like any other parameter.
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
