"""Shardings of adapters and optimizer states on a device mesh, derived from the base model's.

They are plain ``jax.sharding.NamedSharding`` objects for ``jax.jit``; there is no custom runtime.
In an adapter, ``p`` is sharded like the weight's output axes, ``q`` like its input axes, and stack
axes like the weight's; the triplet axis is replicated. Moving averages, masks and the optimizer's
moments are sharded like the parameters that they belong to. All other arrays are replicated.

:func:`adapter_specs` derives the PartitionSpecs of one adapter, :func:`derive_specs` those of all,
with :data:`Rules` for exceptions, and :func:`shardings` the NamedShardings of a training state.
"""

from adalora_jax._src.modules.sharding import Rules, adapter_specs, derive_specs
from adalora_jax._src.modules.state_sharding import shardings

__all__ = [
    "Rules",
    "adapter_specs",
    "derive_specs",
    "shardings",
]
