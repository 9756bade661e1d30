"""Masked parameters for evaluation, and the final mask of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.random_runs import CONFIG, active, fresh, gradients, run
from support.small_models import agree, draw

import adalora_jax as adalora


def test_eval_params_are_pruned_where_params_between_masks_are_not():
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    params = {"model": fresh(), "head": jnp.ones(3)}
    params, state = run(tx, params, 19)
    allowed = sum(adalora.ranks(state).values())
    assert active(params) == 12 > allowed
    final = jax.jit(adalora.eval_params)(state, params)
    assert active(final) == allowed
    assert jax.tree.structure(final) == jax.tree.structure(params)
    np.testing.assert_array_equal(final["head"], params["head"])
    variables = {"params": {f"l{i}": {"kernel": draw(6, 5, seed=i)} for i in range(3)}}
    merged = adalora.merge(variables, final["model"])
    kept = {f"l{i}": {"kernel": draw(6, 5, seed=i)} for i in range(3)}
    for path, adapter in final["model"].items():
        mask = adalora.masks(state)[f"model/{path}"]
        assert adapter.scale == 2.0
        own = params["model"][path]
        delta = 2.0 * (own.q[mask].T * own.lam[mask][None]) @ own.p[mask]
        agree(merged["params"][path]["kernel"], kept[path]["kernel"] + delta)


def test_eval_params_raises_for_params_of_another_run():
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    _, state = run(tx, fresh(), 2)
    with pytest.raises(ValueError, match=r"masks for 'l2', of which there are no adapters"):
        adalora.eval_params(state, {path: fresh()[path] for path in ("l0", "l1")})
    with pytest.raises(ValueError, match="has no AllocatorState in it"):
        adalora.eval_params(optax.adam(1e-2).init(fresh()), fresh())


@pytest.mark.parametrize("interval", [1, 5, 25])
def test_finish_brings_run_with_skipped_step_to_budget(interval):
    config = CONFIG.replace(deltaT=interval)
    tx = optax.apply_if_finite(adalora.adalora(optax.adam(1e-2), config), 5)
    params, state = run(tx, fresh(config), config.total_step, bad=(2,))
    assert int(adalora.allocator_state(state).step) == 19
    params, state = adalora.finish(state, params)
    assert active(params) == sum(adalora.ranks(state).values()) == 3
    assert int(adalora.allocator_state(state).budget) == 3
    # finish is idempotent, and later updates are in the final phase.
    again, same = adalora.finish(state, params)
    jax.tree.map(np.testing.assert_array_equal, (again, same), (params, state))
    updates, state = jax.jit(tx.update)(gradients(params, 99), state, params)
    assert active(optax.apply_updates(params, updates)) == 3


def test_finish_makes_same_mask_as_last_step_would():
    """The averages alone decide it, without the last update."""
    config = CONFIG.replace(deltaT=7, score="smoothed_sensitivity")
    tx = adalora.adalora(optax.adam(1e-2), config)
    params, state = run(tx, fresh(config), 11)
    averages = adalora.allocator_state(state).sensitivity
    scores = np.concatenate([np.asarray(adalora.scores.triplet_mean(a)) for a in averages.values()])
    _, done = adalora.finish(state, params)
    mask = np.concatenate([np.asarray(m) for m in adalora.masks(done).values()])
    assert set(np.flatnonzero(mask)) == set(np.argsort(-scores)[:3])


def test_finish_requires_an_update_and_inputs_of_its_score():
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    with pytest.raises(ValueError, match="made no update"):
        adalora.finish(tx.init(fresh()), fresh())
    config = CONFIG.replace(score="sensitivity")
    tx = adalora.adalora(optax.adam(1e-2), config)
    params, state = run(tx, fresh(config), 3)
    with pytest.raises(ValueError, match="`grads=None`: score='sensitivity'"):
        adalora.finish(state, params)
    params, _ = adalora.finish(state, params, gradients(params, 2))
    assert active(params) == 3


def test_eval_params_average_and_mask_with_schedule_free_inside_adalora():
    tx = adalora.adalora(optax.contrib.schedule_free_adamw(1e-2), CONFIG)
    params, state = run(tx, fresh(), 24)
    final = adalora.eval_params(state, params)
    average = optax.contrib.schedule_free_eval_params(state.inner, params)
    assert active(average) > active(final) == 3
    for path, mask in adalora.masks(state).items():
        np.testing.assert_array_equal(final[path].lam[mask], average[path].lam[mask])


def test_trees_without_masks_raise():
    params = fresh()
    for value in (params, {"l0": jnp.ones(4)}, {}):
        with pytest.raises(
            ValueError, match=r"`state=.*`: has no AllocatorState in it, and is not a dict of"
        ):
            adalora.ranks(value)
    state = adalora.adalora(optax.adam(1e-2), CONFIG).init(params)
    assert adalora.ranks(state) == {"l0": 4, "l1": 4, "l2": 4}
    assert "total" in adalora.summary(params, state)


def test_finish_after_final_mask_needs_no_gradients():
    config = adalora.AdaLoraConfig(
        total_step=3, init_r=4, target_r=2, score=lambda inputs: inputs.sensitivity.lam
    )
    adapters = {"up": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    tx = adalora.adalora(optax.adam(1e-2), config)
    state, grads = tx.init(adapters), jax.tree.map(jnp.ones_like, adapters)
    for step in range(3):
        if step == 2:
            with pytest.raises(ValueError, match="`grads=None`"):
                adalora.finish(state, adapters)
        updates, state = tx.update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    final, _ = adalora.finish(state, adapters)
    assert int((final["up"].lam != 0).sum()) <= 2
