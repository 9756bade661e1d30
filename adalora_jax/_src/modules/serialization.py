"""Registration of adapters, states and configs with ``flax.serialization``, as for ``to_bytes``.

An adapter is stored as its three arrays, and values by role as one array per role. Scales, layouts
and the config in the allocator's state are those of the target that they are restored into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import serialization

from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.allocator import AdaLoraState
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.roles import ByRole


def _arrays(adapter: Adapter) -> dict[str, PyTree]:
    return {name: serialization.to_state_dict(leaf) for name, leaf in adapter._asdict().items()}


def _adapter(target: Adapter, state: Mapping[str, PyTree]) -> Adapter:
    if set(state) != set(Adapter._fields):
        raise ValueError(
            f"`state`: an adapter in it has {sorted(state)}, but must have p, lam and q; pass the "
            "state dict of these adapters."
        )
    fields = target._asdict()
    restore = serialization.from_state_dict
    return target._replace(**{name: restore(fields[name], state[name], name) for name in fields})


def _parts(state: AdaLoraState) -> dict[str, PyTree]:
    to = serialization.to_state_dict
    return {"adapters": to(state.adapters), "allocator": to(state.allocator)}


def _state(target: AdaLoraState, state: Mapping[str, PyTree]) -> AdaLoraState:
    restore = serialization.from_state_dict
    parts: dict[str, Any] = {
        name: restore(getattr(target, name), state[name], name)
        for name in ("adapters", "allocator")
    }
    return AdaLoraState(**parts)


def _roles(values: ByRole) -> dict[str, Any]:
    return {role: serialization.to_state_dict(value) for role, value in values.stacked.items()}


def _by_role(target: ByRole, state: dict[str, Any]) -> ByRole:
    values = target.stacked
    if set(state) != set(values):
        differing = ", ".join(sorted(set(state) ^ set(values))[:5])
        raise ValueError(
            f"`state`: has other adapters than the target, at {differing}; restore it into the "
            "state of the same model."
        )
    restore = serialization.from_state_dict
    return ByRole({role: restore(values[role], state[role], role) for role in values}, target.roles)


serialization.register_serialization_state(ByRole, _roles, _by_role)
serialization.register_serialization_state(Adapter, _arrays, _adapter)
serialization.register_serialization_state(AdaLoraState, _parts, _state)
serialization.register_serialization_state(AdaLoraConfig, lambda _: {}, lambda config, _: config)
