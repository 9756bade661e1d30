"""Masks from known scores, under costs, and with pruned triplets that stay pruned."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import toy_problem
from support.toy_problem import steps

import adalora_jax as al
from adalora_jax._src.core.roles import stack

CONFIG = al.AdaLoraConfig(total_step=12, init_r=4, target_r=2, tinit=1, tfinal=3, lora_alpha=6)


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


def test_adapter_of_rank_0_takes_part_in_run():
    adapters = known({"a": [4.0, 3.0, 2.0, 1.0], "b": []})
    config = al.AdaLoraConfig(total_step=2, init_r=4, target_r=2)
    state = al.init_state(adapters, config)
    for t in range(2):
        state, masks = al.allocate(state, state.adapters, t)
    assert masks["a"].tolist() == [True] * 4  # the budget is 2 per matrix
    assert masks["b"].shape == (0,)


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
        active = list(al.ranks(masks).values())
        assert sum(active) == int(al.budget(config, step, 5)) == int(state.allocator.budget)
        assert max(active) - min(active) <= 1
    assert active == [2] * 5


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


@pytest.mark.parametrize("unit", ["parameters", "flops"])
@pytest.mark.parametrize(
    "changes", [{}, {"allocation": "per_adapter"}, {"allow_regrowth": False}], ids=str
)
def test_live_cost_is_less_than_one_triplet_below_budget(unit, changes):
    """The budget falls from the cost of init_r per matrix to that of target_r per matrix."""
    config = CONFIG.replace(budget_unit=unit, **changes)
    params = toy_problem.adapters(config)
    each = {"down": 5 + 3, "key": 4 + 4, "layers": 3 + 5}
    each = {name: (2 if unit == "flops" else 1) * n + 1 for name, n in each.items()}
    one = each["down"] + each["key"] + 2 * each["layers"]
    budgets = []
    for _, state in steps(config, optax.sgd(0.5), params):
        spent = sum(each[name] * int(mask.sum()) for name, mask in state.masks.items())
        budgets.append(int(state.budget))
        assert 0 <= budgets[-1] - spent < max(each.values())
    assert (budgets[0], budgets[-1]) == (4 * one, 2 * one)
    assert budgets == sorted(budgets, reverse=True)


def test_score_per_cost_prefers_several_cheap_triplets():
    make = lambda lam, n: al.Adapter(jnp.ones((3, n)), jnp.asarray(lam), jnp.ones((3, n)))
    adapters = {"narrow": make([1.0, 2.0, 3.0], 5), "wide": make([9.0, 8.0, 7.0], 50)}
    config = al.AdaLoraConfig(total_step=1, init_r=3, target_r=1, score="magnitude")

    def masks(config):
        _, masks = al.allocate(al.init_state(adapters, config), adapters, 0)
        return {name: mask.tolist() for name, mask in masks.items()}

    assert masks(config) == {"narrow": [False] * 3, "wide": [True, True, False]}
    # Triplets cost 11 or 101, so the budget is 112: after one wide triplet, 11 remain, the next one
    # is wide and too expensive, and selection stops.
    assert masks(config.replace(budget_unit="parameters")) == {
        "narrow": [False] * 3,
        "wide": [True, False, False],
    }
    by_price = lambda e: abs(e.weight.lam) / (e.weight.p.shape[-1] + e.weight.q.shape[-1] + 1)
    assert masks(config.replace(budget_unit="parameters", score=by_price)) == {
        "narrow": [True, True, True],
        "wide": [False] * 3,
    }


@pytest.mark.parametrize(
    ("allocation", "limits"),
    [
        ("global", None),
        ("global", {"key": {"min_r": 1, "max_r": 2}, "down": {"min_r": 2}}),
        ("per_adapter", None),  # does not allow limits
    ],
)
def test_without_revival_ranks_only_fall_and_budget_is_met(allocation, limits):
    config = CONFIG.replace(rank_overrides=limits, allocation=allocation, score="sensitivity")

    def run(config):
        """Count the triplets that masks revived, and those that are active after the last mask."""
        before, revived = None, 0
        for t, (params, state) in enumerate(steps(config, optax.sgd(0.5))):
            masks = toy_problem.rows(state.masks)
            assert sum(map(np.sum, masks)) == int(state.budget), f"step {t}"
            if before is not None:
                revived += sum(int((now & ~then).sum()) for now, then in zip(masks, before))
            if not config.allow_regrowth:
                for adapter, mask in zip(toy_problem.matrices(params), masks):
                    assert not adapter["lam"][~mask].any(), f"step {t}"
            before = masks
        return revived, sum(map(np.sum, masks))

    assert run(config.replace(allow_regrowth=False)) == (0, 2 * toy_problem.MATRICES)
    revived, active = run(config)
    assert revived > 0, "nothing was at stake"
    assert active == 2 * toy_problem.MATRICES


def test_pruned_triplets_do_not_count_towards_min_r():
    """Only active triplets count, even where a pruned one has the highest score."""
    limits = {"a": {"min_r": 1}}
    config = al.AdaLoraConfig(
        total_step=4,
        init_r=3,
        target_r=1,
        score="magnitude",
        rank_overrides=limits,
        allow_regrowth=False,
    )
    make = lambda lam: al.Adapter(jnp.ones((3, 2)), jnp.asarray(lam), jnp.ones((3, 2)))
    adapters = {"a": make([1.0, 2.0, 3.0]), "b": make([9.0, 8.0, 7.0])}
    state = al.init_state(adapters, config)
    dead = {"a": jnp.array([True, True, False]), "b": jnp.ones(3, bool)}
    state = al.AdaLoraState(
        adapters, state.allocator._replace(masks=stack(state.allocator.masks.roles, dead))
    )
    _, masks = al.allocate(state, adapters, 3)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [False, True, False],
        "b": [True, False, False],
    }
