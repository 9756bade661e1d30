"""Adapter outputs under ``nn.jit``, whose code runs once for many calls, and their dropout."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adalora_jax as adalora
from modules.linen_scopes import CONFIG, Shared, X

DROPPING = CONFIG.replace(lora_dropout=0.5)


class Jitted(nn.Module):
    """The same layer three times, traced once, all under another jit."""

    @nn.jit
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = x + nn.jit(nn.Dense)(6, name=f"layer_{i}")(nn.tanh(x))
        return nn.jit(Shared)(name="end")(x)


class Unjitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = x + nn.Dense(6, name=f"layer_{i}")(nn.tanh(x))
        return Shared(name="end")(x)


def test_nn_jit_cache_is_not_shared_between_adapters():
    """The model has identical layers; successive calls change scales or have no adapters."""
    variables = Jitted().init(jax.random.key(1), X)
    plain = Jitted().apply(variables, X)
    limits = {"layer_1": adalora.RankSpec(alpha=40)}
    for config in (CONFIG, CONFIG.replace(lora_alpha=30), CONFIG.replace(rank_overrides=limits)):
        jitted, unjitted = (adalora.linen.adapt(m(), config) for m in (Jitted, Unjitted))
        adapters = jitted.init(jax.random.key(2), variables, X)
        assert list(adapters) == [
            *("end/mlp/narrow", "end/mlp/wide", "end/out"),
            *(f"layer_{i}" for i in range(3)),
        ]
        want = unjitted.apply(variables, adapters, X)
        np.testing.assert_allclose(jitted.apply(variables, adapters, X), want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(Jitted().apply(variables, X), plain)
    grads = [
        jax.grad(lambda a, model=model: jnp.sum(model.apply(variables, a, X) ** 2))(adapters)
        for model in (jitted, unjitted)
    ]
    chex.assert_trees_all_close(*grads, rtol=1e-4, atol=1e-4)
    described = adalora.linen.describe(Jitted(), CONFIG, variables, X)
    assert described == adalora.linen.describe(Unjitted(), CONFIG, variables, X)


def test_nn_jit_cache_is_not_shared_between_dropout_rates():
    variables = Jitted().init(jax.random.key(1), X)
    adapters = adalora.linen.adapt(Jitted(), CONFIG).init(jax.random.key(2), variables, X)
    rngs = {"dropout": jax.random.key(3)}

    def run(rate):
        return adalora.linen.adapt(Jitted(), CONFIG.replace(lora_dropout=rate)).apply(
            variables, adapters, X, rngs=rngs
        )

    assert np.abs(run(0.0) - run(0.5)).max() > 1e-3
    np.testing.assert_array_equal(run(0.0), run(0.0))


class Positional(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(4)(x)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic=True):
        return nn.Dense(4)(x)


class Attribute(nn.Module):
    train: Any = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)


class Outer(nn.Module):
    """A model that takes the flag, with blocks that do not."""

    @nn.compact
    def __call__(self, x, is_training=False):
        return Attribute()(x)


class Inner(nn.Module):
    """A block that gets another flag value than the model."""

    @nn.compact
    def __call__(self, x, train=True):
        return Positional()(x, False)


class Scanned(nn.Module):
    """Layers without a residual sum, so that each sees the same input."""

    @nn.compact
    def __call__(self, x, train=True):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x, nn.Dense(4, kernel_init=nn.initializers.zeros)(x)

        layers = nn.scan(
            *(Body, {"params": 0}),
            split_rngs={"params": True, "dropout": True},
            length=2,
        )
        return layers()(x, None)[1]


def adapted_apply(model, config, *args, **kwargs):
    variables = model.init(jax.random.key(0), X, *args, **kwargs)
    adapted = adalora.linen.adapt(model, config)
    adapters = adapted.init(jax.random.key(1), variables, X, *args, **kwargs)

    @jax.jit
    def run(key):
        return adapted.apply(variables, adapters, X, *args, **kwargs, rngs={"dropout": key})

    return run


@pytest.mark.parametrize(
    ("model", "args", "kwargs", "drops"),
    [
        (Positional(), (True,), {}, True),
        (Positional(), (False,), {}, False),
        (Deterministic(), (), {"deterministic": False}, True),
        (Deterministic(), (), {}, False),
        (Deterministic(), (), {"deterministic": True}, False),
        (Attribute(train=True), (), {}, True),
        (Attribute(train=False), (), {}, False),
        (Outer(), (True,), {}, True),
        (Outer(), (), {"is_training": False}, False),
        (Inner(), (True,), {}, False),
    ],
)
def test_linen_adapter_dropout_follows_train_flags(model, args, kwargs, drops):
    run = adapted_apply(model, DROPPING, *args, **kwargs)
    outputs = [run(jax.random.key(i)) for i in (1, 2)]
    assert bool(np.any(outputs[0] != outputs[1])) == drops


def test_linen_scanned_layers_use_different_dropout_masks():
    module = Scanned()
    variables = module.init(jax.random.key(0), X)
    adapted = adalora.linen.adapt(module, DROPPING)
    adapters = adapted.init(jax.random.key(1), variables, X)
    adapters = jax.tree.map(lambda leaf: leaf.at[1].set(leaf[0]), adapters)
    y = adapted.apply(variables, adapters, X, rngs={"dropout": jax.random.key(3)})
    assert np.any(y[0] != y[1])
    y = adapted.apply(variables, adapters, X)
    np.testing.assert_array_equal(y[0], y[1])


def test_captured_intermediates_are_the_adapted_outputs():
    model = Positional()
    variables = model.init(jax.random.key(0), X, False)
    adapted = adalora.linen.adapt(model, CONFIG)
    adapters = adapted.init(jax.random.key(1), variables, X, False)
    y, state = adapted.apply(
        variables, adapters, X, False, capture_intermediates=True, mutable=["intermediates"]
    )
    (captured,) = state["intermediates"]["Dense_0"]["__call__"]
    np.testing.assert_array_equal(captured, y)
    assert set(state) == {"intermediates"}
