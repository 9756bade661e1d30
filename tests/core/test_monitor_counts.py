"""Counts in ``info``: updates changed outside of the transformation, inactive adapters."""

import jax
import jax.numpy as jnp
import optax
import pytest
from support.random_runs import CONFIG, active, fresh, gradients, run

import adalora_jax as adalora

AROUND = {
    "a learning rate": lambda: optax.chain(
        adalora.adalora(optax.scale_by_adam(), CONFIG), optax.scale_by_learning_rate(1e-2)
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(
        adalora.adalora(optax.adam(1e-2), CONFIG), 1e-2
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_updates_changed_outside_adalora_are_counted(name):
    params, state = run(AROUND[name](), fresh(), 24)
    info = adalora.info(state)
    assert int(info.overridden) > 0
    assert int(info.metrics()["overridden"]) == int(info.overridden)
    assert active(params) > 3
    assert active(adalora.eval_params(state, params)) == 3


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.apply_if_finite(tx, 3)])
def test_unchanged_updates_are_not_counted(wrap):
    _, state = run(wrap(adalora.adalora(optax.adamw(1e-2), CONFIG)), fresh(), 24, bad=(3,))
    assert int(adalora.info(state).overridden) == 0


def test_adapter_without_gradient_is_reported():
    tx, params = adalora.adalora(optax.adam(1e-2), CONFIG), fresh()
    state = tx.init(params)
    for step in range(3):
        grads = gradients(params, step)
        grads["l1"] = jax.tree.map(jnp.zeros_like, grads["l1"])
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    info = adalora.info(state)
    assert {path: bool(value) for path, value in info.inactive.items()} == {
        "l0": False,
        "l1": True,
        "l2": False,
    }
    assert int(info.metrics()["inactive"]) == 1
