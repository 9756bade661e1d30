"""Adapters for ``flax.nnx`` models.

A copy of the model is made whose adapted layers have one more child, ``adalora``, that holds p,
lam and q, and a class that subclasses the layer's own and adds the term. Paths of the base's
variables and ``isinstance`` stay what they were.
"""

from adalora_jax._src.modules.nnx_frontend import (
    adapt,
    adapters,
    describe,
    eval_model,
    resolve,
    set_adapters,
    with_adapters,
)
from adalora_jax._src.modules.nnx_layers import AdapterParam, SavedParam

__all__ = [
    "AdapterParam",
    "SavedParam",
    "adapt",
    "adapters",
    "describe",
    "eval_model",
    "resolve",
    "set_adapters",
    "with_adapters",
]
