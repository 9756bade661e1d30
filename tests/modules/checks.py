"""Checks that every layer kind passes, in both frameworks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adalora_jax as adalora

CONFIG = adalora.AdaLoraConfig(
    total_step=4, init_r=3, target_r=1, lora_alpha=6, target_modules=".*"
)


class AdaptedModel(NamedTuple):
    """One adapted model as pure functions of its parameters and the adapters.

    ``add`` adds dense increments ``[*stack, in, out]`` to the weights, independently of the
    package.
    """

    init: Callable[..., dict[str, adalora.Adapter]]  # key -> adapters
    apply: Callable[..., Any]  # (base, adapters, *inputs) -> outputs
    base_apply: Callable[..., Any]  # (base, *inputs) -> outputs
    base: Any
    inputs: tuple[Any, ...]
    add: Callable[..., Any]  # (base, {path: increment}) -> base
    merge: Callable[..., Any]  # (base, adapters) -> base
    unmerge: Callable[..., Any]  # (merged, adapters) -> base
    config: adalora.AdaLoraConfig


def random_like(tree: Any, seed: int, dtype: Any = None, std: float = 0.5) -> Any:
    """Draw normal NumPy arrays for a tree's float leaves, of their dtypes or of ``dtype``."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return (std * rng.standard_normal(leaf.shape)).astype(dtype or leaf.dtype)

    return jax.tree.map(draw, tree)


def random_inputs(inputs: tuple[Any, ...], dtype: Any) -> tuple[np.ndarray, ...]:
    """Return a case's inputs, with a normal array of ``dtype`` in place of each shape."""
    return tuple(
        value
        if isinstance(value, np.ndarray)
        else random_like(np.zeros(value, dtype), seed=i, std=1)
        for i, value in enumerate(inputs)
    )


def check_adapter(model: AdaptedModel, rtol: float, merge_rtol: float | None = None) -> None:
    """Check identity at init, and outputs and gradients against the dense increment.

    Both sides are differentiated with respect to the adapters and to all float inputs. With
    ``merge_rtol``, the merged base's outputs and the unmerged weights are checked, too.
    """
    abstract = jax.eval_shape(model.init, jax.random.key(1))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    outputs = jax.eval_shape(model.base_apply, model.base, *model.inputs)
    cotangents = random_like(outputs, 1)

    def gradients(apply):
        def loss(adapters, inputs, base):
            found = apply(base, adapters, *inputs)
            return optax.tree_utils.tree_vdot(cotangents, found), found

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True, allow_int=True))

    def through_delta(base, adapters, *inputs):
        deltas = {p: adalora.delta_weight(a) for p, a in adapters.items()}
        return model.base_apply(model.add(base, deltas), *inputs)

    ours, dense = gradients(model.apply), gradients(through_delta)
    adapters = random_like(abstract, 2)
    for nothing in ("lam", "p"):
        neutral = {p: a._replace(**{nothing: 0 * getattr(a, nothing)}) for p, a in adapters.items()}
        (_, found), _ = ours(neutral, model.inputs, model.base)
        (_, base), _ = dense(neutral, model.inputs, model.base)
        close(found, base, rtol)
    (_, found), grads = ours(adapters, model.inputs, model.base)
    (_, expected), expected_grads = dense(adapters, model.inputs, model.base)
    close(found, expected, rtol)
    close(grads, expected_grads, rtol)
    if merge_rtol is not None:
        merged = model.merge(model.base, jax.tree.map(jnp.asarray, adapters))
        chex.assert_trees_all_equal_shapes_and_dtypes(merged, model.base)
        nothing = jax.tree.map(np.zeros_like, adapters)
        (_, found), _ = dense(nothing, model.inputs, merged)
        close(found, expected, merge_rtol)
        back = model.unmerge(merged, jax.tree.map(jnp.asarray, adapters))
        close(back, model.base, merge_rtol)


def close(ours: Any, expected: Any, rtol: float) -> None:
    """Compare relative to each array's largest entry: cancellation makes small ones inexact."""
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, expected)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
        if a.dtype != jax.dtypes.float0:
            size = max(float(np.abs(b).max(initial=0)), 1e-30)
            np.testing.assert_allclose(a, b, rtol=0, atol=rtol * size)


def check_training(model: AdaptedModel) -> dict[str, int]:
    """Check that a few steps end at exactly the budget and lower the loss; return the ranks."""
    config = model.config
    tx = adalora.adalora(optax.adam(0.05), config)
    outputs = jax.eval_shape(model.base_apply, model.base, *model.inputs)
    goals = random_like(outputs, 4)

    def loss(adapters):
        found = model.apply(model.base, adapters, *model.inputs)
        errors = jax.tree.map(lambda a, b: jnp.mean((a - b) ** 2), found, goals)
        return sum(jax.tree.leaves(errors))

    abstract = jax.eval_shape(model.init, jax.random.key(1))
    fresh = {p: a._replace(lam=0 * a.lam) for p, a in random_like(abstract, 5).items()}

    @jax.jit
    def train(adapters):
        def step(carry, _):
            adapters, opt = carry
            value, grads = jax.value_and_grad(loss)(adapters)
            updates, opt = tx.update(grads, opt, adapters)
            return (optax.apply_updates(adapters, updates), opt), value

        return jax.lax.scan(step, (adapters, tx.init(adapters)), None, length=config.total_step)

    (adapters, opt), losses = train(fresh)
    state = adalora.allocator_state(opt)
    ranks = adalora.ranks(state)
    assert sum(ranks.values()) == config.target_r * len(ranks)
    for path, mask in state.masks.items():
        assert np.array_equal(adapters[path].lam != 0, mask), path
    assert losses[2] < losses[0]
    return ranks
