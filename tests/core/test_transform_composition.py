"""The transformation with others inside and around it, and with unsuitable arguments."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support.random_runs import CONFIG, active, fresh, gradients, run
from support.small_models import adapted_of, draw, in_model, linear, nnx_config

import adalora_jax as adalora


def test_config_with_other_scale_than_adapters_raises():
    adapted, _, adapters = adapted_of(nn.Dense(5), draw(2, 4), lora_alpha=12)
    other = adapted.config.replace(lora_alpha=24)
    message = r"`config`: the adapter of '' has scale 4\.0.*gives it 8\.0"
    with pytest.raises(ValueError, match=message):
        adalora.adalora(optax.adam(1e-2), other).init(adapters)
    model = adalora.nnx.adapt(in_model(linear()), nnx_config(".*", lora_alpha=12))
    tx = adalora.adalora(optax.adam(1e-2), nnx_config(".*", lora_alpha=24))
    optimizer = lambda tx: nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    optimizer(adalora.adalora(optax.adam(1e-2), nnx_config(".*", lora_alpha=12)))
    with pytest.raises(ValueError, match="'layers/0' has scale"):
        optimizer(tx)


@pytest.mark.parametrize(
    "inner",
    [
        lambda: optax.MultiSteps(optax.adam(1e-2), 4).gradient_transformation(),
        lambda: optax.chain(optax.adamw(1e-2), optax.apply_every(2)),
    ],
)
def test_accumulation_inside_adalora_raises(inner):
    with pytest.raises(ValueError, match=r"`inner`: holds a .*would count"):
        adalora.adalora(inner(), CONFIG).init(fresh())


def test_multisteps_as_inner_raises_with_hint():
    with pytest.raises(TypeError, match=r"optax\.MultiSteps\(adalora\(inner, config\), k\)"):
        adalora.adalora(optax.MultiSteps(optax.adam(1e-2), 4), CONFIG)


def test_partition_may_exclude_whole_adapters_but_not_parts():
    params = fresh()
    named = lambda path, _: "frozen" if "l1" in jax.tree_util.keystr(path) else "train"
    labels = jax.tree_util.tree_map_with_path(named, params)
    tx = optax.partition(
        {"train": adalora.adalora(optax.adam(1e-2), CONFIG), "frozen": optax.set_to_zero()}, labels
    )
    trained, state = run(tx, params, 20)
    assert sorted(adalora.masks(state)) == ["l0", "l2"]
    jax.tree.map(np.testing.assert_array_equal, trained["l1"], params["l1"])
    assert active({path: trained[path] for path in ("l0", "l2")}) == 2
    assert active(adalora.eval_params(state, trained)) == active(trained)
    by_factor = jax.tree.map(lambda _: "rest", params)
    by_factor["l1"] = by_factor["l1"]._replace(p="fast")
    tx = optax.partition(
        {"fast": optax.adam(1e-2), "rest": adalora.adalora(optax.adam(1e-3), CONFIG)}, by_factor
    )
    message = r"`adapters\['l1'\]`: has no p, but ranks are allocated from"
    with pytest.raises(ValueError, match=message):
        tx.init(params)


def test_adapters_added_or_removed_between_updates_raise():
    tx, params = adalora.adalora(optax.adam(1e-2), CONFIG), fresh()
    state = tx.init(params)
    for other in ({**params, "new": params["l0"]}, {"l0": params["l0"]}):
        with pytest.raises(ValueError, match=r"adapters differ from those that tx\.init saw"):
            tx.update(other, state, other)


def test_penalty_in_update_matches_penalty_in_loss():
    inside = CONFIG.replace(orth_reg_in_update=True, orth_reg_weight=0.3)
    outside = CONFIG.replace(orth_reg_weight=0.3)
    params, results = fresh(), []
    for config in (inside, outside):
        tx = adalora.adalora(optax.adam(1e-2), config)
        state, now = tx.init(params), params
        for step in range(6):
            grads = gradients(now, step)
            if config is outside:
                extra = jax.grad(adalora.orthogonality)(now, config)
                grads = jax.tree.map(jnp.add, grads, extra)
            before = now
            updates, state = tx.update(grads, state, now)
            now = optax.apply_updates(now, updates)
        results.append(now)
        if config is inside:
            value = adalora.info(state).penalty
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    np.testing.assert_allclose(value, adalora.orthogonality(before, outside), rtol=1e-5)
    with pytest.raises(ValueError, match="in the loss it would count twice"):
        adalora.orthogonality(params, inside)


def test_swapped_arguments_raise_with_hints():
    config = adalora.AdaLoraConfig(total_step=3, init_r=4, target_r=2)
    adapters = {"up": adalora.init_adapter(jax.random.key(0), 6, 5, config)}
    tx = adalora.adalora(optax.adam(1e-2), config)
    state = tx.init(adapters)
    with pytest.raises(TypeError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(adapters, adapters, state)
    with pytest.raises(TypeError, match=r"orthogonality\(adapters, config\)"):
        adalora.orthogonality(config, adapters)
    with pytest.raises(TypeError, match="`named=list`: is not a mapping"):
        adalora.AdapterBank.from_dict([adapters])
    with pytest.raises(ValueError, match=r"arguments are \(opt_state, params\)"):
        adalora.eval_params(adapters, state)
    with pytest.raises(ValueError, match="`adapters`: no adapter was found in the Linear"):
        adalora.summary(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), state)
