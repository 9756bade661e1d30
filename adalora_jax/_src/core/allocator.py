"""The rank allocator: scores, budget and masks over all adapters together."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.schedule import budget, cost
from adalora_jax._src.core.scores import (
    ScoreInputs,
    finite_batch,
    largest,
    representable,
    smooth_batch,
    triplet_scores,
)
from adalora_jax._src.core.selection import (
    apply_threshold,
    concatenate,
    find_threshold,
    rank_scores,
)


class AllocatorState(NamedTuple):
    """The allocator's state between steps; its leaves have constant shapes and dtypes.

    ``masks``, ``sensitivity`` and ``uncertainty`` are trees in the containers of the parameters.
    Instead of each adapter they have a boolean array ``[..., r]`` (``masks``) or an
    :class:`Adapter` of float32 moving averages; instead of any other leaf, None.

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
    """

    step: jax.Array
    budget: jax.Array
    masks: PyTree
    sensitivity: PyTree
    uncertainty: PyTree
    applied: jax.Array
    overridden: jax.Array
    penalty: jax.Array
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
      ValueError: ``adapters`` contains no adapter, or all triplets together cost 2³¹ or more.
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
    adapters = pytree.extract_adapters(params)
    if not jax.tree.leaves(adapters):
        raise ValueError(
            f"no adapter was found in the {type(params).__name__} of parameters: pass the adapters "
            "that adapt(...).init returned, or an NNX state filtered by nnx.LoRAParam."
        )
    # zeros_like and ones_like give the state the shardings of the parameters.
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), adapters)
    masks = pytree.map_adapters(lambda adapter: jnp.ones_like(adapter.lam, bool), adapters)
    return AllocatorState(
        step=jnp.zeros((), jnp.int32),
        budget=current_budget(config, jnp.zeros((), jnp.int32), adapters),
        masks=masks,
        sensitivity=zeros(),
        uncertainty=zeros(),
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
    adapters = pytree.extract_adapters(state.adapters)
    gradients = check_gradients(with_facts(grads, state.adapters), state.adapters)
    step = jnp.asarray(step, jnp.int32)
    allocator = update_allocator(state.allocator, adapters, gradients, step)
    now = masks_applied(state.allocator, step)
    done = allocator.step != state.allocator.step  # False if a gradient is not finite
    allocator = allocator._replace(applied=jnp.where(done, now, allocator.applied))
    columns = (pytree.adapter_leaves(adapters), pytree.adapter_leaves(allocator.masks))
    masked = pytree.map_groups(
        functools.partial(_masked_batch, now), pytree.group_by_shape(*columns), *columns
    )
    adapters = pytree.replace_adapters(state.adapters, pytree.unflatten_adapters(adapters, masked))
    return AdaLoraState(adapters, allocator), allocator.masks


def update_allocator(
    state: AllocatorState,
    weights: PyTree,
    gradients: PyTree,
    step: jax.Array,
) -> AllocatorState:
    """Return the allocator's next state, from adapters and gradients in canonical form.

    Before the final phase the averages are updated with ``|w · g|``. When a mask is due, the
    highest-scoring triplets of all adapters are kept within the budget b(t). The state does not
    change if any ``w · g`` is not finite.
    """
    config = state.config
    given = pytree.adapter_leaves(weights), pytree.adapter_leaves(gradients)
    batches = pytree.group_by_shape(*given)
    paths = list(pytree.adapters(weights))
    roles = [role for batch in batches for role in pytree.by_role(batch, paths)]
    finite = [finite_batch(*pytree.gather(role, *given)) for role in roles]
    finite = jnp.all(jnp.stack(finite))

    def new_averages():
        averages = (
            pytree.adapter_leaves(state.sensitivity),
            pytree.adapter_leaves(state.uncertainty),
        )
        update = functools.partial(smooth_batch, config=config)
        pairs = pytree.map_groups(update, batches, *given, *averages)
        return tuple(
            pytree.match_containers(part, [pair[i] for pair in pairs])
            for i, part in enumerate((state.sensitivity, state.uncertainty))
        )

    # Not jnp.where, which reads and writes all averages even if they do not change.
    sensitivity, uncertainty = jax.lax.cond(
        finite & (step < config.total_step - config.tfinal),
        new_averages,
        lambda: (state.sensitivity, state.uncertainty),
    )
    allowed = current_budget(config, step, weights)

    new_masks = functools.partial(
        best_masks, state, weights, gradients, sensitivity, uncertainty, allowed
    )
    masks = jax.lax.cond(
        finite & is_mask_step(config, step, state.step), new_masks, lambda: state.masks
    )
    return state._replace(
        step=jnp.where(finite, step + 1, state.step),
        # Fixed from the final mask on, because compaction may remove adapters from the count.
        budget=jnp.where(finite & (state.step <= config.final_step), allowed, state.budget),
        masks=masks,
        sensitivity=sensitivity,
        uncertainty=uncertainty,
    )


def best_masks(
    state: AllocatorState,
    weights: PyTree,
    gradients: PyTree,
    sensitivity: PyTree,
    uncertainty: PyTree,
    allowed: jax.Array,
) -> PyTree:
    """Return new masks: the highest-scoring triplets of all adapters within the budget.

    Args:
      state: the allocator's state; with ``allow_regrowth=False`` its masks limit the selection.
      weights, gradients, sensitivity, uncertainty: inputs of the scores, in canonical form.
      allowed: the budget, in ``config.budget_unit``.
    """
    config = state.config
    evidence = [
        pytree.adapter_leaves(part) for part in (weights, gradients, sensitivity, uncertainty)
    ]
    batches = pytree.group_by_shape(*evidence[:2])
    factor: ArrayLike = 1
    if config.score == "sensitivity_uncertainty":
        of_lam = [adapter.lam for part in evidence[2:] for adapter in part]
        factor = representable(largest(of_lam))
    scored = functools.partial(_score_groups, factor, config=config)
    scores = pytree.map_groups(scored, batches, *evidence)
    dtype = jnp.result_type(*{score.dtype for score in scores})
    none, before = [None] * len(scores), pytree.adapter_leaves(state.masks)
    limits = _limits(config, weights, allowed) or none
    alive = none if config.allow_regrowth else before
    costs = none if config.budget_unit == "triplets" else _costs(config, weights)
    columns = (scores, limits, alive, costs)
    parts = [_ranked_scores(*pytree.gather(batch, *columns), dtype) for batch in batches]
    where = find_threshold(concatenate([row for row, _ in parts]), allowed)
    entries = pytree.scatter(batches, [entries for _, entries in parts])
    masks = [_sharded_like(*pair) for pair in zip(apply_threshold(entries, where), before)]
    return jax.tree.structure(state.masks).unflatten(masks)


@functools.partial(jax.jit, static_argnames="config")
def _score_groups(factor, weights, gradients, sensitivity, uncertainty, config):
    rows = zip(weights, gradients, sensitivity, uncertainty)
    return [triplet_scores(ScoreInputs(*row), config, factor) for row in rows]


@functools.partial(jax.jit, static_argnames="dtype")
def _ranked_scores(scores, limits, alive, costs, dtype):
    """Return a batch's entries for the selection, concatenated and one per adapter."""
    rows = zip(scores, limits, alive, costs)
    entries = [rank_scores(score.astype(dtype), *rest) for score, *rest in rows]
    return concatenate(entries), entries


def is_mask_step(config: AdaLoraConfig, step: jax.Array, next_step: jax.Array) -> jax.Array:
    """Return whether a new mask is due at ``step``, given the state's ``step`` before the update.

    A mask is due at multiples of ``deltaT`` in the budgeting phase, and once at or after
    ``config.final_step``.
    """
    budgeting = (step > config.tinit) & (step < config.final_step) & (step % config.deltaT == 0)
    return budgeting | ((step >= config.final_step) & (next_step <= config.final_step))


def masks_applied(before: AllocatorState, step: jax.Array) -> jax.Array:
    """Return whether the masks are applied at ``step``; otherwise pruned λ may grow back."""
    config = before.config
    held = config.freeze_pruned or not config.allow_regrowth
    return is_mask_step(config, step, before.step) | (step >= config.final_step) | held


def _sharded_like(mask: jax.Array, before: jax.Array) -> jax.Array:
    sharding = jax.typeof(before).sharding
    return jax.sharding.reshard(mask, sharding) if sharding.mesh.are_all_axes_explicit else mask


def _masked(now, adapter, mask):
    lam = jnp.where(mask | ~jnp.asarray(now), adapter.lam, jnp.zeros((), adapter.lam.dtype))
    return adapter._replace(lam=lam)


@jax.jit
def _masked_batch(now, adapters, masks):
    return [_masked(now, *pair) for pair in zip(adapters, masks)]


def with_facts(grads: PyTree, params: PyTree) -> PyTree:
    """Return ``grads`` with the scale and layout of the parameters in each :class:`Adapter`.

    Gradients constructed as ``Adapter(p, lam, q)`` have default metadata. Scale and layout are part
    of a pytree's structure, so JAX would reject them as a different structure.
    """
    known = pytree.adapters(params)

    def like(path, node):
        adapter = known.get(pytree.path_name(path))
        if adapter is None or not isinstance(node, Adapter):
            return node
        return node._replace(scale=adapter.scale, layout=adapter.layout)

    is_leaf = lambda node: isinstance(node, Adapter)
    return jax.tree_util.tree_map_with_path(like, grads, is_leaf=is_leaf)


def check_gradients(grads: PyTree, params: PyTree) -> PyTree:
    """Return the gradients of the adapters in canonical form, checked against the adapters.

    Raises:
      ValueError: an adapter has no gradient or one of another shape, or a gradient has no adapter;
        the message names them.
    """
    have, want = pytree.adapters(grads), pytree.adapters(params)
    problems = [f"{path} has no gradient" for path in want if path not in have]
    problems += [f"{path} is no adapter" for path in have if path not in want]
    for path in want:
        for name in Adapter._fields if path in have else ():
            shapes = [tuple(getattr(a[path], name).shape) for a in (have, want)]
            if shapes[0] != shapes[1]:
                problems.append(f"{path}.{name} has shape {shapes[1]}, its gradient {shapes[0]}")
    if problems:
        shown = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise ValueError(
            f"grads do not match the adapters: {shown}. Differentiate with respect to the same "
            "tree that is trained."
        )
    return pytree.extract_adapters(grads)


def _limits(
    config: AdaLoraConfig, adapters: PyTree, allowed: jax.Array
) -> list[tuple[ArrayLike, ArrayLike]] | None:
    """Return ``(min_r, max_r)`` of every adapter; None without limits.

    Allocation per adapter is expressed as limits, too: every matrix keeps an equal number of
    triplets, and the remainder of the budget goes to the best next triplets, one per matrix.
    """
    if config.allocation == "per_adapter":
        share = allowed // _cost_per_rank(config, adapters)
        return [(share, share + 1) for _ in pytree.adapters(adapters)]
    if not config.rank_overrides:
        return None
    specs = [config.spec_of(path) for path in pytree.adapters(adapters)]
    return [(spec.min_r, spec.max_r) for spec in specs]


def current_budget(config: AdaLoraConfig, step: jax.Array, adapters: PyTree) -> jax.Array:
    """Return b(step) of these adapters, in ``config.budget_unit``."""
    costs, found = _costs(config, adapters), pytree.adapters(adapters).values()
    initial = sum(c * adapter.lam.size for c, adapter in zip(costs, found))
    if initial >= 2**31:
        raise ValueError(
            f"budget_unit={config.budget_unit!r}: all triplets together cost {initial}, more than "
            "an int32 can count; give a function that counts in thousands."
        )
    return budget(config, step, _cost_per_rank(config, adapters), initial=initial)


def _cost_per_rank(config: AdaLoraConfig, adapters: PyTree) -> int:
    """Return the total cost of one triplet per matrix; in triplets, the number of matrices."""
    costs, found = _costs(config, adapters), pytree.adapters(adapters).values()
    return sum(c * math.prod(a.lam.shape[:-1]) for c, a in zip(costs, found))


def _costs(config: AdaLoraConfig, adapters: PyTree) -> list[int]:
    found = pytree.adapters(adapters).items()
    return [cost(config, path, a.q.shape[-1], a.p.shape[-1]) for path, a in found]


def map_state(
    tx: optax.GradientTransformation,
    function: Callable[[Any, Any], Any],
    on_mask: Callable[[str, Any], Any],
    opt_state: PyTree,
    rest: PyTree,
    other: Callable[[Any], Any] = lambda leaf: leaf,
) -> PyTree:
    """Map over an optimizer's state by the parameter that each leaf belongs to, not by its name.

    Args:
      tx: the optimizer.
      function: called with a leaf that belongs to a parameter, and that parameter's leaf of
        ``rest``.
      on_mask: called with the path of an adapter, and its mask.
      opt_state: the state of ``tx``.
      rest: a tree in the structure of the parameters; its leaves are not None.
      other: called with every other leaf.

    Raises:
      ValueError: the optimizer stores something else per parameter than one leaf, or the state is
        not that of ``tx``.
    """
    is_state = lambda node: isinstance(node, AllocatorState)
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    averages = ("sensitivity", "uncertainty")
    plain = jax.tree.map(lambda leaf: False, rest)

    def whole(node):  # map_params needs trees in the parameters' structure, without None
        if not is_state(node):
            return node
        return node._replace(
            **{n: pytree.replace_adapters(plain, getattr(node, n)) for n in averages}
        )

    def adapters_only(node):
        if not is_state(node):
            return node
        masks = [
            on_mask(path, mask)
            for path, mask in pytree.leaves_with_path(originals[id(node.config)]).items()
        ]
        structure = jax.tree.structure(originals[id(node.config)])
        own = {n: pytree.extract_adapters(getattr(node, n)) for n in averages}
        return node._replace(masks=structure.unflatten(masks), **own)

    originals = {id(state.config): state.masks for state in allocator_states(opt_state)}
    mapped = lambda leaf, own: leaf if leaf is False or is_masked(leaf) else function(leaf, own)
    others = lambda node: jax.tree.map(lambda leaf: leaf if leaf is False else other(leaf), node)
    try:
        state = optax.tree.map_params(
            tx,
            mapped,
            jax.tree.map(whole, opt_state, is_leaf=is_state),
            rest,
            transform_non_params=others,
            is_leaf=is_masked,
        )
    except (TypeError, AttributeError, ValueError) as error:
        if str(error).startswith("opt_state"):
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            "opt_state: optax.tree.map_params cannot tell what belongs to which parameter. Either "
            "it is not the state that this tx has for these parameters; or the optimizer keeps "
            "something of them that is not one array for each (as sm3); or its labels are a "
            "function that needs the parameters (partition, masked): give the labels as a tree, or "
            "compact(params, opt_state) the parameters alone and start anew with tx.init "
            f"({reason})."
        ) from error
    return jax.tree.map(adapters_only, state, is_leaf=is_state)


def allocator_states(opt_state: PyTree) -> list[AllocatorState]:
    """Return every :class:`AllocatorState` in a nested optax state."""
    is_state = lambda node: isinstance(node, AllocatorState)
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    return [
        pytree.unwrap_variables(state) for state in found
    ]  # nnx.Optimizer stores leaves as Variables


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
            f"opt_state holds {len(found)} AllocatorStates instead of one: pass the state of an "
            "optimizer that was wrapped by adalora(...) once; arguments are (opt_state, params) "
            "for eval_params and finish, (params, opt_state) for compact and summary."
        )
    return found[0]
