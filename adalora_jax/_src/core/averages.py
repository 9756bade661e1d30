"""The moving averages of the sensitivities, and whether the sensitivities are finite."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

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
    stored,
)
from adalora_jax._src.core.sensitivity import raw_sensitivity, smooth

Averages = tuple[ByRole, ByRole]  # Ī and Ū
# Parameters of a role from which its members are joined one role at a time on a CPU: together, the
# joined sensitivities would not fit its cache. Smaller ones are joined once, which compiles faster.
LARGE = 2**20


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
    finite = _all_finite(raw)
    choose = functools.partial(jnp.where, finite & wanted)
    return jax.tree.map(choose, _smoothed(raw, averages, betas), averages), finite


def _by_branches(
    averages: Averages,
    weights: Mapping[str, Adapter],
    gradients: Mapping[str, Adapter],
    betas: tuple[float, float],
    wanted: Bool[Array, ""],
) -> tuple[Averages, Bool[Array, ""]]:
    """Return the same, computed in a branch for each large role and in one for all others.

    Within one branch, XLA's scheduler for CPUs would join the members of all roles before it uses
    any of them, and so write all sensitivities to memory and read them again.
    """
    roles, separate = averages[0].roles, not isinstance(weights, ByRole)
    joined = [role for role in roles.members if separate and len(role.paths) > 1]
    alone = [role for role in joined if _is_large(averages[0].stacked[role.name])]
    others = [role for role in roles.members if role not in alone]

    def before(group: Sequence[Role]) -> Averages:
        return part_of(averages[0], group), part_of(averages[1], group)

    def parts(group: Sequence[Role]) -> tuple[ByRole, Mapping[str, Adapter], Mapping[str, Adapter]]:
        return part_of(averages[0], group), part_of(weights, group), part_of(gradients, group)

    raw = _raw_by_role(*parts(others))
    finite = _all_finite(raw) & _products_finite(*parts(alone)[1:])

    def updated(group: Sequence[Role]) -> Averages:
        # Unless small members must be joined, computing |w · g| again is cheaper than storing it.
        again = _raw_by_role(*parts([r for r in group if r in alone or r not in joined]))
        old = before(group)
        known = {**raw.stacked, **again.stacked}
        return _smoothed(ByRole(known, old[0].roles), old, betas)

    changed: tuple[dict[str, Adapter], dict[str, Adapter]] = {}, {}
    for group in filter(None, [others, *([role] for role in alone)]):
        new = jax.lax.cond(
            finite & wanted,
            functools.partial(updated, group),
            functools.partial(before, group),
        )
        for values, part in zip(changed, new):
            values.update(part.stacked)
    return (ByRole(changed[0], roles), ByRole(changed[1], roles)), finite


def _is_large(average: Adapter) -> bool:
    """Return whether a role is large; not on a mesh with explicit axes, where rows do not join."""
    return sum(leaf.size for leaf in average) >= LARGE and explicit_mesh(average.p) is None


def _smoothed(raw: ByRole, averages: Averages, betas: tuple[float, float]) -> Averages:
    leaves = zip(*map(jax.tree.leaves, (raw, *averages)))
    new = zip(*(smooth(i, mean, deviation, betas) for i, mean, deviation in leaves))
    sensitivity, uncertainty = map(jax.tree.structure(averages[0]).unflatten, new)
    return sensitivity, uncertainty


def _all_finite(raw: ByRole) -> Bool[Array, ""]:
    return jnp.all(per_triplet(jnp.all, jax.tree.map(jnp.isfinite, raw)))


def _products_finite(
    weights: Mapping[str, Adapter], gradients: Mapping[str, Adapter]
) -> Bool[Array, ""]:
    """Return the same, without storing the sensitivities."""
    pairs = zip(*(jax.tree.leaves(stored(values)) for values in (weights, gradients)))
    rows = [jnp.all(jnp.isfinite(raw_sensitivity(*pair)), axis=-1).ravel() for pair in pairs]
    # Without the barrier, XLA would reduce each row to a number first.
    return jnp.all(jax.lax.optimization_barrier(jnp.concatenate([jnp.ones(1, bool), *rows])))


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
