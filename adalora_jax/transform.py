"""The optax wrapper: any optimizer, with AdaLoRA's rank allocation in its update."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalora_jax import tree
from adalora_jax.adapter import Adapter
from adalora_jax.allocator import (
    AllocatorState,
    enforced,
    init_allocator,
    matching_gradients,
    update_allocator,
)
from adalora_jax.config import AdaLoraConfig
from adalora_jax.tree import PyTree


class AdaLoraOptState(NamedTuple):
    """The inner optimizer's state and the allocator's."""

    inner: optax.OptState
    allocator: AllocatorState


def adalora(
    inner: optax.GradientTransformation, config: AdaLoraConfig
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that each of its updates also allocates the rank budget.

    One update is: the inner optimizer's step, in which the moves of λ are multiplied by
    ``lam_lr_multiplier`` and λ goes through ``prox``; then the importance of every triplet from the
    gradient that came in and the parameters that come out (PEFT's order; the parameters that went
    in with ``sensitivity_at="current"``), then, when one is due, a new mask over all adapters.
    After ``optax.apply_updates`` a pruned λ is exactly 0. Steps are counted in the state, one an
    applied update.

    The proximal step makes λ sparse on its own, beside the masks: with ``η = prox_weight``,

    * ``prox="soft_threshold"``: ``λ ← sign(λ) max(|λ| − η, 0)``, that of ``η ‖λ‖₁`` (SoRA);
    * a function: ``λ ← prox(λ, η)``, called for each adapter with ``lam [..., r]``.

    The parameters may be the adapters' dict, a bigger tree in which adapters sit beside other
    trainables (those are the inner optimizer's business alone), or an NNX State. Nothing that
    changes updates may follow this transformation. Clipping may come before it or be part of
    ``inner``: in ``optax.chain(clip, adalora(...))`` importance sees clipped gradients, as in
    PEFT; in ``adalora(optax.chain(clip, ...))`` it sees the raw ones.

    Args:
      inner: any optax optimizer.
      config: of this run.

    Raises:
      TypeError: ``inner`` is no optax transformation, or ``config`` no :class:`AdaLoraConfig`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from adalora_jax.adapter import init_adapter
    >>> config = AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = adalora(optax.adamw(1e-3), config)
    >>> state = tx.init(adapters)
    >>> for _ in range(4):
    ...     grads = jax.tree.map(jnp.ones_like, adapters)
    ...     updates, state = tx.update(grads, state, adapters)
    ...     adapters = optax.apply_updates(adapters, updates)
    >>> int((adapters["query"].lam != 0).sum())
    2
    """
    if not isinstance(config, AdaLoraConfig):
        raise TypeError(f"config={config!r} must be an AdaLoraConfig.")
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"inner={inner!r} must be an optax GradientTransformation.")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AdaLoraOptState:
        if _is_placeholder(params):
            return AdaLoraOptState(inner.init(params), _placeholder_state(params))
        # Some optimizers keep the first parameters; callers donate both, so it must be a copy.
        own = lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
        inner_state = jax.tree.map(own, inner.init(params))
        return AdaLoraOptState(inner_state, _in_variables(init_allocator(params, config), params))

    def update(
        updates: optax.Updates,
        state: Any,  # AdaLoraOptState; optax types it as any pytree
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaLoraOptState]:
        if params is None:
            raise ValueError(
                "params=None: importance is weight times gradient, so pass the parameters as "
                "tx.update(grads, state, params)."
            )
        gradients = matching_gradients(updates, params)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        current, moves = tree.canonical(params), tree.canonical(updates)
        if config.lam_lr_multiplier != 1:
            faster = lambda move: move._replace(lam=config.lam_lr_multiplier * move.lam)
            moves = tree.each(faster, moves)
        if config.prox is not None:
            moves = tree.each(functools.partial(_through_prox, config), current, moves)
        weights = current
        if config.sensitivity_at == "updated":
            weights = optax.apply_updates(current, moves)
        before = tree.bare(state.allocator)
        allocator = update_allocator(before, weights, gradients, before.step, config)
        now = enforced(before, before.step, config)
        columns = [tree.listed(part) for part in (current, moves, allocator.masks)]
        pruned = tree.batched(functools.partial(_prune, now), tree.alike(*columns), *columns)
        pruned = tree.insert(updates, tree.filled(moves, pruned))
        return pruned, AdaLoraOptState(inner_state, _like(state.allocator, allocator))

    return optax.GradientTransformationExtraArgs(init, update)


def allocator_state(opt_state: PyTree) -> AllocatorState:
    """The :class:`AllocatorState` inside any nesting of optax states, ``nnx.Optimizer``'s too.

    Raises:
      ValueError: there is none, or more than one.

    >>> import jax, optax
    >>> from adalora_jax.adapter import init_adapter
    >>> config = AdaLoraConfig(total_step=4)
    >>> adapters = {"query": init_adapter(jax.random.key(0), 6, 5, config)}
    >>> tx = optax.chain(optax.clip(1.0), adalora(optax.sgd(0.1), config))
    >>> int(allocator_state(tx.init(adapters)).budget)
    12
    """
    is_state = lambda node: isinstance(node, AllocatorState)
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} AllocatorStates instead of one: pass the state of an "
            "optimizer that was wrapped by adalora(...) once."
        )
    return tree.bare(found[0])  # nnx.Optimizer keeps every leaf in a Variable


def _in_variables(state: AllocatorState, params: optax.Params) -> AllocatorState:
    """The averages and masks in NNX Variables of the kind that their parameters are in, if any.

    As other optimizers' moments are: the metadata of a Variable says where on a mesh it is to lie,
    and what places an optimizer's state goes by that.
    """
    own = tree.canonical(params, variables=True)
    return state._replace(
        masks=_like(tree.each(lambda adapter: adapter.lam, own), state.masks),
        sensitivity=_like(own, state.sensitivity),
        uncertainty=_like(own, state.uncertainty),
    )


def _like(own: PyTree, bare: PyTree) -> Any:
    """The arrays of ``bare`` in the containers and Variables of ``own``."""
    return jax.tree.unflatten(jax.tree.structure(own), jax.tree.leaves(bare))


def soft_threshold(lam: jax.Array, weight: float) -> jax.Array:
    """``sign(λ) max(|λ| − η, 0)``: the proximal operator of ``η ‖λ‖₁``.

    >>> soft_threshold(jnp.array([-3.0, 0.5, 2.0]), 1.0)
    Array([-2.,  0.,  1.], dtype=float32)
    """
    return jnp.sign(lam) * jnp.maximum(jnp.abs(lam) - weight, 0)


def _through_prox(config: AdaLoraConfig, adapter: Adapter, move: Adapter) -> Adapter:
    """The update with which λ becomes what ``config.prox`` makes of it after its move."""
    prox = config.prox if callable(config.prox) else soft_threshold
    dtype = max(move.lam.dtype, adapter.lam.dtype, key=lambda dtype: dtype.itemsize)
    before = adapter.lam.astype(dtype)
    after = jnp.asarray(prox(before + move.lam.astype(dtype), config.prox_weight))
    if after.shape != before.shape:
        raise ValueError(
            f"prox={config.prox!r} returned shape {after.shape} for a lam of shape {before.shape}: "
            "it must return one λ for each."
        )
    return move._replace(lam=after.astype(dtype) - before)


@jax.jit
def _prune(
    now: jax.Array, adapters: list[Adapter], moves: list[Adapter], masks: list[jax.Array]
) -> list[Adapter]:
    """The updates with which a pruned λ becomes 0, λ + (−λ), if masks are to be applied now."""
    result = []
    for adapter, move, mask in zip(adapters, moves, masks):
        dtype = max(move.lam.dtype, adapter.lam.dtype, key=lambda dtype: dtype.itemsize)
        keep = mask | ~now
        lam = jnp.where(keep, move.lam.astype(dtype), -adapter.lam.astype(dtype))
        result.append(move._replace(lam=lam))
    return result


def _is_placeholder(params: Any) -> bool:
    """True for the childless node by which ``optax.tree.map_params`` finds copies of params."""
    treedef = jax.tree.structure(params)
    childless = treedef.num_leaves == 0 and treedef.num_nodes == 1
    return childless and not (params is None or isinstance(params, (Mapping, list, tuple)))


def _placeholder_state(params: Any) -> AllocatorState:
    """A state in which the averages, and they alone, are marked as shaped like the parameters."""
    scalar = jnp.zeros((), jnp.int32)
    return AllocatorState(scalar, scalar, scalar, sensitivity=params, uncertainty=params)
