"""Where adapters lie on a mesh of devices: as the weights they adapt, unless told otherwise.

The engine is JAX's own: a ``jax.sharding.NamedSharding`` for each array, and ``jax.jit``. What is
here only says which. Of an adapter, p lies as the weight's output axes, q as its input axes, the
stack as the weight's stack; triplets are on all devices. Averages, masks and the optimizer's
moments lie as what they belong to, and everything else is on all devices.
"""

from adalora_jax._src.modules.sharding import Rules, adapter_specs, derive
from adalora_jax._src.modules.state_sharding import shardings

__all__ = [
    "Rules",
    "adapter_specs",
    "derive",
    "shardings",
]
