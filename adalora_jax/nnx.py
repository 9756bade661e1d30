"""Adapters for ``flax.nnx`` models.

:func:`adapt` returns a copy of the model. An adapted layer has an additional child ``adalora`` with
p, lam and q, and its class is a subclass of the layer's own class that adds the adapter's output.
The paths of the base model's variables and ``isinstance`` checks do not change.

:func:`adapters` returns the adapters as a dict; :func:`set_adapters` changes their values in place,
:func:`with_adapters` returns a copy with adapters of other ranks. :func:`eval_model` returns a copy
with the masks applied. :func:`describe` shows the layers that a config would adapt, and
:func:`resolve` replaces a function as ``target_modules`` by the layers that it selects.
"""

from adalora_jax._src.modules.nnx_adapters import (
    adapters,
    eval_model,
    set_adapters,
    with_adapters,
)
from adalora_jax._src.modules.nnx_frontend import adapt, describe, resolve
from adalora_jax._src.modules.nnx_variables import AdapterParam, SavedParam

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
