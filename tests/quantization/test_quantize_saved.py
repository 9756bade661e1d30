"""Adapters trained on a quantised base: saving, resuming, compacting and exporting."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.toy_problem import assert_same_bits

import adalora_jax as adalora
from adalora_jax import checkpoint, quantization
from adalora_jax import huggingface as peft

CONFIG = adalora.AdaLoraConfig(
    total_step=6, init_r=3, target_r=1, tinit=1, tfinal=2, target_modules=["up", "down"]
)
X = jax.random.normal(jax.random.key(0), (8, 64))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(64, name="down")(nn.gelu(nn.Dense(64, name="up")(x)))


@pytest.fixture(scope="module", params=["int8", "nf4"])
def base(request):
    variables = Model().init(jax.random.key(1), X)
    return quantization.quantize(Model(), request.param, variables, X)


def trained(base, adapters, state, tx, steps):
    model, variables = base
    adapted = adalora.linen.adapt(model, CONFIG)

    @jax.jit
    def step(adapters, state):
        loss = lambda a: jnp.mean((adapted.apply(variables, a, X) - 1) ** 2)
        updates, state = tx.update(jax.grad(loss)(adapters), state, adapters)
        return optax.apply_updates(adapters, updates), state

    for _ in range(steps):
        adapters, state = step(adapters, state)
    return adapters, state


def test_adapters_can_be_saved_resumed_compacted_and_exported(base, tmp_path):
    model, variables = base
    adapted = adalora.linen.adapt(model, CONFIG)
    tx = adalora.adalora(optax.adam(0.05), CONFIG)
    adapters = adapted.init(jax.random.key(2), variables, X)
    whole = trained(base, adapters, tx.init(adapters), tx, 6)

    half = trained(base, adapters, tx.init(adapters), tx, 3)
    checkpoint.save(tmp_path / "half", *half, CONFIG)
    arrays = json.loads((tmp_path / "half/adalora/metadata").read_text())["arrays"]
    assert {tuple(entry[0][-1:]) for entry in arrays.values()} == {(), (3,), (64,)}
    assert not any(np.dtype(entry[1]).name in ("int8", "uint8") for entry in arrays.values())
    back = checkpoint.restore(tmp_path / "half", tx, config=CONFIG)
    resumed = trained(base, back.adapters, back.opt_state, tx, 3)
    assert_same_bits(resumed, whole)

    adapters, state = whole
    masks = adalora.allocator_state(state)
    want = adapted.apply(variables, adapters, X)
    small = adalora.compact(adapters, masks)
    np.testing.assert_allclose(adapted.apply(variables, small, X), want, rtol=1e-4, atol=1e-5)
    peft.save_pretrained(tmp_path / "peft", adapters, CONFIG, masks=masks)
    loaded = peft.load_pretrained(tmp_path / "peft")
    again = adalora.linen.adapt(model, loaded.config)
    got = again.apply(variables, loaded.adapters, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
