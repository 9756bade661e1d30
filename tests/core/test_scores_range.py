"""Scores of averages whose products float32 cannot represent."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adalora_jax as adalora

CONFIG = adalora.AdaLoraConfig(total_step=4, init_r=4, target_r=2, tfinal=1)


def adapter():
    return adalora.init_adapter(jax.random.key(0), 6, 5, CONFIG)._replace(lam=jnp.ones(4))


def by_hand(size, step):
    """Return gradients of λ alone, without scale and layout, growing with step and triplet."""
    zeros = jax.tree.map(jnp.zeros_like, adapter())
    slope = size * (1 + 0.5 * step) * jnp.arange(1.0, 5.0)
    return adalora.Adapter(zeros.p, slope, zeros.q)


@pytest.mark.parametrize("size", [1e-34, 1e-24, 1.0, 1e20, 1e35])
def test_masks_follow_scores_where_products_leave_float32(size):
    state = adalora.init_state({"layer": adapter()}, CONFIG)
    for step in range(4):
        state, masks = adalora.allocate(state, {"layer": by_hand(size, step)}, step)
    np.testing.assert_array_equal(masks["layer"], [False, False, True, True])


def test_adapters_of_very_different_sizes_are_ranked_by_size():
    adapters = {"large": adapter(), "small": adapter()}
    state = adalora.init_state(adapters, CONFIG)
    for step in range(4):
        grads = {"large": by_hand(1e5, step), "small": by_hand(1e-25, step)}
        state, masks = adalora.allocate(state, grads, step)
    # The budget is four: all of "large" and none of "small", which is 1e30 times smaller.
    np.testing.assert_array_equal(masks["large"], [True] * 4)
    np.testing.assert_array_equal(masks["small"], [False] * 4)


def test_handmade_gradients_need_no_scale_or_layout():
    adapters = {"layer": adapter()}
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    state = tx.init(adapters)
    updates, _ = tx.update({"layer": by_hand(1.0, 0)}, state, adapters)
    assert optax.apply_updates(adapters, updates)["layer"].scale == adapters["layer"].scale


def test_large_penalty_gradients_do_not_change_ordinary_scores():
    """Where λ is almost zero, the penalty makes averages of p 1e10 times those of λ."""
    adapters = {"layer": adapter()._replace(lam=1e-11 * jnp.ones(4))}
    state = adalora.init_state(adapters, CONFIG)
    rows = jnp.arange(4.0)[:, None]
    grads = adalora.Adapter(
        1e2 * (1 + rows) * jnp.sign(adapters["layer"].p), jnp.ones(4), 0 * adapters["layer"].q
    )
    for step in range(4):
        scaled = jax.tree.map(lambda leaf, t=step: (1 + t) * leaf, grads)
        state, masks = adalora.allocate(state, {"layer": scaled}, step)
    of_p = (np.asarray(adapters["layer"].p, np.float64) * np.asarray(grads.p)) ** 2
    of_p = of_p.mean(axis=1)
    assert set(np.flatnonzero(masks["layer"])) == set(np.argsort(-of_p)[:2])
