"""The allocator: which triplets live, decided over all adapters together."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adalora_jax import tree
from adalora_jax.adapter import Adapter
from adalora_jax.budget import budget
from adalora_jax.config import AdaLoraConfig
from adalora_jax.importance import Evidence, raw_sensitivity, smooth, triplet_scores
from adalora_jax.tree import PyTree


class AllocatorState(NamedTuple):
    """What the allocator carries from step to step; every leaf keeps its shape and dtype.

    The last three fields have the containers of the adapters' tree: at each adapter's place a
    boolean array ``[..., r]``, or an :class:`Adapter` of float32 moving averages, and None at the
    place of anything that is not an adapter.
    """

    step: jax.Array  # int32 scalar: updates so far, so the number of the next step
    budget: jax.Array  # int32 scalar: triplets allowed at the last step
    masks: PyTree  # the standing decision: True where a triplet lives
    sensitivity: PyTree  # Ī
    uncertainty: PyTree  # Ū


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["adapters", "allocator"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class AdaLoraState:
    """Adapters, allocator state and the (static) config: all that :func:`allocate` needs."""

    adapters: PyTree
    allocator: AllocatorState
    config: AdaLoraConfig


def init_state(adapters: PyTree, config: AdaLoraConfig) -> AdaLoraState:
    """A fresh :class:`AdaLoraState` around a copy of ``adapters``.

    Raises:
      ValueError: there is no adapter in ``adapters``.
    """
    return AdaLoraState(jax.tree.map(jnp.copy, adapters), init_allocator(adapters, config), config)


def init_allocator(params: PyTree, config: AdaLoraConfig) -> AllocatorState:
    """The allocator's state before the first step: all triplets live, averages 0.

    Args:
      params: a tree with adapters in it; other leaves are passed over.
      config: for the initial budget.

    Raises:
      ValueError: there is no adapter in ``params``.
    """
    adapters = tree.canonical(params)
    if not jax.tree.leaves(adapters):
        raise ValueError(
            f"no adapter was found in the {type(params).__name__} of parameters: pass the adapters "
            "that adapt(...).init returned, or an NNX state filtered by nnx.LoRAParam."
        )
    # zeros_like and ones_like: the state is sharded as the parameters are.
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), adapters)
    masks = tree.each(lambda adapter: jnp.ones_like(adapter.lam, bool), adapters)
    return AllocatorState(
        step=jnp.zeros((), jnp.int32),
        budget=_budget(config, jnp.zeros((), jnp.int32), adapters),
        masks=masks,
        sensitivity=zeros(),
        uncertainty=zeros(),
    )


@jax.jit
def allocate(state: AdaLoraState, grads: PyTree, step: chex.Numeric) -> tuple[AdaLoraState, PyTree]:
    """One update of the allocator: importance, budget, masks. Jitted.

    To be called once an optimizer step, after the optimizer moved the adapters (with
    ``sensitivity_at="current"``: before). The masks are the standing decision, at every step. They
    are applied to the returned adapters (pruned λ exactly 0) whenever a new mask was due, at all
    steps from the final mask on, and with ``hold_mask`` at all steps; between two masks of the
    budgeting phase a pruned λ may otherwise grow back, so that it can be revived.

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
    >>> from adalora_jax.adapter import init_adapter
    >>> config = AdaLoraConfig(total_step=4, init_r=4, target_r=2)
    >>> adapters = {"query": init_adapter(jax.random.key(0), 6, 5, config)}
    >>> state = init_state(adapters, config)
    >>> grads = jax.tree.map(jnp.ones_like, adapters)
    >>> for step in range(4):
    ...     state, masks = allocate(state, grads, step)
    >>> int(masks["query"].sum())
    2
    """
    config = state.config
    adapters = tree.canonical(state.adapters)
    gradients = matching_gradients(grads, state.adapters)
    step = jnp.asarray(step, jnp.int32)
    allocator = update_allocator(state.allocator, adapters, gradients, step, config)
    keep = enforced(allocator.masks, state.allocator, step, config)
    adapters = tree.insert(state.adapters, apply_masks(adapters, keep))
    return AdaLoraState(adapters, allocator, config), allocator.masks


def update_allocator(
    state: AllocatorState,
    weights: PyTree,
    gradients: PyTree,
    step: jax.Array,
    config: AdaLoraConfig,
) -> AllocatorState:
    """The allocator's next state, from adapters and gradients in canonical form.

    Before the final phase the averages take in ``|w · g|``; when a mask is due the best b(t)
    triplets of all adapters are kept. Nothing changes where a gradient (or weight) is not finite.
    """
    raw = jax.tree.map(raw_sensitivity, weights, gradients)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(raw)]))
    accumulate = finite & (step < config.total_step - config.tfinal)

    def new_averages():
        update = functools.partial(smooth, config=config)
        pairs = jax.tree.map(update, raw, state.sensitivity, state.uncertainty)
        return tuple(jax.tree.map(lambda _, pair, i=i: pair[i], raw, pairs) for i in range(2))

    # Not jnp.where: XLA would copy the test of all gradients into the kernel of every leaf, so
    # that compilation takes time in the square of the number of adapters, a minute for 72.
    sensitivity, uncertainty = jax.lax.cond(
        accumulate, new_averages, lambda: (state.sensitivity, state.uncertainty)
    )
    allowed = _budget(config, step, weights)

    def new_masks():
        scores = tree.each(
            lambda *evidence: triplet_scores(Evidence(*evidence), config),
            *(weights, gradients, sensitivity, uncertainty),
        )
        best = keep_best(scores, allowed, _limits(config, weights, allowed))
        return jax.tree.map(_sharded_like, best, state.masks)

    masks = jax.lax.cond(
        finite & mask_due(config, step, state.step), new_masks, lambda: state.masks
    )
    return AllocatorState(
        step=jnp.where(finite, step + 1, state.step),
        # Final when the mask is: compaction may leave fewer adapters to reckon with.
        budget=jnp.where(finite & (state.step <= config.final_step), allowed, state.budget),
        masks=masks,
        sensitivity=sensitivity,
        uncertainty=uncertainty,
    )


def mask_due(config: AdaLoraConfig, step: jax.Array, next_step: jax.Array) -> jax.Array:
    """Whether a new mask is to be made at ``step``, given the state's ``step`` before it.

    Every ``deltaT`` steps in the budgeting phase, and once at or after ``config.final_step``.
    """
    budgeting = (step > config.tinit) & (step < config.final_step) & (step % config.deltaT == 0)
    return budgeting | ((step >= config.final_step) & (next_step <= config.final_step))


def enforced(
    masks: PyTree, before: AllocatorState, step: jax.Array, config: AdaLoraConfig
) -> PyTree:
    """The masks where they are to be applied at ``step``; all True where λ may grow back."""
    now = mask_due(config, step, before.step) | (step >= config.final_step) | config.hold_mask
    return jax.tree.map(lambda mask: mask | ~now, masks)


def keep_best(
    scores: PyTree,
    count: chex.Numeric,
    limits: Sequence[tuple[chex.Numeric, chex.Numeric]] | None = None,
) -> PyTree:
    """Masks that keep exactly the ``count`` highest scores over all leaves together.

    Ties are broken by position: earlier leaves, then earlier rows. NaN ranks below every number.

    With ``limits``, every matrix (row of a leaf) keeps its ``least`` best scores first; what is
    left of ``count`` goes to the highest of the others, at most ``most`` in a matrix. No other
    masks within the limits keep a higher sum. If the limits leave no room for ``count``, the
    number nearest to it that they allow is kept.

    Args:
      scores: a tree of arrays of any shapes.
      count: how many to keep; may be traced.
      limits: ``(least, most)`` for the matrices of each leaf, in the order of the leaves.

    >>> keep_best({"a": jnp.array([1.0, 3.0]), "b": jnp.array([jnp.nan, 1.0])}, 2)
    {'a': Array([ True,  True], dtype=bool), 'b': Array([False, False], dtype=bool)}
    >>> keep_best({"a": jnp.array([2.0, 3.0]), "b": jnp.array([0.0, 1.0])}, 2, [(0, 2), (1, 2)])
    {'a': Array([False,  True], dtype=bool), 'b': Array([False,  True], dtype=bool)}
    """
    leaves, treedef = jax.tree.flatten(scores)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    rows = [_gathered(leaf) for leaf in leaves]
    flat = jnp.concatenate(rows)
    if limits is None:
        order = jnp.argsort(-flat, stable=True)  # JAX sorts NaN to the end
    else:
        turns = [
            _turn(row.reshape(leaf.shape), *bounds).ravel()
            for row, leaf, bounds in zip(rows, leaves, limits)
        ]
        turn = jnp.concatenate(turns)
        order = jnp.lexsort((-flat, turn))
        count = jnp.clip(count, jnp.sum(turn == 0), jnp.sum(turn < 2))
    kept = jnp.zeros(flat.shape, bool).at[order].set(jnp.arange(flat.size, dtype=jnp.int32) < count)
    ends = np.cumsum(sizes)
    return treedef.unflatten(
        [kept[jnp.arange(e - n, e)].reshape(leaf.shape) for e, n, leaf in zip(ends, sizes, leaves)]
    )


def _turn(scores: jax.Array, least: chex.Numeric, most: chex.Numeric) -> jax.Array:
    """0 for the scores of a matrix that are kept first, 1 for those that compete, 2 for never."""
    order = jnp.argsort(-scores, axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1)  # the inverse permutation: each score's place in its row
    least = jnp.minimum(least, most)
    return (place >= least).astype(jnp.int32) + (place >= most).astype(jnp.int32)


def _gathered(scores: jax.Array) -> jax.Array:
    """The scores in one row, on every device.

    Adapters may be sharded differently. Explicit mesh axes want one sharding for what is
    concatenated; automatic ones would spread the sharding of one adapter to the others, which
    indexing with an array does not.
    """
    mesh = jax.typeof(scores).sharding.mesh
    if mesh.are_all_axes_explicit:
        everywhere = jax.sharding.PartitionSpec(*[None] * scores.ndim)
        scores = jax.sharding.reshard(scores, jax.sharding.NamedSharding(mesh, everywhere))
    return scores.ravel()[jnp.arange(scores.size)]


def _sharded_like(mask: jax.Array, before: jax.Array) -> jax.Array:
    sharding = jax.typeof(before).sharding
    return jax.sharding.reshard(mask, sharding) if sharding.mesh.are_all_axes_explicit else mask


def apply_masks(adapters: PyTree, masks: PyTree) -> PyTree:
    """The adapters with λ exactly 0 wherever a mask is False: what to evaluate and export.

    Args:
      adapters: any tree with adapters in it.
      masks: of the same containers, as in :class:`AllocatorState`.

    >>> adapter = Adapter(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 4)))
    >>> apply_masks({"query": adapter}, {"query": jnp.array([True, False])})["query"].lam
    Array([1., 0.], dtype=float32)
    """
    masked = tree.each(
        lambda adapter, mask: adapter._replace(
            lam=jnp.where(mask, adapter.lam, jnp.zeros((), adapter.lam.dtype))
        ),
        tree.canonical(adapters),
        masks,
    )
    return tree.insert(adapters, masked)


def matching_gradients(grads: PyTree, params: PyTree) -> PyTree:
    """The gradients of the adapters in canonical form, checked against the adapters.

    Raises:
      ValueError: naming the adapters that have no gradient, or one of another shape, and
        gradients without an adapter.
    """
    have, want = tree.adapters(grads), tree.adapters(params)
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
    return tree.canonical(grads)


def _limits(
    config: AdaLoraConfig, adapters: PyTree, allowed: jax.Array
) -> list[tuple[chex.Numeric, chex.Numeric]] | None:
    """``(min_r, max_r)`` of every adapter; None where nothing is limited.

    Allocation per adapter is that with limits too: the same number for each matrix, and what does
    not divide among them to the best of the next triplets, one a matrix.
    """
    if config.allocation == "per_adapter":
        share = allowed // _matrices(adapters)
        return [(share, share + 1) for _ in tree.adapters(adapters)]
    if not config.rank_limits:
        return None
    specs = [config.spec_of(path) for path in tree.adapters(adapters)]
    return [(spec.min_r, spec.max_r) for spec in specs]


def _budget(config: AdaLoraConfig, step: jax.Array, adapters: PyTree) -> jax.Array:
    initial = sum(adapter.lam.size for adapter in tree.adapters(adapters).values())
    return budget(config, step, _matrices(adapters), initial=initial)


def _matrices(adapters: PyTree) -> int:
    return sum(math.prod(a.lam.shape[:-1]) for a in tree.adapters(adapters).values())
