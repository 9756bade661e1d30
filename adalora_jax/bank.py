"""Several adapters of one model: selected by name, combined, or selected per example.

:class:`AdapterBank` stacks named sets of adapters and selects from them by index,
:func:`per_example` applies a different set to each example of a batch, :func:`combine_adapters`
adds increments, and :func:`truncate` lowers ranks by a singular value decomposition.
"""

from adalora_jax._src.core.bank import AdapterBank, combine_adapters, per_example, truncate

__all__ = [
    "AdapterBank",
    "combine_adapters",
    "per_example",
    "truncate",
]
