"""Optional variants of the algorithm, as other implementations have them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import problem

import adalora_jax as al
from adalora_jax._src.core.scores import triplet_scores
from adalora_jax._src.core.selection import keep_best

CONFIG = al.AdaLoraConfig(total_step=1000, init_r=12, target_r=8)
LINEAR = CONFIG.replace(budget_schedule="linear")


def known(values):
    """Return adapters with known scores as λ, from ``{name: list of scores}``."""
    return {
        name: al.Adapter(
            jnp.ones((len(row), 2)), jnp.asarray(row, jnp.float32), jnp.ones((len(row), 3))
        )
        for name, row in values.items()
    }


def final_masks(values, target, **changes):
    """Return the masks of a run of one step, from known scores."""
    config = al.AdaLoraConfig(
        total_step=1, init_r=max(map(len, values.values())), target_r=target, score="magnitude"
    ).replace(**changes)
    adapters = known(values)
    grads = jax.tree.map(jnp.ones_like, adapters)
    _, masks = al.allocate(al.init_state(adapters, config), grads, 0)
    return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}


# A linear budget ------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [1, 7, 36])
def test_linear_budget_from_12_to_8_is_10_per_adapter_halfway(adapters):
    assert int(al.budget(LINEAR, 500, adapters)) / adapters == 10.0
    assert int(al.budget(LINEAR, 0, adapters)) / adapters == 12.0
    assert int(al.budget(LINEAR, 999, adapters)) / adapters == 8.0


def test_linear_budget_falls_linearly():
    budgets = np.asarray(al.budget(LINEAR, np.arange(999), 36))
    line = 36 * (12 - 4 * np.arange(999) / 1000)
    assert np.abs(budgets - line).max() < 1
    cubic = np.asarray(al.budget(CONFIG, np.arange(999), 36))
    assert np.abs(cubic - line).max() > 50


def test_custom_budget_is_floored_and_clipped():
    schedule = lambda config, step, n_adapters: 30.9 - 20.0 * jnp.float32(step)
    config = al.AdaLoraConfig(total_step=9, init_r=4, target_r=1, budget_schedule=schedule)
    budgets = [int(al.budget(config, step, 3)) for step in range(9)]
    assert budgets == [12, 10, 0, 0, 0, 0, 0, 0, 3]
    assert [int(al.budget(config, step, 9)) for step in range(3)] == [36, 10, 0]
    later = config.replace(tinit=1)
    assert [int(al.budget(later, step, 3)) for step in range(3)] == [12, 12, 0]


def test_linear_run_ends_with_exactly_8_per_adapter():
    config = LINEAR.replace(total_step=9, tfinal=2, lora_alpha=12)
    params = problem.adapters(config)
    tx = al.adalora(optax.sgd(0.1), config)
    state, update = tx.init(params), jax.jit(tx.update)
    budgets = []
    for seed in range(config.total_step):
        draw = np.random.default_rng(seed).normal
        grads = jax.tree.map(
            lambda leaf, draw=draw: jnp.asarray(draw(size=leaf.shape), leaf.dtype), params
        )
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        budgets.append(int(state.allocator.budget) / problem.MATRICES)
    assert budgets[-1] == 8.0
    assert 10.0 > budgets[4] > 9.0
    assert problem.live(state.allocator.masks) == 8 * problem.MATRICES
    assert sum(int((a.lam != 0).sum()) for a in params.values()) == 8 * problem.MATRICES


# Importance of λ alone ------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["sensitivity_uncertainty", "sensitivity", "upper_confidence"])
def test_score_over_lam_ignores_p_and_q(score):
    """Sensitivities of λ rise with the row; those of p and q fall, and are larger."""
    config = al.AdaLoraConfig(total_step=9, init_r=4, target_r=2, score=score, tfinal=1)
    rows = jnp.arange(1.0, 5.0)
    adapters = {"a": al.Adapter(jnp.ones((4, 2)), jnp.ones(4), jnp.ones((4, 3)))}
    against = jnp.broadcast_to(100 - 10 * rows[:, None], (4, 3))
    grads = {"a": al.Adapter(p=against[:, :2], lam=rows, q=against)}

    def masks_with(score_reduction):
        state = al.init_state(adapters, config.replace(score_reduction=score_reduction))
        for step in range(9):
            state, masks = al.allocate(state, grads, step)
        return masks["a"].tolist()

    assert masks_with("lam") == [False, False, True, True]
    assert masks_with("triplet") == [True, True, False, False]


# Smoothed sensitivity plus uncertainty --------------------------------------------------------


def evidence(sensitivity, uncertainty):
    """Return inputs of one adapter with these averages of λ, and zeros for p and q."""
    make = lambda lam: al.Adapter(jnp.zeros((3, 2)), jnp.asarray(lam), jnp.zeros((3, 4)))
    ones = al.Adapter(jnp.ones((3, 2)), jnp.ones(3), jnp.ones((3, 4)))
    return al.scores.ScoreInputs(ones, ones, make(sensitivity), make(uncertainty))


def test_upper_confidence_ranks_by_sum_and_differs_from_product():
    given = evidence([4.0, 2.5, 0.5], [0.5, 1.5, 3.6])
    config = CONFIG.replace(score="upper_confidence")
    np.testing.assert_allclose(triplet_scores(given, config), [4.5, 4.0, 4.1])
    product = triplet_scores(given, CONFIG)
    np.testing.assert_allclose(product, [2.0, 3.75, 1.8])
    best = lambda scores: np.flatnonzero(keep_best({"a": scores}, 2)["a"]).tolist()
    assert best(triplet_scores(given, config)) == [0, 2]
    assert best(product) == [0, 1]


# λ initialised to one -------------------------------------------------------------------------


def test_lambda_one_starts_at_one_and_adds_nothing_until_p_moves():
    config = CONFIG.replace(init="lambda_one")
    adapter = al.init_adapter(jax.random.key(0), 6, 5, config)
    assert adapter.lam.tolist() == [1.0] * 12
    assert not np.any(adapter.p)
    assert 0.015 < float(jnp.std(adapter.q)) < 0.025
    x, kernel = jnp.ones((2, 6)), jax.random.normal(jax.random.key(1), (6, 5))
    y = al.forward(adapter, x, kernel)
    np.testing.assert_array_equal(y, x @ kernel)
    slope = jax.grad(lambda a: jnp.sum(al.forward(a, x, kernel)))(adapter)
    assert np.all(slope.p)
    assert not np.any(slope.lam)


# Masks from known scores ----------------------------------------------------------------------


def test_single_adapter_keeps_top_half():
    masks = final_masks({"a": [0.3, 0.9, 0.1, 0.8, 0.2, 0.7, 0.6, 0.4]}, target=4)
    assert masks == {"a": [1, 3, 5, 6]}


def test_global_allocation_keeps_top_half():
    scores = {"a": [8.0, 7.0, 6.0, 1.0], "b": [5.0, 4.0, 3.0, 2.0], "c": [9.0, 0.1, 0.2, 0.3]}
    assert final_masks(scores, target=2) == {"a": [0, 1, 2], "b": [0, 1], "c": [0]}


def test_ties_go_to_first_adapter_and_first_row():
    scores = {"a": [1.0] * 4, "b": [1.0, 2.0, 1.0, 1.0]}
    assert final_masks(scores, target=2) == {"a": [0, 1, 2], "b": [1]}


def test_adapter_may_lose_every_triplet():
    scores = {"a": [1.0, 2.0], "b": [3.0, 4.0]}
    assert final_masks(scores, target=1) == {"a": [], "b": [0, 1]}


def test_custom_score_decides_from_all_inputs():
    """This score is the product of the norms of p and q, independent of λ and the gradients."""
    score = lambda e: jnp.linalg.norm(e.weight.p, axis=-1) * jnp.linalg.norm(e.weight.q, axis=-1)
    config = al.AdaLoraConfig(total_step=1, init_r=4, target_r=2, score=score)
    adapters = known({"a": [9.0, 8.0, 7.0, 6.0]})
    adapters["a"] = adapters["a"]._replace(p=jnp.arange(8.0).reshape(4, 2))
    _, masks = al.allocate(al.init_state(adapters, config), adapters, 0)
    assert masks["a"].tolist() == [False, False, True, True]


def test_score_of_wrong_shape_raises():
    config = al.AdaLoraConfig(total_step=1, score=lambda e: e.weight.p, init_r=4, target_r=2)
    adapters = known({"a": [1.0] * 4})
    with pytest.raises(ValueError, match=r"returned shape \(4, 2\).*one score a triplet"):
        al.allocate(al.init_state(adapters, config), adapters, 0)


def test_per_adapter_allocation_keeps_top_half_of_each():
    scores = {"a": [1.0, 2.0, 3.0, 4.0], "b": [8.0, 7.0, 6.0, 5.0], "c": [0.1, 0.4, 0.2, 0.3]}
    assert final_masks(scores, target=2) == {"a": [2, 3], "b": [0, 1, 2, 3], "c": []}
    assert final_masks(scores, target=2, allocation="per_adapter") == {
        "a": [2, 3],
        "b": [0, 1],
        "c": [1, 3],
    }


@pytest.mark.parametrize("seed", range(3))
def test_per_adapter_allocation_spends_budget_and_differs_by_at_most_one(seed):
    config = al.AdaLoraConfig(
        total_step=30, init_r=4, target_r=2, tfinal=5, allocation="per_adapter"
    )
    one = lambda i, stack=(): al.init_adapter(jax.random.key(i), 5, 6, config, stack=stack)
    adapters = {"a": one(0), "b": one(1, (3,)), "c": one(2)}
    state = al.init_state(adapters, config)
    for step in range(30):
        wave = float(seed + step + 1)
        grads = jax.tree.map(lambda leaf, wave=wave: jnp.cos(leaf * wave), adapters)
        moved = jax.tree.map(lambda w, g: w - 0.1 * g, state.adapters, grads)
        state, masks = al.allocate(dataclasses.replace(state, adapters=moved), grads, step)
        live = list(al.ranks(masks).values())
        assert sum(live) == int(al.budget(config, step, 5)) == int(state.allocator.budget)
        assert max(live) - min(live) <= 1
    assert live == [2] * 5


def test_per_adapter_allocation_rejects_rank_limits():
    with pytest.raises(ValueError, match="min_r and max_r in rank_overrides have no meaning"):
        al.AdaLoraConfig(total_step=9, allocation="per_adapter", rank_overrides={"q": {"max_r": 3}})


def test_partitioned_transformations_have_separate_budgets():
    """The global budget keeps all of b; partitioned, each adapter keeps its own best half."""
    scores = {"a": [1.0, 2.0, 3.0, 4.0], "b": [8.0, 7.0, 6.0, 5.0]}
    config = al.AdaLoraConfig(total_step=1, init_r=4, target_r=2, score="magnitude")
    params = known(scores)
    one = lambda: al.adalora(optax.sgd(0.0), config)
    together, each = one(), optax.partition({"a": one(), "b": one()}, {"a": "a", "b": "b"})

    def lam_after(tx):
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
        return {name: a.lam.tolist() for name, a in optax.apply_updates(params, updates).items()}

    assert lam_after(together) == {"a": [0.0] * 4, "b": [8.0, 7.0, 6.0, 5.0]}
    assert lam_after(each) == {"a": [0.0, 0.0, 3.0, 4.0], "b": [8.0, 7.0, 0.0, 0.0]}
