"""Several adapters of one model: under names, together, or one for each example of a batch."""

from adalora_jax._src.core.bank import AdapterBank, combine_adapters, per_example, truncate

__all__ = [
    "AdapterBank",
    "combine_adapters",
    "per_example",
    "truncate",
]
