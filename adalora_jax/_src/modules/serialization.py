"""Registration of adapters, states and configs with ``flax.serialization``, as for ``to_bytes``.

An adapter is stored as its three arrays, and values by role as one array per role. Scales, layouts
and the config in the allocator's state are those of the target that they are restored into, which
must have the same shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import serialization

from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.allocator import AdaLoraState
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.roles import ByRole
from adalora_jax._src.core.stacking import StackedAdapters


def _arrays(adapter: Adapter) -> dict[str, PyTree]:
    return {name: serialization.to_state_dict(leaf) for name, leaf in adapter._asdict().items()}


def _adapter(target: Adapter, state: Mapping[str, PyTree]) -> Adapter:
    if not isinstance(state, Mapping) or set(state) != set(Adapter._fields):
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"`state`: an adapter in it has {found}, but must have p, lam and q; pass the state "
            "dict of these adapters."
        )
    fields = target._asdict()
    return target._replace(**{name: _restored(fields[name], state[name], name) for name in fields})


def _restored(target: PyTree, state: PyTree, name: str) -> PyTree:
    """Return the restored value; raise if the target is an array of another shape."""
    value = serialization.from_state_dict(target, state, name)
    expected, shape = (getattr(leaf, "shape", None) for leaf in (target, value))
    if expected is not None and shape != expected:
        raise ValueError(
            f"`state`: {name!r} in it has shape {shape}, but that of the target has {expected}; "
            "pass a target with the ranks that were saved."
        )
    return value


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
    keys = set(state) if isinstance(state, Mapping) else set()
    if keys != set(values):
        differing = ", ".join(sorted(keys ^ set(values))[:5])
        raise ValueError(
            f"`state`: has other adapters than the target, at {differing}; restore it into the "
            "state of the same model."
        )
    return ByRole(
        {role: _restored(values[role], state[role], role) for role in values}, target.roles
    )


def _parts_of_stacked(stacked: StackedAdapters) -> dict[str, PyTree]:
    to = serialization.to_state_dict
    return {"by_role": to(stacked.by_role), "others": to(stacked.others)}


def _stacked(target: StackedAdapters, state: Mapping[str, PyTree]) -> StackedAdapters:
    restore = serialization.from_state_dict
    parts: dict[str, Any] = {
        name: restore(getattr(target, name), state[name], name) for name in ("by_role", "others")
    }
    return dataclasses.replace(target, **parts)


serialization.register_serialization_state(ByRole, _roles, _by_role)
serialization.register_serialization_state(StackedAdapters, _parts_of_stacked, _stacked)
serialization.register_serialization_state(Adapter, _arrays, _adapter)
serialization.register_serialization_state(AdaLoraState, _parts, _state)
serialization.register_serialization_state(AdaLoraConfig, lambda _: {}, lambda config, _: config)
