"""Compaction of unfinished runs, and of optimizer states that it does not support."""

import jax
import jax.numpy as jnp
import optax
import pytest
from support.random_runs import CONFIG, active, fresh, gradients, run

import adalora_jax as adalora
from adalora_jax import huggingface


def test_compacting_or_exporting_unfinished_run_warns(tmp_path):
    tx = adalora.adalora(optax.adam(1e-2), CONFIG)
    params, state = run(tx, fresh(), 12)
    said = "made 12 updates, but the final mask is made at update 20.*finish"
    with pytest.warns(UserWarning, match=said):
        adalora.compact(params, state)
    for write in (huggingface.save_pretrained, huggingface.save_as_lora):
        with pytest.warns(UserWarning, match=said):
            write(tmp_path, params, CONFIG, masks=state)
    with pytest.raises(ValueError, match=r"`opt_state`: has made 12 updates.*; call finish"):
        adalora.compact(params, state, tx)
    params, state = adalora.finish(state, params)
    small, small_state = adalora.compact(params, state, tx)
    assert active(small) == 3
    tx.update(gradients(small, 0), small_state, small)


@pytest.mark.parametrize(
    "inner",
    [
        optax.sm3(1e-2),
        optax.partition(
            {"up": optax.adam(1e-2), "other": optax.sgd(1e-2)},
            lambda params: {path: path if path == "up" else "other" for path in params},
        ),
    ],
    ids=["sm3", "labels-by-a-function"],
)
def test_compacting_unsupported_optimizer_state_raises_with_hint(inner):
    config = adalora.AdaLoraConfig(total_step=3, init_r=4, target_r=2)
    adapters = {p: adalora.init_adapter(jax.random.key(0), 6, 5, config) for p in ("up", "down")}
    tx = adalora.adalora(inner, config)
    state = tx.init(adapters)
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, adapters)
        updates, state = tx.update(grads, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    with pytest.raises(ValueError, match=r"`opt_state`: .*compact\(params, opt_state\)"):
        adalora.compact(adapters, state, tx)
    assert {a.lam.size for a in adalora.compact(adapters, state).values()} != {4}
