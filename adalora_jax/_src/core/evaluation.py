"""What training decided: masks, the parameters with them applied, and the end of a run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adalora_jax._src.core import pytree
from adalora_jax._src.core.allocator import (
    AllocatorState,
    allocator_state,
    allocator_states,
    best_masks,
    current_budget,
)
from adalora_jax._src.core.pytree import PyTree

NEEDS = {  # of the built-in scores, beside the averages
    "magnitude": ("params",),
    "signal_to_noise": ("params",),
    "sensitivity": ("params", "grads"),
}


def masks(state: Any) -> dict[str, jax.Array]:
    """Return ``{path: [..., r] booleans}``: True where a triplet is active.

    Args:
      state: anything with an :class:`AllocatorState` in it, such as an optimizer's state; an
        :class:`AllocatorInfo`; or such a dict of masks itself.

    Raises:
      ValueError: there is no allocator in it, and it is not made of boolean arrays.

    >>> masks({"query": jnp.array([True, False])})["query"].tolist()
    [True, False]
    """
    found = allocator_states(state)
    if found:
        return {p: mask for s in found for p, mask in pytree.leaves_with_path(s.masks).items()}
    given = getattr(state, "masks", state)
    by_path = pytree.leaves_with_path(given)
    is_mask = lambda leaf: str(getattr(leaf, "dtype", "")) == "bool" and leaf.ndim > 0
    if not by_path or not all(map(is_mask, by_path.values())):
        raise ValueError(
            f"state is a {type(state).__name__} without an AllocatorState in it, and not a dict of "
            "boolean masks: pass the state of an optimizer that adalora(...) wrapped; arguments "
            "are (opt_state, params) for eval_params and finish, (params, opt_state) for compact "
            "and summary."
        )
    return by_path


def eval_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """Return the parameters with the masks applied: evaluate, merge and export these.

    Between two masks a pruned λ may grow back, so the parameters that train are not what the
    allocator decided. Other leaves pass through. Works under ``jit``. Parameters that
    ``optax.contrib.schedule_free`` trains are averaged first, as
    ``schedule_free_eval_params`` does it, whether it is inside of ``adalora`` or around it.

    Args:
      opt_state: with an :class:`AllocatorState` in it, as the optimizer returned it.
      params: what trains: a dict of adapters, a bigger tree, an NNX State; in its containers.

    Returns:
      The containers of ``params``, with λ exactly 0 where a mask is False.

    Raises:
      ValueError: the state holds no allocator, or its masks are for other adapters.

    >>> import optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> opt_state = adalora.adalora(optax.adam(1e-3), config).init(adapters)
    >>> list(eval_params(opt_state, adapters))
    ['query']
    """
    return apply_masks(_schedule_free(opt_state, params), opt_state)


def apply_masks(params: PyTree, state: Any) -> PyTree:
    """Return the tree with λ exactly 0 wherever a mask is False.

    Args:
      params: any tree with adapters in it.
      state: as in :func:`masks`.

    Raises:
      ValueError: a mask is for an adapter that is not there, or of another shape.
    """
    found, by_path = pytree.adapters(params), masks(state)
    lacking = [
        path
        for path, mask in by_path.items()
        if path not in found or found[path].lam.shape != mask.shape
    ]
    if lacking:
        raise ValueError(
            f"opt_state has masks for {', '.join(map(repr, lacking[:5]))}, of which params has no "
            f"adapters of these shapes, only for {', '.join(map(repr, list(found)[:5])) or 'none'}:"
            " pass the state and the parameters of one run, as the optimizer sees them."
        )

    def masked(path, adapter):
        lam = jnp.where(by_path[path], adapter.lam, jnp.zeros((), adapter.lam.dtype))
        return adapter._replace(lam=lam)

    return pytree.insert(params, _by_path(masked, params, by_path))


def _by_path(function: Any, params: PyTree, paths: Any) -> PyTree:
    """Return the canonical tree with ``function(path, adapter)`` at the adapters of these paths."""
    adapters = pytree.canonical(params)
    names = list(pytree.adapters(params))
    listed = pytree.listed(adapters)
    new = [function(n, a) if n in paths else a for n, a in zip(names, listed)]
    return pytree.filled(adapters, new)


def _schedule_free(opt_state: PyTree, params: PyTree) -> PyTree:
    """Return the average that ``schedule_free`` evaluates, or the parameters themselves."""
    state_type = optax.contrib.ScheduleFreeState
    is_state = lambda node: isinstance(node, state_type)
    found = [n for n in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(n)]
    if not found:
        return params
    if len(found) > 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of schedule_free: average the parameters of each "
            "with optax.contrib.schedule_free_eval_params, then apply masks(opt_state)."
        )
    return optax.contrib.schedule_free_eval_params(pytree.bare(found[0]), params)


def finish(opt_state: PyTree, params: PyTree, grads: PyTree | None = None) -> tuple[PyTree, PyTree]:
    """End a run within its budget: make the final mask if it is still to come, and apply it.

    Skipped updates (a loss scale's overflow under ``optax.apply_if_finite``) or a run that stops
    early leave the final mask unmade. It is made from the standing averages, for the budget of
    ``config.final_step``; after the final mask only the masks are applied. Every run may end with
    this call. Works under ``jit``.

    Args:
      opt_state: with one :class:`AllocatorState` in it.
      params: what trains, as the optimizer sees it.
      grads: the last gradients, for scores that look at them (``"sensitivity"`` and functions),
        where the final mask is still to come, or under ``jit``.

    Returns:
      ``(params, opt_state)``, in their containers. Further updates are of the final phase.

    Raises:
      ValueError: no update was made yet, so that nothing is known of any triplet; the score needs
        ``grads``; or the state is for other adapters.

    >>> import jax, jax.numpy as jnp, optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=40, init_r=4, target_r=2)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = adalora.adalora(optax.adam(1e-3), config)
    >>> opt_state = tx.init(adapters)
    >>> grads = jax.tree.map(jnp.ones_like, adapters)
    >>> updates, opt_state = tx.update(grads, opt_state, adapters)
    >>> adapters = optax.apply_updates(adapters, updates)
    >>> adapters, opt_state = finish(opt_state, adapters)
    >>> adalora.ranks(opt_state)
    {'query': 2}
    """
    state = allocator_state(opt_state)
    config = state.config
    if not isinstance(state.step, Tracer) and int(state.step) == 0:
        raise ValueError(
            "opt_state has made no update, so there is nothing to rank triplets by: train first."
        )
    needed = ("grads",) if callable(config.score) else NEEDS.get(config.score, ())
    made = not isinstance(state.step, Tracer) and int(state.step) > config.final_step
    if grads is None and "grads" in needed and not made:
        raise ValueError(
            f"grads=None: score={config.score!r} looks at gradients, which the allocator does not "
            "keep: pass the last ones."
        )
    apply_masks(params, pytree.leaves_with_path(state.masks))  # raises for other adapters
    weights = pytree.canonical(params)
    gradients = weights if grads is None else pytree.canonical(grads)
    allowed = current_budget(config, jnp.asarray(config.final_step, jnp.int32), weights)
    due = state.step <= config.final_step
    make = lambda: best_masks(
        state, weights, gradients, state.sensitivity, state.uncertainty, allowed
    )
    final = state._replace(
        step=jnp.maximum(state.step, config.final_step + 1),
        budget=jnp.where(due, allowed, state.budget),
        masks=jax.lax.cond(due, make, lambda: state.masks),
        applied=jnp.ones((), bool),
    )
    params = apply_masks(params, pytree.leaves_with_path(final.masks))
    is_state = lambda node: isinstance(node, AllocatorState)
    restore = lambda node: pytree.in_containers(node, final) if is_state(node) else node
    return params, jax.tree.map(restore, opt_state, is_leaf=is_state)


def unfinished(state: Any) -> str:
    """Return a sentence that says that the final mask is still to come; empty where it was made.

    >>> unfinished({"query": jnp.array([True])})
    ''
    """
    for found in allocator_states(state):
        step, final = int(found.step), found.config.final_step
        if step <= final:
            return (
                f"opt_state has made {step} updates, but the final mask comes with update "
                f"{final + 1}: ranks may still change"
            )
    return ""


def ranks(state: Any) -> dict[str, int]:
    """Return ``{path: rank}``: each adapter's active triplets, each slice of a stack by itself.

    Args:
      state: as in :func:`adalora_jax.masks`.

    Raises:
      ValueError: as there.

    >>> import jax.numpy as jnp
    >>> ranks({"query": jnp.array([True, False]), "up": jnp.array([[True, True], [False, True]])})
    {'query': 1, 'up[0]': 2, 'up[1]': 1}
    """
    result = {}
    for path, mask in jax.device_get(masks(state)).items():
        active = mask.sum(axis=-1)
        for index in np.ndindex(active.shape):
            result[pytree.row_name(path, index)] = int(active[index])
    return result


def rank_pattern(state: Any) -> dict[str, list]:
    """Return ``{path: [True, False, ...]}``, PEFT's ``rank_pattern``; nested lists for a stack.

    Args:
      state: as in :func:`adalora_jax.masks`.

    >>> import jax.numpy as jnp
    >>> rank_pattern({"query": jnp.array([True, False])})
    {'query': [True, False]}
    """
    return {path: mask.tolist() for path, mask in jax.device_get(masks(state)).items()}
