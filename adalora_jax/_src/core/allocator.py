"""The allocator: which triplets live, decided over all adapters together."""

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
from adalora_jax._src.core.selection import cut, entry, in_a_row, kept


class AllocatorState(NamedTuple):
    """State that the allocator carries from step to step; leaves keep their shapes and dtypes.

    ``masks``, ``sensitivity`` and ``uncertainty`` have the containers of the adapters' tree: at
    each adapter's place a boolean array ``[..., r]``, or an :class:`Adapter` of float32 moving
    averages, and None at the place of anything that is not an adapter.

    Attributes:
      step: int32 scalar: number of updates so far, so the number of the next step.
      budget: int32 scalar: allowed at the last step, in ``config.budget_unit``.
      masks: the standing decision: True where a triplet is active.
      sensitivity: Ī, the smoothed ``|w · g|``.
      uncertainty: Ū, its smoothed deviation.
      applied: boolean scalar: the last update set pruned λ to 0.
      overridden: int32 scalar: pruned λ that were not 0 although an update had set them to 0: the
        largest number so far. Above 0, something changes updates after this transformation.
      penalty: float32 scalar: the orthogonality penalty, with ``config.orth_reg_in_update``.
      config: of the run; static.
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
    """Adapters and allocator state: all that :func:`allocate` needs.

    Attributes:
      adapters: a tree with adapters in it.
      allocator: the state of the allocator, with the (static) config.
    """

    adapters: PyTree
    allocator: AllocatorState


def init_state(adapters: PyTree, config: AdaLoraConfig) -> AdaLoraState:
    """A fresh :class:`AdaLoraState` around a copy of ``adapters``.

    Raises:
      ValueError: there is no adapter in ``adapters``.
    """
    return AdaLoraState(jax.tree.map(jnp.copy, adapters), init_allocator(adapters, config))


def init_allocator(params: PyTree, config: AdaLoraConfig) -> AllocatorState:
    """The allocator's state before the first step: all triplets live, averages 0.

    Args:
      params: a tree with adapters in it; other leaves are passed over.
      config: for the initial budget.

    Raises:
      ValueError: there is no adapter in ``params``.
    """
    adapters = pytree.canonical(params)
    if not jax.tree.leaves(adapters):
        raise ValueError(
            f"no adapter was found in the {type(params).__name__} of parameters: pass the adapters "
            "that adapt(...).init returned, or an NNX state filtered by nnx.LoRAParam."
        )
    # zeros_like and ones_like: the state is sharded as the parameters are.
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), adapters)
    masks = pytree.each(lambda adapter: jnp.ones_like(adapter.lam, bool), adapters)
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
    """One update of the allocator: importance, budget, masks. Jitted.

    To be called once an optimizer step, after the optimizer moved the adapters (with
    ``sensitivity_at="current"``: before). The masks are the standing decision, at every step. They
    are applied to the returned adapters (pruned λ exactly 0) whenever a new mask was due, at all
    steps from the final mask on, and with ``hold_mask`` at all steps; between two masks of the
    budgeting phase a pruned λ may otherwise grow back, so that it can be revived. With
    ``revive=False`` a mask chooses among those that live, and pruned λ stay 0.

    If any gradient is not finite the allocator's state stays as it was.

    Args:
      state: adapters, allocator state and config.
      grads: the gradients that led to this step, same structure as the adapters.
      step: the optimizer step, counted from 0; Python int or traced. Steps may be skipped: a
        missed final step is made up for at the next call.

    Returns:
      The new state, and its masks.

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
    adapters = pytree.canonical(state.adapters)
    gradients = matching_gradients(with_facts(grads, state.adapters), state.adapters)
    step = jnp.asarray(step, jnp.int32)
    allocator = update_allocator(state.allocator, adapters, gradients, step)
    now = enforced(state.allocator, step)
    done = allocator.step != state.allocator.step  # a bad gradient changes nothing
    allocator = allocator._replace(applied=jnp.where(done, now, allocator.applied))
    columns = (pytree.listed(adapters), pytree.listed(allocator.masks))
    masked = pytree.batched(functools.partial(_masked_batch, now), pytree.alike(*columns), *columns)
    adapters = pytree.insert(state.adapters, pytree.filled(adapters, masked))
    return AdaLoraState(adapters, allocator), allocator.masks


def update_allocator(
    state: AllocatorState,
    weights: PyTree,
    gradients: PyTree,
    step: jax.Array,
) -> AllocatorState:
    """The allocator's next state, from adapters and gradients in canonical form.

    Before the final phase the averages take in ``|w · g|``; when a mask is due the best triplets of
    all adapters are kept, as many as b(t) pays for. Nothing changes where a gradient (or weight) is
    not finite.
    """
    config = state.config
    given = pytree.listed(weights), pytree.listed(gradients)
    batches = pytree.alike(*given)
    paths = list(pytree.adapters(weights))
    roles = [role for batch in batches for role in pytree.by_role(batch, paths)]
    finite = [finite_batch(*pytree.pick(role, *given)) for role in roles]
    finite = jnp.all(jnp.stack(finite))

    def new_averages():
        averages = pytree.listed(state.sensitivity), pytree.listed(state.uncertainty)
        update = functools.partial(smooth_batch, config=config)
        pairs = pytree.batched(update, batches, *given, *averages)
        return tuple(
            pytree.in_containers(part, [pair[i] for pair in pairs])
            for i, part in enumerate((state.sensitivity, state.uncertainty))
        )

    # Not jnp.where, which reads and writes all averages also when they are to stay as they are.
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
        finite & mask_due(config, step, state.step), new_masks, lambda: state.masks
    )
    return state._replace(
        step=jnp.where(finite, step + 1, state.step),
        # Final when the mask is: compaction may leave fewer adapters to count.
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
    """Return new masks: the best triplets of all adapters, as many as ``allowed`` pays for.

    Args:
      state: whose masks count where pruned triplets are not revived.
      weights, gradients, sensitivity, uncertainty: in canonical form, for the scores.
      allowed: the budget, in ``config.budget_unit``.
    """
    config = state.config
    evidence = [pytree.listed(part) for part in (weights, gradients, sensitivity, uncertainty)]
    batches = pytree.alike(*evidence[:2])
    factor: ArrayLike = 1
    if config.score == "sensitivity_uncertainty":
        of_lam = [adapter.lam for part in evidence[2:] for adapter in part]
        factor = representable(largest(of_lam))
    scored = functools.partial(_scored, factor, config=config)
    scores = pytree.batched(scored, batches, *evidence)
    dtype = jnp.result_type(*{score.dtype for score in scores})
    none, before = [None] * len(scores), pytree.listed(state.masks)
    limits = _limits(config, weights, allowed) or none
    alive = none if config.revive else before
    costs = none if config.budget_unit == "triplets" else _costs(config, weights)
    columns = (scores, limits, alive, costs)
    parts = [_entered(*pytree.pick(batch, *columns), dtype) for batch in batches]
    where = cut(in_a_row([row for row, _ in parts]), allowed)
    entries = pytree.spread(batches, [entries for _, entries in parts])
    masks = [_sharded_like(*pair) for pair in zip(kept(entries, where), before)]
    return jax.tree.structure(state.masks).unflatten(masks)


@functools.partial(jax.jit, static_argnames="config")
def _scored(factor, weights, gradients, sensitivity, uncertainty, config):
    rows = zip(weights, gradients, sensitivity, uncertainty)
    return [triplet_scores(ScoreInputs(*row), config, factor) for row in rows]


@functools.partial(jax.jit, static_argnames="dtype")
def _entered(scores, limits, alive, costs, dtype):
    """A batch for the ranking: in a row, and one by one."""
    rows = zip(scores, limits, alive, costs)
    entries = [entry(score.astype(dtype), *rest) for score, *rest in rows]
    return in_a_row(entries), entries


def mask_due(config: AdaLoraConfig, step: jax.Array, next_step: jax.Array) -> jax.Array:
    """Whether a new mask is to be made at ``step``, given the state's ``step`` before it.

    Every ``deltaT`` steps in the budgeting phase, and once at or after ``config.final_step``.
    """
    budgeting = (step > config.tinit) & (step < config.final_step) & (step % config.deltaT == 0)
    return budgeting | ((step >= config.final_step) & (next_step <= config.final_step))


def enforced(before: AllocatorState, step: jax.Array) -> jax.Array:
    """Return whether the masks are to be applied at ``step``; otherwise λ may grow back."""
    config = before.config
    held = config.hold_mask or not config.revive
    return mask_due(config, step, before.step) | (step >= config.final_step) | held


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

    Gradients made by hand, ``Adapter(p, lam, q)``, say nothing of the weight; JAX would find
    another structure in them.
    """
    known = pytree.adapters(params)

    def like(path, node):
        adapter = known.get(pytree.path_name(path))
        if adapter is None or not isinstance(node, Adapter):
            return node
        return node._replace(scale=adapter.scale, layout=adapter.layout)

    is_leaf = lambda node: isinstance(node, Adapter)
    return jax.tree_util.tree_map_with_path(like, grads, is_leaf=is_leaf)


def matching_gradients(grads: PyTree, params: PyTree) -> PyTree:
    """The gradients of the adapters in canonical form, checked against the adapters.

    Raises:
      ValueError: naming the adapters that have no gradient, or one of another shape, and
        gradients without an adapter.
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
    return pytree.canonical(grads)


def _limits(
    config: AdaLoraConfig, adapters: PyTree, allowed: jax.Array
) -> list[tuple[ArrayLike, ArrayLike]] | None:
    """``(min_r, max_r)`` of every adapter; None where nothing is limited.

    Allocation per adapter is that with limits too: the same number for each matrix, and what does
    not divide among them to the best of the next triplets, one a matrix.
    """
    if config.allocation == "per_adapter":
        share = allowed // _one_each(config, adapters)
        return [(share, share + 1) for _ in pytree.adapters(adapters)]
    if not config.rank_limits:
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
    return budget(config, step, _one_each(config, adapters), initial=initial)


def _one_each(config: AdaLoraConfig, adapters: PyTree) -> int:
    """What one triplet of every matrix costs: their number, in triplets."""
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
    """Map over an optimizer's state by what its leaves belong to, not by their names.

    Args:
      tx: the optimizer.
      function: of a leaf that belongs to a parameter, and of that parameter's leaf of ``rest``.
      on_mask: of the path of an adapter and its mask.
      opt_state: the state of ``tx``.
      rest: a tree of the parameters' structure; its leaves are not None.
      other: of all other leaves.

    Raises:
      ValueError: the optimizer keeps something of the parameters that is not one leaf for each.
    """
    is_state = lambda node: isinstance(node, AllocatorState)
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    averages = ("sensitivity", "uncertainty")
    plain = jax.tree.map(lambda leaf: False, rest)

    def whole(node):  # map_params takes trees of the parameters' structure, without None
        if not is_state(node):
            return node
        return node._replace(**{n: pytree.insert(plain, getattr(node, n)) for n in averages})

    def adapters_only(node):
        if not is_state(node):
            return node
        masks = [
            on_mask(path, mask)
            for path, mask in pytree.leaves_with_path(originals[id(node.config)]).items()
        ]
        structure = jax.tree.structure(originals[id(node.config)])
        own = {n: pytree.canonical(getattr(node, n)) for n in averages}
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
    """Return every :class:`AllocatorState` in any nesting of optax states."""
    is_state = lambda node: isinstance(node, AllocatorState)
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    return [pytree.bare(state) for state in found]  # nnx.Optimizer keeps every leaf in a Variable


def allocator_state(opt_state: PyTree) -> AllocatorState:
    """Return the :class:`AllocatorState` in any nesting of optax states, or ``nnx.Optimizer``'s.

    Raises:
      ValueError: there is none, or more than one.

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
