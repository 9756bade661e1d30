"""The moving averages of the sensitivities, and whether the sensitivities are finite."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.low_rank import explicit_mesh
from adalora_jax._src.core.roles import (
    ByRole,
    Role,
    map_adapters,
    part_of,
    per_triplet,
    stack,
    stack_like,
)
from adalora_jax._src.core.sensitivity import average, raw_sensitivity, smooth

Averages = tuple[ByRole, ByRole]  # Ī and Ū
Members = Sequence[tuple[Adapter, Adapter]]  # weight and gradient of each member of a role
# Parameters of a role from which its averages are updated in place on a CPU: the sensitivities of
# all its members would not fit the cache. Those of smaller roles are joined, which takes less time.
LARGE = 2**20
GROUP = 4  # members that are reduced in one kernel
LARGEST = functools.partial(jnp.max, initial=0)  # of |w · g|; also of none


def update_averages(
    averages: Averages,
    weights: Mapping[str, Adapter],
    gradients: Mapping[str, Adapter],
    betas: tuple[float, float],
    wanted: Bool[Array, ""],
) -> tuple[Averages, Bool[Array, ""]]:
    """Return the averages after one step, and whether all sensitivities ``|w · g|`` are finite.

    Args:
      averages: Ī and Ū before the step; they are returned if a sensitivity is not finite.
      weights, gradients: ``{path: Adapter}``.
      betas: β1 and β2.
      wanted: boolean scalar: False at a step that does not change the averages.
    """
    # On a CPU, a branch saves reading and writing averages that do not change. Elsewhere it costs
    # copies of them, and on a GPU the host would wait for the predicate.
    arguments = averages, weights, gradients, betas, wanted
    return jax.lax.platform_dependent(
        cpu=lambda: _by_branches(*arguments), default=lambda: _by_selection(*arguments)
    )


def _by_selection(
    averages: Averages,
    weights: Mapping[str, Adapter],
    gradients: Mapping[str, Adapter],
    betas: tuple[float, float],
    wanted: Bool[Array, ""],
) -> tuple[Averages, Bool[Array, ""]]:
    raw = _raw_by_role(averages[0], weights, gradients)
    finite = _all_finite([per_triplet(LARGEST, raw)])
    choose = functools.partial(jnp.where, finite & wanted)
    return jax.tree.map(choose, _smoothed(raw, averages, betas), averages), finite


def _by_branches(
    averages: Averages,
    weights: Mapping[str, Adapter],
    gradients: Mapping[str, Adapter],
    betas: tuple[float, float],
    wanted: Bool[Array, ""],
) -> tuple[Averages, Bool[Array, ""]]:
    """Return the same, computed in a branch, and in a loop for each large role."""
    roles, separate = averages[0].roles, not isinstance(weights, ByRole)
    joined = [role for role in roles.members if separate and len(role.paths) > 1]
    large = {
        role: [(weights[path], gradients[path]) for path in role.paths]
        for role in joined
        if _is_large(averages[0].stacked[role.name])
    }
    others = [role for role in roles.members if role not in large]

    def parts(group: Sequence[Role]) -> tuple[ByRole, Mapping[str, Adapter], Mapping[str, Adapter]]:
        return part_of(averages[0], group), part_of(weights, group), part_of(gradients, group)

    raw = _raw_by_role(*parts(others))
    lams = {role: _raw_lam(role, members) for role, members in large.items()}
    largest = [per_triplet(LARGEST, raw), *(lam.ravel() for lam in lams.values())]
    finite = _all_finite([*largest, *map(_largest, large.values())])

    def updated() -> Averages:
        # Unless members must be joined, computing |w · g| again is cheaper than storing it.
        again = _raw_by_role(*parts([role for role in others if role not in joined]))
        return _smoothed(ByRole({**raw.stacked, **again.stacked}, raw.roles), old, betas)

    old = part_of(averages[0], others), part_of(averages[1], others)
    wanted = finite & wanted
    new = [dict(part.stacked) for part in jax.lax.cond(wanted, updated, lambda: old)]
    for role, members in large.items():
        of_role = averages[0].stacked[role.name], averages[1].stacked[role.name]
        found = _in_place(role, of_role, members, lams[role], betas, wanted)
        for values, value in zip(new, found):
            values[role.name] = value
    return (ByRole(new[0], roles), ByRole(new[1], roles)), finite


def _raw_lam(role: Role, members: Members) -> Float32[Array, "..."]:
    """Return ``|w · g|`` of the λ of a role."""
    lams = ([adapter.lam for adapter in each] for each in zip(*members))
    return raw_sensitivity(*(jnp.stack(each, _axis(role, members)) for each in lams))


def _axis(role: Role, members: Members) -> int:
    """Return the axis of the members in the arrays of a role."""
    return members[0][0].lam.ndim - len(role.shape)


def _largest(members: Members) -> Float32[Array, " n"]:
    """Return maxima of ``|w · g|`` of all p and q, without storing ``|w · g|``."""
    groups = [members[i : i + GROUP] for i in range(0, len(members), GROUP)]
    rows = [
        functools.reduce(
            jnp.maximum, [raw_sensitivity(getattr(w, name), getattr(g, name)) for w, g in group]
        )
        for group in groups
        for name in ("p", "q")
    ]
    return jnp.concatenate([jnp.max(row, axis=-1).ravel() for row in rows])


def _in_place(
    role: Role,
    averages: tuple[Adapter, Adapter],
    members: Members,
    lam: Float32[Array, "..."],
    betas: tuple[float, float],
    wanted: Bool[Array, ""],
) -> tuple[Adapter, Adapter]:
    """Return the new averages of a role, updated in place, few triplets of all members at a time.

    Their sensitivities fit the cache of a CPU; new memory for those of all triplets would take
    longer than the rest. XLA updates the arrays of a loop in place if they are not read again. It
    does not know that the two indices are equal. If it did, it would read the old Ī for Ū, and
    therefore copy it. The loop is not in a branch, because XLA uses one core for a kernel there.

    Args:
      role: the role, of shape ``[*stack, r]``.
      averages: the role's Ī and Ū.
      members: the weight and the gradient of each member.
      lam: ``|w · g|`` of λ, ``[n, *stack, r]``.
      betas: β1 and β2.
      wanted: whether the averages change.
    """
    size = 2 - role.shape[-1] % 2  # triplets at a time
    at = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=size, axis=-2)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=-2)

    @jax.jit  # traced once per shape
    def product(weight: Array, gradient: Array, index: Array) -> Array:
        return raw_sensitivity(at(weight, index), at(gradient, index))

    def body(state: tuple[Any, ...]) -> tuple[Any, ...]:
        index, same, *old = state
        means, deviations = [], []
        for name, mean, deviation in zip(("p", "q"), *old):
            products = [product(getattr(w, name), getattr(g, name), index) for w, g in members]
            raw = jnp.stack(products, _axis(role, members))
            means.append(put(mean, average(at(mean, index), raw, betas[0]), index))
            change = jnp.abs(raw - at(means[-1], same))
            deviations.append(
                put(deviation, average(at(deviation, index), change, betas[1]), index)
            )
        return index + size, same + size, means, deviations

    end = jnp.where(wanted, role.shape[-1], 0)
    state = 0, jax.lax.optimization_barrier(0), *([old.p, old.q] for old in averages)
    *_, means, deviations = jax.lax.while_loop(lambda state: state[0] < end, body, state)
    old_lams = averages[0].lam, averages[1].lam
    choose = functools.partial(jnp.where, wanted)
    lams = map(choose, smooth(lam, *old_lams, betas), old_lams)
    new = zip(averages, lams, (means, deviations))
    mean, deviation = (old._replace(p=p, lam=lam, q=q) for old, lam, (p, q) in new)
    return mean, deviation


def _is_large(average: Adapter) -> bool:
    """Return whether a role is large; not on a mesh with explicit axes, where rows do not join."""
    return sum(leaf.size for leaf in average) >= LARGE and explicit_mesh(average.p) is None


def _smoothed(raw: ByRole, averages: Averages, betas: tuple[float, float]) -> Averages:
    leaves = zip(*map(jax.tree.leaves, (raw, *averages)))
    new = [smooth(i, mean, deviation, betas) for i, mean, deviation in leaves]
    restored = jax.tree.structure(averages[0]).unflatten
    return restored(mean for mean, _ in new), restored(deviation for _, deviation in new)


def _all_finite(largest: Sequence[Float32[Array, " _"]]) -> Bool[Array, ""]:
    """Return whether these maxima are finite; a maximum with a NaN is NaN."""
    rows = [row.astype(jnp.float32) for row in largest]  # without values, a row is boolean
    # Without the barrier, XLA would reduce each row to a number first.
    return jnp.all(jnp.isfinite(jax.lax.optimization_barrier(jnp.concatenate(rows))))


def _raw_by_role(
    like: ByRole, weights: Mapping[str, Adapter], gradients: Mapping[str, Adapter]
) -> ByRole:
    """Return the sensitivities ``|w · g|`` of one step by role, with the static fields of ``like``.

    The λ of a role are stacked before the product, because XLA's compiler for TPUs would compute
    the product of each in a kernel.
    """

    def product(weight: Adapter, gradient: Adapter) -> Adapter:
        p, q = (raw_sensitivity(*both) for both in ((weight.p, gradient.p), (weight.q, gradient.q)))
        return Adapter(p, weight.lam, q)

    joined = stack_like(like, map_adapters(product, weights, gradients))
    of_lam = stack(like.roles, map_adapters(lambda gradient: gradient.lam, gradients))
    raw = {
        name: a._replace(lam=raw_sensitivity(a.lam, of_lam.stacked[name]))
        for name, a in joined.stacked.items()
    }
    return ByRole(raw, like.roles)
