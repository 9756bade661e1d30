"""Budget schedules, and the costs of triplets that a budget counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import toy_problem

import adalora_jax as al
from adalora_jax._src.core.schedule import cost

CONFIG = al.AdaLoraConfig(total_step=12, init_r=4, target_r=2, tinit=1, tfinal=3, lora_alpha=6)
LONG = al.AdaLoraConfig(total_step=1000, init_r=12, target_r=8)
LINEAR = LONG.replace(budget_schedule="linear")


@pytest.mark.parametrize("adapters", [1, 7, 36])
def test_linear_budget_from_12_to_8_is_10_per_adapter_halfway(adapters):
    assert int(al.budget(LINEAR, 500, adapters)) / adapters == 10.0
    assert int(al.budget(LINEAR, 0, adapters)) / adapters == 12.0
    assert int(al.budget(LINEAR, 999, adapters)) / adapters == 8.0


def test_linear_budget_falls_linearly():
    budgets = np.asarray(al.budget(LINEAR, np.arange(999), 36))
    line = 36 * (12 - 4 * np.arange(999) / 1000)
    assert np.abs(budgets - line).max() < 1
    cubic = np.asarray(al.budget(LONG, np.arange(999), 36))
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
    params = toy_problem.adapters(config)
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
        budgets.append(int(state.allocator.budget) / toy_problem.MATRICES)
    assert budgets[-1] == 8.0
    assert 10.0 > budgets[4] > 9.0
    assert toy_problem.active(state.allocator.masks) == 8 * toy_problem.MATRICES
    assert sum(int((a.lam != 0).sum()) for a in params.values()) == 8 * toy_problem.MATRICES


def test_triplet_cost_depends_on_layer_size():
    config = CONFIG.replace(budget_unit="parameters")
    assert cost(CONFIG, "up", 512, 2048) == 1
    assert cost(config, "up", 512, 2048) == 512 + 1 + 2048
    assert cost(config.replace(budget_unit="flops"), "up", 8, 32) == (2 * 8) + 1 + (2 * 32)
    own = config.replace(budget_unit=lambda path, ins, outs: 100 * len(path) + ins - outs)
    assert cost(own, "up", 8, 32) == 176
    with pytest.raises(ValueError, match=r"budget_unit\('up', .*\)=0.5`: must be an integer"):
        cost(config.replace(budget_unit=lambda *_: 0.5), "up", 8, 32)


def test_budget_beyond_int32_raises():
    config = CONFIG.replace(budget_unit=lambda path, ins, outs: 10**9)
    with pytest.raises(ValueError, match=r"`budget_unit=.*more than an int32 can count"):
        al.init_state(toy_problem.adapters(config), config)


@pytest.mark.parametrize("freeze_pruned", [False, True])
@pytest.mark.parametrize("init", ["gaussian", "lambda_one", "orthonormal"])
def test_grow_schedule_increases_ranks_and_new_triplets_train(freeze_pruned, init):
    """The problem needs rank: triplets pruned early are active and non-zero at the end."""
    config = CONFIG.replace(
        total_step=60,
        init_r=3,
        tfinal=20,
        deltaT=4,
        budget_schedule="grow",
        freeze_pruned=freeze_pruned,
        init=init,
    )
    params, data = toy_problem.adapters(config), toy_problem.batches(config)
    tx = al.adalora(toy_problem.lenient(optax.adam(0.03)), config)
    state, step = tx.init(params), jax.jit(toy_problem.train_step(tx, config))
    budgets, masks = [], []
    for t in range(config.total_step):
        params, state, _ = step(params, state, jax.tree.map(lambda leaf, t=t: leaf[t], data))
        budgets.append(int(state.allocator.budget))
        masks.append(toy_problem.rows(state.allocator.masks))
        if t > config.tinit and t % config.deltaT == 0 and t < config.final_step:
            assert toy_problem.active(state.allocator.masks) == budgets[-1]
    growing = budgets[2 : config.final_step + 1]
    assert (growing[0], growing[-1]) == (toy_problem.MATRICES, 2 * toy_problem.MATRICES)
    assert growing == sorted(growing)
    assert toy_problem.active(state.allocator.masks) == 2 * toy_problem.MATRICES
    early, late = masks[8], masks[-1]
    grown = [now & ~then for now, then in zip(late, early)]
    assert sum(map(np.sum, grown)) >= toy_problem.MATRICES
    moves = []
    for adapter, new in zip(toy_problem.matrices(params), grown):
        assert np.all(adapter["lam"][new] != 0)
        moves.extend(np.abs(adapter["lam"][new, None] * adapter["p"][new]).max(axis=-1))
    assert np.mean(np.array(moves) > 1e-3) > 0.7


def test_nan_budget_schedule_prunes_nothing_before_final_step():
    config = CONFIG.replace(budget_schedule=lambda config, step, n: jnp.nan * step)
    budgets = [int(al.budget(config, step, 3)) for step in range(config.total_step)]
    assert budgets[: config.final_step] == [3 * config.init_r] * config.final_step
    assert budgets[-1] == 3 * config.target_r


@pytest.mark.parametrize("number", [-2, 2.5, "3", None])
def test_number_of_adapters_that_is_none_raises(number):
    with pytest.raises(ValueError, match=r"`n_adapters=.*`: must be an integer of at least 0"):
        al.budget(LINEAR, 1, number)
    if number is not None:
        with pytest.raises(ValueError, match=r"`initial=.*`: must be an integer of at least 0"):
            al.budget(LINEAR, 1, 2, initial=number)
