"""Results of training: masks, ranks, masked parameters, and the final mask."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jaxtyping import Bool

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.allocator import (
    allocator_state,
    allocator_states,
    best_masks,
    check_gradients,
    current_budget,
    is_allocator_state,
)
from adalora_jax._src.core.pytree import PyTree
from adalora_jax._src.core.roles import ByRole, map_adapters, shapes_by_path, stack
from adalora_jax._src.core.scores import needed_inputs


def masks(state: PyTree) -> dict[str, Bool[Any, "*stack r"]]:
    """Return the masks of all adapters by path.

    Args:
      state: a pytree that contains an :class:`AllocatorState`, such as an optimizer's state; an
        :class:`AllocatorInfo`; or a dict or tree of masks.

    Returns:
      ``{path: mask}``, with booleans ``[..., r]``: True for an active triplet.

    Raises:
      ValueError: ``state`` contains neither an allocator state nor only boolean arrays.

    >>> masks({"query": jnp.array([True, False])})["query"].tolist()
    [True, False]
    """
    found = allocator_states(state)
    if found:
        return {path: mask for s in found for path, mask in s.masks.items()}
    given = getattr(state, "masks", state)
    by_path = pytree.leaves_with_path(given)

    def is_mask(leaf: PyTree) -> bool:
        return str(getattr(leaf, "dtype", "")) == "bool" and leaf.ndim > 0

    if not by_path or not all(map(is_mask, by_path.values())):
        raise ValueError(
            f"`state={type(state).__name__}`: has no AllocatorState in it, and is not a dict of "
            "boolean masks; pass the state of an optimizer that adalora(...) wrapped. The "
            "arguments are (opt_state, params) for eval_params and finish, (params, opt_state) for "
            "compact and summary."
        )
    return by_path


def eval_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """Return the parameters with the masks applied, for evaluation, merging and export.

    With ``allow_regrowth=True`` a pruned λ may grow back between two masks, so the trained
    parameters may contain λ that the masks prune. Other leaves do not change. Works under ``jit``.
    If the optimizer has an ``optax.contrib.schedule_free``, inside or around ``adalora``, the
    parameters are first replaced by its average, as by
    ``optax.contrib.schedule_free_eval_params``.

    Args:
      opt_state: the optimizer's state, which contains an :class:`AllocatorState`.
      params: the trained parameters: a dict of adapters, a larger tree, an NNX State, or what
        :func:`adalora_jax.stack` returned.

    Returns:
      The parameters in the containers of ``params``, with λ exactly 0 where a mask is False.

    Raises:
      ValueError: the state contains no allocator state or more than one ``schedule_free`` state, or
        its masks are for other adapters than those of ``params``.

    >>> import optax, adalora_jax as adalora
    >>> config = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    >>> opt_state = adalora.adalora(optax.adam(1e-3), config).init(adapters)
    >>> list(eval_params(opt_state, adapters))
    ['query']
    """
    return apply_masks(_schedule_free(opt_state, params), opt_state)


def apply_masks(params: PyTree, state: PyTree) -> PyTree:
    """Return the tree with λ exactly 0 where a mask is False.

    Args:
      params: any tree with adapters in it.
      state: as in :func:`masks`.

    Raises:
      ValueError: a mask is for an adapter that ``params`` does not have, or of another shape.
    """
    found, by_path = pytree.trained_adapters(params), masks(state)
    shapes = shapes_by_path(found)
    check_masks({path: adapter.lam for path, adapter in shapes.items()}, by_path)

    def masked(adapter: Adapter, mask: Bool[Any, "*stack r"]) -> Adapter:
        return adapter._replace(lam=jnp.where(mask, adapter.lam, jnp.zeros((), adapter.lam.dtype)))

    if isinstance(found, ByRole):
        every = {p: by_path.get(p, jnp.ones(a.lam.shape, bool)) for p, a in shapes.items()}
        return pytree.insert_adapters(
            params, map_adapters(masked, found, stack(found.roles, every))
        )
    chosen = {path: found[path] for path in by_path}
    return pytree.insert_adapters(params, map_adapters(masked, chosen, by_path))


def check_masks(
    lams: Mapping[str, Any], by_path: Mapping[str, Any], name: str = "opt_state"
) -> None:
    """Raise if a mask is for no λ, or for one of another shape.

    Args:
      lams: the λ of the adapters by path.
      by_path: the masks by path.
      name: the argument that has the masks, for the message.

    Raises:
      ValueError: ``lams`` has no λ of the shape of a mask.
    """
    lacking = [
        path
        for path, mask in by_path.items()
        if path not in lams or jnp.shape(lams[path]) != mask.shape
    ]
    if lacking:
        raise ValueError(
            f"`{name}`: has masks for {', '.join(map(repr, lacking[:5]))}, of which there are no "
            "adapters of these shapes, only for "
            f"{', '.join(map(repr, list(lams)[:5])) or 'none'}; pass the state and the parameters "
            "of one run, as the optimizer sees them."
        )


def _schedule_free(opt_state: PyTree, params: PyTree) -> PyTree:
    """Return ``schedule_free``'s average of the parameters, or ``params`` if it is not used."""
    state_type = optax.contrib.ScheduleFreeState

    def is_state(node: PyTree) -> bool:
        return isinstance(node, state_type)

    found = [n for n in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(n)]
    if not found:
        return params
    if len(found) > 1:
        raise ValueError(
            f"`opt_state`: holds {len(found)} states of schedule_free instead of one; average the "
            "parameters of each with optax.contrib.schedule_free_eval_params, then apply "
            "masks(opt_state)."
        )
    return optax.contrib.schedule_free_eval_params(pytree.unwrap_variables(found[0]), params)


def finish(opt_state: PyTree, params: PyTree, grads: PyTree | None = None) -> tuple[PyTree, PyTree]:
    """Make the final mask if it is missing, and apply the masks."""
    state = allocator_state(opt_state)
    config = state.config
    if not isinstance(state.step, Tracer) and int(state.step) == 0:
        raise ValueError(
            "`opt_state`: has made no update, so there is nothing to rank triplets by; train first."
        )
    made = not isinstance(state.step, Tracer) and int(state.step) > config.final_step
    if grads is None and "grads" in needed_inputs(config) and not made:
        raise ValueError(
            f"`grads=None`: score={config.score!r} depends on gradients, which the allocator does "
            "not store; pass the last ones."
        )
    apply_masks(params, state.masks)  # raises for other adapters
    weights = pytree.trained_adapters(params)
    gradients = weights if grads is None else check_gradients(grads, weights)
    allowed = current_budget(config, jnp.asarray(config.final_step, jnp.int32), weights)
    due = state.step <= config.final_step

    def make() -> ByRole:
        return best_masks(state, weights, gradients, allowed)

    final = state._replace(
        step=jnp.maximum(state.step, config.final_step + 1),
        budget=jnp.where(due, allowed, state.budget),
        masks=jax.lax.cond(due, make, lambda: state.masks),
        applied=jnp.ones((), bool),
    )
    params = apply_masks(params, final.masks)

    def restore(node: PyTree) -> PyTree:
        return pytree.match_containers(node, final) if is_allocator_state(node) else node

    return params, jax.tree.map(restore, opt_state, is_leaf=is_allocator_state)


def unfinished(state: PyTree) -> str:
    """Return the problem of a missing final mask, for a message; an empty string if it was made.

    >>> unfinished({"query": jnp.array([True])})
    ''
    """
    for found in allocator_states(state):
        step, final = int(found.step), found.config.final_step
        if step <= final:
            return (
                f"has made {step} updates, but the final mask is made at update {final + 1}, so "
                "ranks may still change"
            )
    return ""


def ranks(state: PyTree) -> dict[str, int]:
    """Return the rank of every matrix: its number of active triplets.

    Args:
      state: an optimizer's state, an :class:`AllocatorInfo`, or masks, as in
        :func:`adalora_jax.masks`; not traced.

    Returns:
      ``{path: rank}`` with Python integers; slices of a stack are separate, as ``path[0]``.

    Raises:
      ValueError: as in :func:`adalora_jax.masks`.

    >>> import jax.numpy as jnp
    >>> ranks({"query": jnp.array([True, False]), "up": jnp.array([[True, True], [False, True]])})
    {'query': 1, 'up[0]': 2, 'up[1]': 1}
    """
    result = {}
    for path, mask in jax.device_get(masks(state)).items():
        active = mask.sum(axis=-1)
        for index in itertools.product(*map(range, active.shape)):
            result[pytree.row_name(path, index)] = int(active[index])
    return result


def rank_pattern(state: PyTree) -> dict[str, list]:
    """Return the masks as lists of booleans, the form of PEFT's ``rank_pattern``.

    Args:
      state: an optimizer's state, an :class:`AllocatorInfo`, or masks, as in
        :func:`adalora_jax.masks`; not traced.

    Returns:
      ``{path: [True, False, ...]}``, True for an active triplet; nested lists for a stack.

    Raises:
      ValueError: as in :func:`adalora_jax.masks`.

    >>> import jax.numpy as jnp
    >>> rank_pattern({"query": jnp.array([True, False])})
    {'query': [True, False]}
    """
    return {path: mask.tolist() for path, mask in jax.device_get(masks(state)).items()}
