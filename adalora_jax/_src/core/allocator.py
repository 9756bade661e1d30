"""The rank allocator: scores, budget and masks over all adapters together."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float32, Int32, Shaped

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.averages import update_averages
from adalora_jax._src.core.config import AdaLoraConfig, check_config
from adalora_jax._src.core.low_rank import reshard
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.roles import (
    ByRole,
    Role,
    group_by_role,
    map_adapters,
    shapes_by_path,
    stack,
    stack_like,
    stored,
)
from adalora_jax._src.core.schedule import budget, cost
from adalora_jax._src.core.scores import (
    ScoreInputs,
    needed_inputs,
    representable,
    triplet_scores,
)
from adalora_jax._src.core.selection import (
    RankedScores,
    apply_threshold,
    concatenate,
    find_threshold,
    rank_scores,
    replicate,
)


class AllocatorState(NamedTuple):
    """The allocator's state between steps; its leaves have constant shapes and dtypes.

    ``masks``, ``sensitivity`` and ``uncertainty`` are mappings by path, in the order of the
    parameters, whose arrays are stored by role: adapters whose paths differ only in numbers, and
    whose shapes and dtypes are equal, are one array with a leading axis, as ``nn.scan`` would make
    them. So the number of repeated layers does not show in the compiled update.

    Attributes:
      step: int32 scalar: number of updates so far, which is the index of the next step.
      budget: int32 scalar: the budget at the last step, in ``config.budget_unit``.
      masks: booleans ``[..., r]`` per adapter: True for an active triplet.
      sensitivity: Ī, the smoothed sensitivity ``|w · g|`` of every parameter (`AdaLoRA, Eq. (9)
        <https://arxiv.org/abs/2303.10512>`_).
      uncertainty: Ū, the smoothed deviation of the sensitivity from Ī (`AdaLoRA, Eq. (10)
        <https://arxiv.org/abs/2303.10512>`_).
      applied: boolean scalar: True if the last update set pruned λ to 0.
      overridden: int32 scalar: the largest number of pruned λ found so far that were not 0 although
        an update had set them to 0. A value above 0 means that something changes the updates after
        this transformation.
      penalty: float32 scalar: the orthogonality penalty with ``config.orth_reg_in_update``, else 0.
      config: the config of the run; static.

    >>> from adalora_jax import init_adapter
    >>> config = AdaLoraConfig(total_step=4, init_r=3, target_r=2)
    >>> adapters = {"query": init_adapter(jax.random.key(0), 6, 5, config)}
    >>> state = init_state(adapters, config).allocator
    >>> int(state.step), int(state.budget), state.masks["query"].tolist()
    (0, 3, [True, True, True])
    """

    step: Int32[Array, ""]
    budget: Int32[Array, ""]
    masks: ByRole
    sensitivity: ByRole
    uncertainty: ByRole
    applied: Bool[Array, ""]
    overridden: Int32[Array, ""]
    penalty: Float32[Array, ""]
    config: AdaLoraConfig


jax.tree_util.register_static(AdaLoraConfig)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["adapters", "allocator"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class AdaLoraState:
    """The adapters and the allocator's state, as :func:`allocate` takes and returns them.

    Attributes:
      adapters: a tree with adapters in it.
      allocator: the allocator's state, which includes the (static) config.

    >>> from adalora_jax import init_adapter
    >>> config = AdaLoraConfig(total_step=4)
    >>> state = init_state({"query": init_adapter(jax.random.key(0), 6, 5, config)}, config)
    >>> list(state.adapters), state.allocator.config == config
    (['query'], True)
    """

    adapters: PyTree
    allocator: AllocatorState


def init_state(adapters: PyTree, config: AdaLoraConfig) -> AdaLoraState:
    """Return the initial :class:`AdaLoraState`: a copy of ``adapters``, all triplets active.

    Args:
      adapters: a tree with adapters in it; other leaves are copied, too.
      config: the config of the run.

    Returns:
      The state before step 0, with moving averages of 0 and the initial budget.

    Raises:
      TypeError: ``config`` is not an :class:`AdaLoraConfig`.
      ValueError: ``adapters`` contains no adapter, or all triplets together cost 2³¹ or more.

    >>> from adalora_jax import init_adapter
    >>> config = AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": init_adapter(jax.random.key(0), 6, 5, config)}
    >>> int(init_state(adapters, config).allocator.budget)
    4
    """
    return AdaLoraState(jax.tree.map(jnp.copy, adapters), init_allocator(adapters, config))


def init_allocator(params: PyTree, config: AdaLoraConfig) -> AllocatorState:
    """Return the allocator's state before the first step: all triplets active, averages 0.

    Args:
      params: a tree with adapters in it; other leaves are ignored.
      config: the config of the run, which determines the initial budget.

    Raises:
      ValueError: ``params`` contains no adapter, or all triplets together cost 2³¹ or more.
    """
    way_out = (
        "pass the adapters that adapt(...).init returned, or an NNX state filtered by nnx.LoRAParam"
    )
    check_config(config)
    adapters = pytree.require_adapters(params, "params", way_out, pytree.trained_adapters)
    roles = adapters.roles if isinstance(adapters, ByRole) else group_by_role(adapters)

    # zeros_like and ones_like give the state the shardings of the parameters.
    def zeros(leaf: Shaped[Array, "*axes"]) -> Float32[Array, "*axes"]:
        return jnp.zeros_like(leaf, jnp.float32)

    def averages() -> ByRole:
        return stack(roles, map_adapters(functools.partial(jax.tree.map, zeros), adapters))

    active = map_adapters(lambda adapter: jnp.ones_like(adapter.lam, bool), adapters)
    return AllocatorState(
        step=jnp.zeros((), jnp.int32),
        budget=current_budget(config, jnp.zeros((), jnp.int32), adapters),
        masks=stack(roles, active),
        sensitivity=averages(),
        uncertainty=averages(),
        applied=jnp.zeros((), bool),
        overridden=jnp.zeros((), jnp.int32),
        penalty=jnp.zeros((), jnp.float32),
        config=config,
    )


@jax.jit
def allocate(state: AdaLoraState, grads: PyTree, step: ArrayLike) -> tuple[AdaLoraState, PyTree]:
    """Update the allocator by one step: moving averages, budget and masks. Jitted.

    Call it once per optimizer step, after the optimizer updated the adapters (with
    ``sensitivity_timing="current"``: before). With the default config, a call in the budgeting
    phase computes::

        I ← |w · g|                                       (8)
        Ī ← β1 Ī + (1 − β1) I                             (9)
        Ū ← β2 Ū + (1 − β2) |I − Ī|                       (10)
        s = Ī · Ū                                         (11)
        S_i = s(λ_i) + mean_j s(p_ij) + mean_j s(q_ij)    (7)
        λ_i ← λ_i if S_i is among the top b(t), else 0    (6)

    with the numbers of the equations in `AdaLoRA <https://arxiv.org/abs/2303.10512>`_ and the cubic
    schedule b(t) of :func:`adalora_jax.budget`. All triplets of all adapters compete for b(t).

    A new mask is made at multiples of ``deltaT`` in the budgeting phase, and at the final step. The
    current masks are applied to the returned adapters (pruned λ exactly 0) when a new mask is due,
    at all steps from the final mask on, and with ``freeze_pruned`` at all steps. At other steps of
    the budgeting phase a pruned λ may grow back, so that its triplet can be revived. With
    ``allow_regrowth=False`` a mask selects among the active triplets only, and pruned λ stay 0.

    If any ``w · g`` is not finite, the allocator's state does not change.

    Args:
      state: adapters, allocator state and config.
      grads: the gradients of this step, in the structure of the adapters.
      step: the optimizer step, counted from 0; a Python int or an integer scalar, may be traced.
        Steps may be skipped: without a call at the final step, the next call makes the final mask.

    Returns:
      ``(state, masks)``: the new state, and its masks ``[..., r]``, True for an active triplet.

    Raises:
      ValueError: structure or shapes of ``grads`` are not those of the adapters.

    >>> import jax, jax.numpy as jnp
    >>> from adalora_jax import init_adapter
    >>> config = AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": init_adapter(jax.random.key(0), 6, 5, config)}
    >>> state = init_state(adapters, config)
    >>> grads = jax.tree.map(jnp.ones_like, adapters)
    >>> for step in range(4):
    ...     state, masks = allocate(state, grads, step)
    >>> int(masks["query"].sum())
    2
    """
    adapters = pytree.trained_adapters(state.adapters)
    gradients = check_gradients(grads, adapters)
    step = jnp.asarray(step, jnp.int32)
    allocator = update_allocator(state.allocator, adapters, gradients, step)
    now = masks_applied(state.allocator, step)
    done = allocator.step != state.allocator.step  # False if a gradient is not finite
    allocator = allocator._replace(applied=jnp.where(done, now, allocator.applied))

    def masked(a: Adapter, mask: Bool[Array, "*stack r"]) -> Adapter:
        return a._replace(lam=jnp.where(mask | ~now, a.lam, jnp.zeros((), a.lam.dtype)))

    new = map_adapters(masked, adapters, allocator.masks)
    result = AdaLoraState(pytree.insert_adapters(state.adapters, new), allocator)
    return result, pytree.insert_values(state.adapters, allocator.masks)


def update_allocator(
    state: AllocatorState,
    weights: Mapping[str, Adapter],
    gradients: Mapping[str, Adapter],
    step: Int32[Array, ""],
) -> AllocatorState:
    """Return the allocator's next state, from ``{path: Adapter}`` of weights and gradients.

    Before the final phase the averages are updated with ``|w · g|``. When a mask is due, the
    highest-scoring triplets of all adapters are kept within the budget b(t). The state does not
    change if any ``w · g`` is not finite.
    """
    config = state.config
    (sensitivity, uncertainty), finite = update_averages(
        (state.sensitivity, state.uncertainty),
        weights,
        gradients,
        (config.beta1, config.beta2),
        wanted=step < config.total_step - config.tfinal,
    )
    allowed = current_budget(config, step, weights)
    new_state = state._replace(sensitivity=sensitivity, uncertainty=uncertainty)
    masks = jax.lax.cond(
        finite & is_mask_step(config, step, state.step),
        lambda: best_masks(new_state, weights, gradients, allowed),
        lambda: state.masks,
    )
    return new_state._replace(
        step=jnp.where(finite, step + 1, state.step),
        # Fixed from the final mask on, because compaction may remove adapters from the count.
        budget=jnp.where(finite & (state.step <= config.final_step), allowed, state.budget),
        masks=masks,
    )


def best_masks(
    state: AllocatorState,
    weights: Mapping[str, Adapter],
    gradients: Mapping[str, Adapter],
    allowed: Int32[Array, ""],
) -> ByRole:
    """Return new masks: the highest-scoring triplets of all adapters within the budget.

    Args:
      state: the source of the averages; with ``allow_regrowth=False`` its masks limit the
        selection.
      weights, gradients: ``{path: Adapter}``, for the scores that depend on them.
      allowed: the budget, in ``config.budget_unit``.
    """
    config, roles = state.config, state.masks.roles
    scores = role_scores(state, weights, gradients)
    weights = shapes_by_path(weights)
    dtype = jnp.result_type(*{score.dtype for score in scores.values()})
    limits, costs = _limits(config, weights, allowed), _costs(config, weights)

    def ranked(role: Role) -> RankedScores:
        def along(each: Mapping[str, ArrayLike]) -> Shaped[Array, "..."]:
            return jnp.stack([jnp.asarray(each[p]) for p in role.paths]).reshape(
                -1, *[1] * len(role.shape)
            )

        return rank_scores(
            scores[role.name].astype(dtype),
            None if limits is None else (along(limits[0]), along(limits[1])),
            None if config.allow_regrowth else state.masks.stacked[role.name],
            None if config.budget_unit == "triplets" else along(costs),
        )

    entries = [ranked(role) for role in roles.members]
    row = concatenate(entries)
    positions = jnp.asarray(roles.positions)
    mask = apply_threshold(row, find_threshold(row, allowed, positions), positions)
    ends = itertools.accumulate(entry.keys.size for entry in entries)
    new = {}
    for role, entry, end in zip(roles.members, entries, ends):
        before = state.masks.stacked[role.name]
        # Otherwise the sharding of a role's mask would propagate to the row and to other roles.
        mask_of_role = replicate(mask[end - entry.keys.size : end].reshape(before.shape))
        new[role.name] = reshard(mask_of_role, before)
    return ByRole(new, roles)


def role_scores(
    state: AllocatorState, weights: Mapping[str, Adapter], gradients: Mapping[str, Adapter]
) -> dict[str, Shaped[Array, "*stack r"]]:
    """Return the scores of all triplets, ``{role: [members, ..., r]}``.

    Args:
      state: the source of the averages.
      weights, gradients: ``{path: Adapter}``; empty where the score does not need them.
    """
    config, averages = state.config, (state.sensitivity, state.uncertainty)
    factor: ArrayLike = 1
    if config.score == "sensitivity_uncertainty":
        lams = [adapter.lam for part in averages for adapter in part.stacked.values()]
        factor = representable(jnp.max(jnp.stack([jnp.max(lam, initial=0) for lam in lams])))
    # A score that needs neither weights nor gradients gets arrays of the same shapes.
    given = [
        stack_like(state.sensitivity, part) if name in needed_inputs(config) else averages[0]
        for name, part in (("params", weights), ("grads", gradients))
    ]
    score = functools.partial(triplet_scores, config=config, factor=factor)
    if callable(config.score):
        score = jax.vmap(score)  # a custom score gets one adapter
    return {
        name: score(ScoreInputs(*(part.stacked[name] for part in (*given, *averages))))
        for name in state.masks.stacked
    }


def is_mask_step(
    config: AdaLoraConfig, step: Int32[Array, ""], next_step: Int32[Array, ""]
) -> Bool[Array, ""]:
    """Return whether a new mask is due at ``step``, given the state's ``step`` before the update.

    A mask is due at multiples of ``deltaT`` in the budgeting phase, and once at or after
    ``config.final_step``.
    """
    budgeting = (step > config.tinit) & (step < config.final_step) & (step % config.deltaT == 0)
    return budgeting | ((step >= config.final_step) & (next_step <= config.final_step))


def masks_applied(before: AllocatorState, step: Int32[Array, ""]) -> Bool[Array, ""]:
    """Return whether the masks are applied at ``step``; otherwise pruned λ may grow back."""
    config = before.config
    held = config.freeze_pruned or not config.allow_regrowth
    return is_mask_step(config, step, before.step) | (step >= config.final_step) | held


def check_gradients(grads: PyTree, adapters: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    """Return the gradients by path, in the order of the adapters, or of their roles, after checks.

    Raises:
      ValueError: an adapter has no gradient or one of another shape, or a gradient has no adapter;
        the message names them.
    """
    found = pytree.trained_adapters(grads)
    given, expected = stored(found), stored(adapters)
    problems = [f"{path} has no gradient" for path in expected if path not in given]
    problems += [f"{path} has a gradient but no adapter" for path in given if path not in expected]
    for path, adapter in expected.items():
        for name in Adapter._fields if path in given else ():
            shapes = [tuple(getattr(a, name).shape) for a in (adapter, given[path])]
            if shapes[0] != shapes[1]:
                problems.append(
                    f"the gradient of {path}.{name} has shape {shapes[1]}, not {shapes[0]}"
                )
    if not problems and isinstance(found, ByRole) != isinstance(adapters, ByRole):
        problems.append("only one of them is stacked by role")
    if problems:
        shown = ", ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise ValueError(
            f"`grads`: do not match the adapters, since {shown}; differentiate with respect to the "
            "same tree that is trained."
        )
    return map_adapters(lambda _, gradient: gradient, adapters, found)


def _limits(
    config: AdaLoraConfig, adapters: Mapping[str, Adapter], allowed: Int32[Array, ""]
) -> tuple[Mapping[str, ArrayLike], Mapping[str, ArrayLike]] | None:
    """Return the ``min_r`` and the ``max_r`` of all adapters by path; None without limits.

    Allocation per adapter is expressed as limits, too: every matrix keeps an equal number of
    triplets, and the remainder of the budget goes to the best next triplets, one per matrix.
    """
    if config.allocation == "per_adapter":
        share = allowed // _cost_per_rank(config, adapters)
        return dict.fromkeys(adapters, share), dict.fromkeys(adapters, share + 1)
    if not config.rank_overrides:
        return None
    specs = {path: config.spec_of(path) for path in adapters}
    least = {path: spec.min_r for path, spec in specs.items()}
    return least, {path: spec.max_r for path, spec in specs.items()}


def current_budget(
    config: AdaLoraConfig, step: Int32[Array, ""], adapters: Mapping[str, Adapter]
) -> Int32[Array, ""]:
    """Return b(step) of these adapters, in ``config.budget_unit``."""
    adapters = shapes_by_path(adapters)
    costs = _costs(config, adapters)
    initial = sum(costs[path] * adapter.lam.size for path, adapter in adapters.items())
    if initial >= 2**31:
        raise ValueError(
            f"`budget_unit={config.budget_unit!r}`: all triplets together cost {initial}, more "
            "than an int32 can count; pass a function that counts in thousands."
        )
    return budget(config, step, _cost_per_rank(config, adapters), initial=initial)


def _cost_per_rank(config: AdaLoraConfig, adapters: Mapping[str, Adapter]) -> int:
    """Return the total cost of one triplet per matrix; in triplets, the number of matrices."""
    costs = _costs(config, adapters)
    return sum(costs[path] * math.prod(a.lam.shape[:-1]) for path, a in adapters.items())


def _costs(config: AdaLoraConfig, adapters: Mapping[str, Adapter]) -> dict[str, int]:
    """Return the cost of one triplet of each adapter."""
    return {p: cost(config, p, a.q.shape[-1], a.p.shape[-1]) for p, a in adapters.items()}


def map_state(
    tx: optax.GradientTransformation,
    function: Callable[[PyTree, PyTree], PyTree],
    on_allocator: Callable[[AllocatorState], AllocatorState],
    opt_state: PyTree,
    rest: PyTree,
    other: Callable[[PyTree], PyTree] = lambda leaf: leaf,
) -> PyTree:
    """Map over an optimizer's state by the parameter that each leaf belongs to, not by its name.

    Args:
      tx: the optimizer.
      function: called with a leaf that belongs to a parameter, and that parameter's leaf of
        ``rest``.
      on_allocator: called with the allocator's state, whose averages and masks are still those of
        ``opt_state``.
      opt_state: the state of ``tx``.
      rest: a tree in the structure of the parameters; its leaves are not None.
      other: called with every other leaf.

    Raises:
      ValueError: the optimizer stores something else per parameter than one leaf, or the state is
        not that of ``tx``.
    """

    def is_masked(node: PyTree) -> bool:
        return isinstance(node, optax.MaskedNode)

    def mapped(leaf: PyTree, rest_leaf: PyTree) -> PyTree:
        return leaf if is_masked(leaf) else function(leaf, rest_leaf)

    def by_role(node: PyTree) -> bool:
        return isinstance(node, ByRole)

    def others(node: PyTree) -> PyTree:
        return jax.tree.map(
            lambda leaf: leaf if by_role(leaf) else other(leaf), node, is_leaf=by_role
        )

    try:
        state = optax.tree.map_params(
            tx, mapped, opt_state, rest, transform_non_params=others, is_leaf=is_masked
        )
    except (TypeError, AttributeError, ValueError) as error:
        if str(error).startswith("`opt_state`"):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            "`opt_state`: optax.tree.map_params cannot assign its leaves to parameters "
            f"({reason}), because tx did not make it for these parameters, an optimizer such as "
            "sm3 stores several arrays per parameter, or the labels of partition or masked are a "
            "function; pass labels as a tree, or use compact(params, opt_state) and a new tx.init."
        ) from error

    def allocated(node: PyTree) -> PyTree:
        return on_allocator(node) if is_allocator_state(node) else node

    return jax.tree.map(allocated, state, is_leaf=is_allocator_state)


def is_allocator_state(node: PyTree) -> bool:
    """Return whether a node of a pytree is an allocator's state."""
    return isinstance(node, AllocatorState)


def allocator_states(opt_state: PyTree) -> list[AllocatorState]:
    """Return every :class:`AllocatorState` in a nested optax state."""
    nodes = jax.tree.leaves(opt_state, is_leaf=is_allocator_state)
    # nnx.Optimizer stores leaves as Variables.
    return [pytree.unwrap_variables(node) for node in nodes if is_allocator_state(node)]


def allocator_state(opt_state: PyTree) -> AllocatorState:
    """Return the :class:`AllocatorState` in a nested optax state or in an ``nnx.Optimizer``.

    Args:
      opt_state: the state of an optimizer that :func:`adalora_jax.adalora` wrapped, at any depth of
        ``optax.chain`` and similar; or an ``nnx.Optimizer``.

    Returns:
      The allocator's state, with the arrays of NNX Variables in place of the Variables.

    Raises:
      ValueError: ``opt_state`` contains no allocator state, or more than one.

    >>> import jax, optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = optax.chain(optax.clip(1.0), adalora.adalora(optax.sgd(0.1), config))
    >>> int(allocator_state(tx.init(adapters)).budget)
    12
    """
    found = allocator_states(opt_state)
    if len(found) != 1:
        raise ValueError(
            f"`opt_state`: holds {len(found)} AllocatorStates instead of one; pass the state of an "
            "optimizer that was wrapped by adalora(...) once. The arguments are (opt_state, "
            "params) for eval_params and finish, (params, opt_state) for compact and summary."
        )
    return found[0]
