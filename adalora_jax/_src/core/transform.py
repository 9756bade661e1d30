"""The optax wrapper: any optimizer, with AdaLoRA's rank allocation in its update."""

from __future__ import annotations

import functools
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adalora_jax._src.core import pytree
from adalora_jax._src.core.adapter import Adapter
from adalora_jax._src.core.allocator import (
    AllocatorState,
    enforced,
    init_allocator,
    matching_gradients,
    update_allocator,
    with_facts,
)
from adalora_jax._src.core.config import AdaLoraConfig
from adalora_jax._src.core.regularizer import penalty


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
    changes updates may follow this transformation, or pruned λ do not stay 0:
    ``info(opt_state).overridden`` counts such λ. Accumulation belongs outside,
    ``optax.MultiSteps(adalora(...), k)``. Clipping may come before it or be part of
    ``inner``: in ``optax.chain(clip, adalora(...))`` importance sees clipped gradients, as in
    PEFT; in ``adalora(optax.chain(clip, ...))`` it sees the raw ones.

    Args:
      inner: any optax optimizer.
      config: of this run.

    Raises:
      TypeError: ``inner`` is no optax transformation, or ``config`` no :class:`AdaLoraConfig`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from adalora_jax import init_adapter
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
        raise TypeError(f"config={reprlib.repr(config)} must be an AdaLoraConfig.")
    if isinstance(inner, optax.MultiSteps):
        raise TypeError(f"inner={inner!r}: {_ACCUMULATION}")
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"inner={inner!r} must be an optax GradientTransformation.")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> Any:  # AdaLoraOptState
        if _is_placeholder(params):
            return AdaLoraOptState(inner.init(params), _placeholder_state(params, config))
        _check_scales(params, config)
        _warn_of_trained_base(params)
        # Some optimizers keep the first parameters; callers donate both, so it must be a copy.
        own = lambda leaf: jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
        inner_state = jax.tree.map(own, inner.init(params))
        _refuse_accumulation(inner_state)
        return AdaLoraOptState(inner_state, _in_variables(init_allocator(params, config), params))

    def update(
        updates: optax.Updates,
        state: Any,  # AdaLoraOptState; optax types it as any pytree
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(
                "params=None: importance is weight times gradient, so pass the parameters as "
                "tx.update(grads, state, params)."
            )
        if not isinstance(state, AdaLoraOptState):
            raise TypeError(
                f"state is a {type(state).__name__}: it must be what tx.init returned; arguments "
                "are tx.update(grads, state, params)."
            )
        before = pytree.bare(state.allocator)
        _check_adapters(params, before)
        updates = with_facts(updates, params)
        if config.orth_reg_in_update:
            updates, before = _with_penalty(updates, params, before)
        gradients = matching_gradients(updates, params)
        updates, inner_state = inner.update(updates, state.inner, params, **extra_args)
        current, moves = pytree.canonical(params), pytree.canonical(updates)
        if config.lam_lr_multiplier != 1:
            faster = lambda move: move._replace(lam=config.lam_lr_multiplier * move.lam)
            moves = pytree.each(faster, moves)
        if config.prox is not None:
            moves = pytree.each(functools.partial(_through_prox, config), current, moves)
        weights = current
        if config.sensitivity_at == "updated":
            weights = optax.apply_updates(current, moves)
        allocator = update_allocator(before, weights, gradients, before.step)
        now = enforced(before, before.step)
        columns = [pytree.listed(part) for part in (current, moves, before.masks, allocator.masks)]
        batches = pytree.alike(*columns)
        results = [_prune(now, *pytree.pick(batch, *columns)) for batch in batches]
        pruned = pytree.spread(batches, [moves for moves, _ in results])
        revived = sum(count for _, count in results)
        allocator = allocator._replace(
            # A gradient that is not finite changes nothing in the state.
            applied=jnp.where(allocator.step != before.step, now, before.applied),
            overridden=jnp.maximum(before.overridden, jnp.where(before.applied, revived, 0)),
        )
        pruned = pytree.insert(updates, pytree.filled(moves, pruned))
        return pruned, AdaLoraOptState(
            inner_state, pytree.in_containers(state.allocator, allocator)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _in_variables(state: AllocatorState, params: optax.Params) -> AllocatorState:
    """The averages and masks in NNX Variables of the kind that their parameters are in, if any.

    As other optimizers' moments are: the metadata of a Variable says where on a mesh it is to lie,
    and what places an optimizer's state goes by that.
    """
    own = pytree.canonical(params, variables=True)
    return state._replace(
        masks=pytree.in_containers(pytree.each(lambda adapter: adapter.lam, own), state.masks),
        sensitivity=pytree.in_containers(own, state.sensitivity),
        uncertainty=pytree.in_containers(own, state.uncertainty),
    )


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
    now: jax.Array,
    adapters: list[Adapter],
    moves: list[Adapter],
    old_masks: list[jax.Array],
    masks: list[jax.Array],
) -> tuple[list[Adapter], jax.Array]:
    """Return the updates with which a pruned λ becomes 0, λ + (−λ), if masks are applied now.

    And how many λ are not 0 that the masks of the last update had pruned.
    """
    result, revived = [], []
    for adapter, move, old, mask in zip(adapters, moves, old_masks, masks):
        dtype = max(move.lam.dtype, adapter.lam.dtype, key=lambda dtype: dtype.itemsize)
        keep = mask | ~now
        lam = jnp.where(keep, move.lam.astype(dtype), -adapter.lam.astype(dtype))
        result.append(move._replace(lam=lam))
        revived.append(jnp.sum(~old & (adapter.lam != 0), dtype=jnp.int32))
    return result, sum(revived, start=jnp.zeros((), jnp.int32))


_ACCUMULATION = (
    "accumulation inside of adalora would count micro-batches as steps and prune on them: put it "
    "outside, optax.MultiSteps(adalora(inner, config), k)."
)


def _refuse_accumulation(inner_state: Any) -> None:
    """Raise where the inner optimizer applies an update only at some of its calls."""
    kinds = {"MultiStepsState", "ApplyEvery"}
    is_one = lambda node: type(node).__name__ in kinds
    for node in jax.tree.leaves(inner_state, is_leaf=is_one):
        if is_one(node):
            raise ValueError(f"inner holds a {type(node).__name__}: {_ACCUMULATION}")


def _check_scales(params: Any, config: AdaLoraConfig) -> None:
    """Raise where an adapter was made with another config than the optimizer gets."""
    for path, adapter in pytree.adapters(params).items():
        expected = config.scale_of(path)
        if adapter.layout is not None and adapter.scale not in (None, expected):
            raise ValueError(
                f"config: the adapter of {path!r} has scale {adapter.scale}, but this config gives "
                f"it {expected}: pass adalora(...) the config that the model was adapted with."
            )


def _warn_of_trained_base(params: Any) -> None:
    """Warn where an adapted NNX layer's own weight is among the parameters that train."""
    known = {p: a.layout for p, a in pytree.adapters(params).items() if a.layout is not None}
    weights = {f"{path}/{layout.weight}".lstrip("/") for path, layout in known.items()}
    if base := sorted(weights & set(pytree.leaf_paths(params))):
        warnings.warn(
            f"params: the base's weights train along with their adapters, {len(base)} of them, "
            f"such as {base[0]!r}, unless inner freezes them: nnx.Optimizer(..., "
            "wrt=nnx.LoRAParam) trains only what adapt added.",
            stacklevel=3,
        )


def _check_adapters(params: Any, state: AllocatorState) -> None:
    """Raise where the adapters are not those that the state was made for."""
    shapes = {path: a.lam.shape for path, a in pytree.adapters(params).items()}
    known = {path: mask.shape for path, mask in pytree.leaves_with_path(state.masks).items()}
    if shapes != known:
        differing = sorted(p for p in {*shapes, *known} if shapes.get(p) != known.get(p))
        raise ValueError(
            f"params: the adapters differ from those that tx.init saw, at {differing[:5]}: call "
            "tx.init for these, or compact(params, opt_state, tx) for smaller ones."
        )


def _with_penalty(grads: Any, params: Any, state: AllocatorState) -> tuple[Any, AllocatorState]:
    """Return the gradients with the orthogonality penalty's added, and the state with its value."""
    value, slope = jax.value_and_grad(lambda a: penalty(a, state.config))(pytree.canonical(params))
    own = pytree.canonical(grads)
    add = lambda grad, more: grad + more.astype(grad.dtype)
    summed = jax.tree.unflatten(
        jax.tree.structure(own), map(add, jax.tree.leaves(own), jax.tree.leaves(slope))
    )
    return pytree.insert(grads, summed), state._replace(penalty=value.astype(jnp.float32))


def _is_placeholder(params: Any) -> bool:
    """True for the childless node by which ``optax.tree.map_params`` finds copies of params."""
    treedef = jax.tree.structure(params)
    childless = treedef.num_leaves == 0 and treedef.num_nodes == 1
    return childless and not (params is None or isinstance(params, (Mapping, list, tuple)))


def _placeholder_state(params: Any, config: AdaLoraConfig) -> AllocatorState:
    """Return a state in which only the averages are marked as shaped like the parameters."""
    scalar = jnp.zeros((), jnp.int32)
    return AllocatorState(
        *(scalar, scalar, scalar, params, params, scalar, scalar, scalar), config=config
    )
