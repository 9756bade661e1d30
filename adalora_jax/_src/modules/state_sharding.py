"""Shardings of a training state, derived from the parameters that its leaves belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import KeyPath, tree_flatten_with_path, tree_map_with_path

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.allocator import AllocatorState, allocator_states, map_state
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.roles import ByRole, Role
from adalora_jax._src.modules.sharding import mesh_of, pad_spec, sharding_of, spec_of


def shardings(
    state: PyTree,
    like: PyTree = None,
    *,
    tx: optax.GradientTransformation | None = None,
    mesh: Mesh | AbstractMesh | None = None,
) -> PyTree:
    """Return the NamedSharding of every leaf of a training state.

    The result serves as the in and out shardings of ``jax.jit``, and for orbax. In an optimizer's
    state, the leaves that belong to a parameter, such as moments and the allocator's averages, are
    sharded like it, and leading axes, such as those of a history, are replicated. Masks are sharded
    like λ. All other leaves are replicated, and so are leaves that do not have their parameter's
    shape or have an axis that the mesh does not divide evenly.

    Args:
      state: the trained parameters, in the containers of ``like``; or, with ``tx``, an optimizer's
        state. Its leaves are arrays or ``jax.ShapeDtypeStruct``.
      like: the source of the shardings: the adapters as arrays on their devices, their
        NamedShardings, or the PartitionSpecs of ``adapted.specs``; for parameters stacked by role,
        those that :func:`adalora_jax.stack` returned. Required with ``tx``; by
        default ``state`` itself.
      tx: the optimizer, if ``state`` is its state.
      mesh: the mesh of the PartitionSpecs; by default that of ``like`` or of ``jax.set_mesh``.

    Returns:
      The containers of ``state``, with a ``NamedSharding`` at each leaf.

    Raises:
      ValueError: ``tx`` is given without ``like``, no mesh is found, or the structure of ``state``
        does not match ``like`` or ``tx``.

    >>> import jax, optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4)
    >>> adapters = {"up": adalora.init_adapter(jax.random.key(0), 64, 256, config)}
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> weights = {"up": (adalora.Layout(), (64, 256), PartitionSpec(None, "model"))}
    >>> specs = adalora.sharding.derive_specs(weights)
    >>> mesh = jax.make_mesh((1,), ("model",))
    >>> placed = shardings(jax.eval_shape(tx.init, adapters), specs, tx=tx, mesh=mesh)
    >>> placed.allocator.sensitivity.stacked["up"].p.spec, placed.inner[0].mu["up"].q.spec
    (P(None, None, 'model'), P(None, None))
    >>> opt_state = jax.jit(tx.init, out_shardings=placed)(adapters)
    """
    if like is None and tx is not None:
        raise ValueError(
            "`like=None`: must be given with tx; pass the parameters or their shardings, which the "
            "state follows."
        )
    like = state if like is None else like
    mesh = mesh or mesh_of(like)
    if mesh is None:
        raise ValueError(
            "`mesh=None`: no array has a NamedSharding, so the mesh is not known; pass mesh=, or "
            "call within jax.set_mesh(mesh)."
        )

    def place(leaf: PyTree, owner: PyTree) -> NamedSharding:
        return _match_sharding(owner, leaf.shape, mesh)

    if tx is None:
        owners = {pytree.leaf_name(path): leaf for path, leaf in tree_flatten_with_path(like)[0]}
        named, treedef = tree_flatten_with_path(state)
        names = [pytree.leaf_name(path) for path, _ in named]
        if sorted(names) != sorted(owners):
            differing = sorted({*names} ^ {*owners})
            raise ValueError(
                f"`state`: has other leaves than like, at {differing[:5]}; pass only parameters, "
                "or an optimizer's state with tx=."
            )
        return treedef.unflatten([place(leaf, owners[n]) for n, (_, leaf) in zip(names, named)])
    everywhere = NamedSharding(mesh, PartitionSpec())
    values = pytree.unwrap_variables(state)
    # Specs written by a user lack the scale and layout, which are part of the tree's structure.
    like = _with_facts(
        pytree.unwrap_variables(like),
        {path: a for found in allocator_states(values) for path, a in found.sensitivity.items()},
    )
    stacked = pytree.is_stacked(like)
    owners = like.by_role.stacked if stacked else pytree.adapters(like)

    def place_roles(found: AllocatorState) -> AllocatorState:
        new = {}
        for name in ("masks", "sensitivity", "uncertainty"):
            part = getattr(found, name)

            def place_role(role: Role, part: ByRole = part) -> PyTree:
                owner = owners[role.name if stacked else role.paths[0]]
                return _place_role(part.stacked[role.name], owner, mesh)

            new[name] = ByRole({r.name: place_role(r) for r in part.roles.members}, part.roles)
        return found._replace(**new)

    placed = map_state(tx, place, place_roles, values, like, other=lambda leaf: everywhere)
    return pytree.match_containers(state, placed)


def _place_role(value: PyTree, owner: Adapter, mesh: Mesh | AbstractMesh) -> PyTree:
    """Return the shardings of a role's arrays, like those of its first member or of its own."""
    if not isinstance(value, Adapter):
        return _match_sharding(owner.lam, value.shape, mesh)
    placed = [_match_sharding(part, leaf.shape, mesh) for part, leaf in zip(owner, value)]
    return value._replace(**dict(zip(Adapter._fields, placed)))


def _with_facts(like: PyTree, known: Mapping[str, Adapter]) -> PyTree:
    """Return ``like`` with the scale and layout of the adapters in ``known`` at the same paths."""

    def replaced(path: KeyPath, node: PyTree) -> PyTree:
        other = known.get(pytree.path_name(path))
        if not isinstance(node, Adapter) or other is None:
            return node
        return node._replace(scale=other.scale, layout=other.layout)

    return tree_map_with_path(replaced, like, is_leaf=lambda node: isinstance(node, Adapter))


def _match_sharding(
    owner: PyTree, shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> NamedSharding:
    """Return the sharding of a leaf of ``owner``, which is an array or its sharding or spec.

    The leaf is replicated if its shape differs from the owner's, as in factored moments, or if the
    mesh does not divide an axis evenly.
    """
    is_place = isinstance(owner, (NamedSharding, PartitionSpec))
    spec = spec_of(owner if is_place else sharding_of(owner))
    owned = shape[len(shape) - len(spec) :] if is_place else owner.shape
    before = len(shape) - len(owned)
    if before < 0 or tuple(shape[before:]) != tuple(owned) or len(spec) > len(owned):
        return NamedSharding(mesh, PartitionSpec())

    def ways(names: str | tuple[str, ...] | None) -> int:
        return math.prod(
            mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)) if name
        )

    if any(size % ways(names) for size, names in zip(owned, spec)):
        return NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec(*[None] * before, *pad_spec(spec, len(owned))))
