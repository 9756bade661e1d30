"""Adapters, states and configs through ``flax.serialization``."""

import jax
import numpy as np
import optax
import pytest
from flax import serialization
from support import toy_problem

import adalora_jax as adalora

CONFIG = adalora.AdaLoraConfig(total_step=6, init_r=3, target_r=2)


def test_adapters_are_restored_into_a_target():
    """The arrays are stored; the scale, the layout and the config are those of the target."""
    given = {"adapters": toy_problem.adapters(CONFIG), "config": CONFIG}
    target = {"adapters": jax.tree.map(np.zeros_like, given["adapters"]), "config": CONFIG}
    restored = serialization.from_bytes(target, serialization.to_bytes(given))
    toy_problem.assert_same_bits(restored["adapters"], given["adapters"])
    assert restored["config"] is CONFIG


def test_training_continues_from_restored_optimizer_state():
    tx = adalora.adalora(optax.adamw(1e-2), CONFIG)
    params = toy_problem.adapters(CONFIG)
    grads = jax.tree.map(lambda leaf: np.cos(leaf) + 0.1, params)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    restored = serialization.from_bytes(tx.init(params), serialization.to_bytes(state))
    toy_problem.assert_same_bits(restored, state)
    for first, second in zip(*(tx.update(grads, s, params) for s in (state, restored))):
        toy_problem.assert_same_bits(first, second)


def test_allocator_state_of_other_adapters_raises():
    state = adalora.init_state(toy_problem.adapters(CONFIG), CONFIG).allocator
    one = adalora.init_state({"other": toy_problem.adapters(CONFIG)["key"]}, CONFIG).allocator
    stored = serialization.to_state_dict(state)
    with pytest.raises(ValueError, match="`state`: has other adapters than the target, at"):
        serialization.from_state_dict(one, stored)


def test_state_of_allocate_is_restored():
    state = adalora.init_state(toy_problem.adapters(CONFIG), CONFIG)
    after, _ = adalora.allocate(state, jax.tree.map(np.ones_like, state.adapters), 0)
    restored = serialization.from_bytes(state, serialization.to_bytes(after))
    toy_problem.assert_same_bits(restored, after)


def test_state_dict_of_other_keys_raises():
    adapter = toy_problem.adapters(CONFIG)["key"]
    state = serialization.to_state_dict(adapter)
    assert sorted(state) == ["lam", "p", "q"]
    del state["lam"]
    with pytest.raises(ValueError, match=r"`state`: an adapter in it has \['p', 'q'\], but must"):
        serialization.from_state_dict(adapter, state)


@pytest.mark.parametrize("name", ["p", "lam", "q"])
def test_state_dict_of_another_shape_raises(name):
    adapter = toy_problem.adapters(CONFIG)["key"]
    state = serialization.to_state_dict(adapter)
    for odd in (np.ones(9), np.ones((7, 4)), None, 1.0):
        with pytest.raises(
            ValueError, match=f"`state`: {name!r} in it has shape .*; pass a target"
        ):
            serialization.from_state_dict(adapter, state | {name: odd})
    other = toy_problem.adapters(CONFIG.replace(init_r=5))
    with pytest.raises(ValueError, match=r"`state`: 'p' in it has shape \(5, .*has \(3, "):
        serialization.from_bytes(toy_problem.adapters(CONFIG), serialization.to_bytes(other))


@pytest.mark.parametrize("state", [None, 3, [1, 2, 3], {}])
def test_state_dict_that_is_no_mapping_raises(state):
    adapters = toy_problem.adapters(CONFIG)
    with pytest.raises(ValueError, match="`state`: an adapter in it has"):
        serialization.from_state_dict(adapters["key"], state)
    masks = adalora.init_state(adapters, CONFIG).allocator.masks
    with pytest.raises(ValueError, match="`state`: has other adapters than the target"):
        serialization.from_state_dict(masks, state)


def test_masks_of_another_shape_raise():
    masks, other = (
        adalora.init_state(toy_problem.adapters(c), c).allocator.masks
        for c in (CONFIG, CONFIG.replace(init_r=5))
    )
    with pytest.raises(ValueError, match=r"`state`: .* in it has shape"):
        serialization.from_state_dict(masks, serialization.to_state_dict(other))
