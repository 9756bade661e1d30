"""AdaLoRA for JAX: adapters ``ΔW = P Λ Q`` for any Flax model, with rank where it matters."""

from importlib import import_module as _import_module
from typing import Any as _Any

from adalora_jax import linen, nnx
from adalora_jax.adapter import Adapter, delta_weight, forward, init_adapter
from adalora_jax.allocator import (
    AdaLoraState,
    AllocatorState,
    allocate,
    apply_masks,
    init_state,
)
from adalora_jax.bank import AdapterBank, add_adapters, per_example, truncate
from adalora_jax.budget import budget
from adalora_jax.compaction import (
    compact,
    compact_masks,
    compact_train_state,
    merge,
    rank_pattern,
    ranks,
    summary,
    unmerge,
)
from adalora_jax.config import AdaLoraConfig
from adalora_jax.diagnostics import AllocatorInfo, info
from adalora_jax.importance import Evidence, combine
from adalora_jax.orthogonality import orthogonality
from adalora_jax.rankspec import RankSpec
from adalora_jax.sharding import shardings
from adalora_jax.transform import AdaLoraOptState, adalora, allocator_state
from adalora_jax.tree import adapters, labels

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig",
    "AdaLoraOptState",
    "AdaLoraState",
    "Adapter",
    "AdapterBank",
    "AllocatorInfo",
    "AllocatorState",
    "Evidence",
    "RankSpec",
    "adalora",
    "adapters",
    "add_adapters",
    "allocate",
    "allocator_state",
    "apply_masks",
    "budget",
    "combine",
    "compact",
    "compact_masks",
    "compact_train_state",
    "delta_weight",
    "forward",
    "info",
    "init_adapter",
    "init_state",
    "labels",
    "linen",
    "merge",
    "nnx",
    "orthogonality",
    "per_example",
    "rank_pattern",
    "ranks",
    "shardings",
    "summary",
    "truncate",
    "unmerge",
]

# Rooms for some runs only, most with further packages, imported when they are first asked for.
_LATER = ("checkpoint", "inits", "peft", "plot", "quantized", "qwix_models")


def __getattr__(name: str) -> _Any:
    if name in _LATER:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
